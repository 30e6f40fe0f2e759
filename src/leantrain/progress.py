"""How far a run has come: what it has spent of its budget, and the numbers a checkpoint keeps beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.processes import World
from leantrain.recipe import Recipe, recipe_to_dict

MAY_CHANGE = {
    "name", "steps", "max_seconds", "max_tokens", "eval_every", "eval_batches", "checkpoint_every", "keep", "log_every",
    "trackers", "ledger", "threads", "device",
}  # fmt: skip
"""Recipe keys in which a run that goes on may differ from what it continues: none of them touches a step's numbers,
except that `steps` and the budgets stretch what is left of the schedule."""


class Progress:
    """Counters of one run. `step`, `tokens` and `examples` count over all processes."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe, self.world = recipe, world
        self.step = self.tokens = self.examples = 0
        self.seconds = 0.0
        """Time in this process's training steps."""
        self.agreed_seconds = 0.0
        """The slowest process's `seconds` before the current step; what decides, so that all decide alike."""
        self._losses = torch.zeros((), device=world.device)
        self._counted = 0

    def spent(self, steps: int = 0, tokens: int = 0) -> float:
        """The part of the budget that is used up, 1 at the end: of steps, seconds or tokens, whichever is furthest.

        Args:
            steps, tokens: of a step that is still being taken.
        """
        spent = (self.step + steps) / self.recipe.steps
        if self.recipe.max_seconds is not None:
            spent = max(spent, self.agreed_seconds / self.recipe.max_seconds)
        if self.recipe.max_tokens is not None:
            spent = max(spent, (self.tokens + tokens) / self.recipe.max_tokens)
        return spent

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.spent() >= 1

    def position(self) -> float:
        """Where the schedule is, in steps. It follows the budget, so a run that seconds cut short ends at `min_lr`."""
        only_steps = self.recipe.max_seconds is None and self.recipe.max_tokens is None
        return self.step if only_steps else self.spent() * self.recipe.steps

    def stepped(self, loss: Tensor, tokens: int, examples: int, seconds: float) -> None:
        """Count a step. `loss`, this process's mean, is added up where it is, so that no step waits for a GPU."""
        self._losses += loss
        self._counted += 1
        self.step += 1
        self.tokens += tokens
        self.examples += examples
        self.seconds += seconds

    def take_mean_loss(self, same: bool = False) -> float:
        """The mean loss over all processes since this was last asked. All of them must ask, unless it is the `same`."""
        own = self._losses.item()
        total = own * self.world.size if same else self.world.total({"loss": own})["loss"]
        mean = total / (self._counted * self.world.size)
        self._losses.zero_()
        self._counted = 0
        return mean

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint, with every process's sum of losses. All processes must call it."""
        own = self._losses.item()
        sums = self.world.total({str(r): own if r == self.world.rank else 0.0 for r in range(self.world.size)})
        return {
            "recipe": recipe_to_dict(self.recipe), "step": self.step, "tokens": self.tokens, "examples": self.examples,
            "seconds": self.seconds, "losses": list(sums.values()), "losses_counted": self._counted,
        }  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `to_dict` gave."""
        self.step, self.tokens, self.examples = saved["step"], saved["tokens"], saved["examples"]
        self.seconds = self.agreed_seconds = saved["seconds"]
        self._counted = saved["losses_counted"]
        losses = saved["losses"]  # exact for as many processes as before; otherwise everyone takes the mean
        same = len(losses) == self.world.size
        self._losses.fill_(losses[self.world.rank] if same else sum(losses) / len(losses))


def check_same_recipe(recipe: Recipe, saved: dict[str, Any], path: Path) -> None:
    """Refuse to continue the run in checkpoint `path` under a recipe with which it would not be the same run.

    Raises:
        UsageError: naming the first key that differs and both values.
    """
    for key, here in recipe_to_dict(recipe).items():
        there = saved["recipe"].get(key)
        if key not in MAY_CHANGE and here != there:
            raise UsageError(
                f"{path} is of a run with {key}={there!r}, this recipe has {key}={here!r}; "
                "use another folder, or begin anew (resume=False, --fresh)"
            )
