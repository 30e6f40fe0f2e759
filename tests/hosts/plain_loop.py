"""A training loop written by hand, with every setting where it belongs: what all hosts have to agree with.

It shares nothing with the hosts' code or with `leantrain.hosts`: groups are named here, the schedule is a formula, and
accumulation is an average.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leantrain.optim import GaLoreAdamW

STEPS, BATCH, WARMUP, RANK, REFRESH = 6, 4, 2, 4, 3
DEFAULTS: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-3,  # not much below the gradients, so that clipping shows
    "max_norm": None,
    "accumulate": 1,
    "rank": RANK,
    "scheduled": True,
}
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "lr": {"lr": 3e-2},
    "weight decay": {"weight_decay": 0.5},
    "beta1": {"betas": (0.5, 0.999)},
    "beta2": {"betas": (0.9, 0.9)},
    "eps": {"eps": 1e-2},
    "clipping": {"max_norm": 0.1},
    "accumulation": {"accumulate": 3},
}
"""What users set, in the words of this file. A host has to end up with the weights that this loop has."""

Make = Callable[..., torch.optim.Optimizer]


def model() -> nn.Module:
    """A Hugging Face model of 5 k numbers, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    )


def examples(number: int = 3 * STEPS * BATCH) -> Tensor:
    return torch.randint(0, 32, (number, 8), generator=torch.Generator().manual_seed(1))


def factor(step: int) -> float:
    """Linear warm-up from 0, then linearly to 0 at the end, as `lr_scheduler_type="linear"` means it."""
    return step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)


@dataclass
class Run:
    """What a run leaves behind: its weights, and what was logged at each step."""

    weights: dict[str, Tensor]
    lrs: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, trained: nn.Module, lrs: list[float], norms: list[float]) -> Run:
        return cls({name: param.detach().clone() for name, param in trained.named_parameters()}, lrs, norms)

    def distance(self, other: Run) -> float:
        """The largest difference between two weights."""
        assert self.weights.keys() == other.weights.keys()
        return max((self.weights[name] - other.weights[name]).abs().max().item() for name in self.weights)


def groups(trained: nn.Module, weight_decay: float, rank: int) -> list[dict[str, Any]]:
    """Matrices with a rank, embedding and head without, and norms without decay, named by hand."""
    named = dict(trained.named_parameters())
    norms = [name for name in named if "norm" in name]
    matrices = [name for name in named if "_proj" in name]
    rest = ["model.embed_tokens.weight", "lm_head.weight"]
    assert sorted(norms + matrices + rest) == sorted(named)
    return [
        {"params": [named[name] for name in matrices], "rank": rank, "weight_decay": weight_decay},
        {"params": [named[name] for name in rest], "weight_decay": weight_decay},
        {"params": [named[name] for name in norms], "weight_decay": 0.0},
    ]


@functools.cache
def plain_loop(make: Make = GaLoreAdamW, previous_norm: bool = False, **changes: Any) -> Run:
    """The run that every host is compared with.

    `make(groups, lr=, betas=, eps=, refresh=)` is the optimizer; `previous_norm` clips by the norm of the step before.
    """
    s = DEFAULTS | changes
    trained, data = model(), examples()
    options = {"lr": s["lr"], "betas": s["betas"], "eps": s["eps"], "refresh": REFRESH}
    optimizer = make(groups(trained, s["weight_decay"], s["rank"]), **options)
    params = list(trained.parameters())
    lrs: list[float] = []
    norms: list[float] = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = s["lr"] * (factor(step) if s["scheduled"] else 1.0)
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        for micro in range(s["accumulate"]):
            start = (step * s["accumulate"] + micro) * BATCH
            batch = data[start : start + BATCH]
            (trained(input_ids=batch, labels=batch).loss / s["accumulate"]).backward()
        norms.append(torch.stack([param.grad.square().sum() for param in params]).sum().sqrt().item())
        if s["max_norm"] is not None:
            norm = norms[-2] if previous_norm and step else norms[-1]
            for param in params:
                param.grad.mul_(min(1.0, s["max_norm"] / (norm + 1e-6)))
        optimizer.step()
    return Run.of(trained, lrs, norms)
