"""Leaving a network where the layers behind add nothing: a read-out on hidden features, and a pass that ends there.

    f(x) = g(h_k(x))        h_k: the features at place k; g: what reads the classes off them

Saves the arithmetic of every layer behind the place; the layers stay in memory. Costs one forward pass over held-out
data to find the place. Blocks that were trained by local losses (`leantrain.learn.LocalUpdates`) have such a g each,
and the last one is not always the best; of any other network, a linear g is fitted in closed form.

Source: Teerapittayanon, McDanel & Kung 2016 (ICPR, arXiv 1709.01686), who train such exits with the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from leantrain.analysis.hidden import IGNORED, Hidden, look, module_named, pair, watched
from leantrain.analysis.probe import measured
from leantrain.analysis.read_out import ReadOut, Ridge
from leantrain.errors import UsageError
from leantrain.modes import evaluation_mode
from leantrain.outputs import logits_of

OUTPUT = "output"
"""The model's own output, as the last of the exits."""


class _Cut(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...


class WithHeads(Protocol):
    """A learner of a model in blocks, such as `leantrain.learn.LocalUpdates`."""

    cut: _Cut
    auxiliaries: nn.ModuleList
    """For each block but the last a module whose `head` makes logits of the block's output."""


class EarlyExit(nn.Module):
    """Runs `model` up to the input of one of its modules and reads the classes off what has arrived there.

    Gradients flow through what is run, so an exit can be trained further.

    Args:
        model: any module that is not compiled.
        name: the module in front of which to leave it; "output": run it to its end.
        head: makes [B, classes] or [B, T, classes] of the features; None for the model's own output.
        accuracies: of all exits that were to choose from.

    Raises:
        UsageError: the model has no such module, or, in use, the forward pass does not come by it.
    """

    def __init__(
        self, model: nn.Module, name: str, head: nn.Module | None, accuracies: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        if (name == OUTPUT) != (head is None):
            raise UsageError(f"an exit needs a head, and the model's own output none; got name={name!r}, head={head!r}")
        self.model, self.name, self.head = model, name, head
        self.accuracies = dict(accuracies or {})
        if head is not None:
            module_named(model, name)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.head is None:
            return logits_of(self.model(inputs))
        try:
            with watched(self.model, [self.name], _leave):
                self.model(inputs)
        except _Arrived as arrived:
            features = arrived.features
        scores: Tensor = self.head(features)
        return scores

    @torch.no_grad()
    def flops_share(self, inputs: Tensor) -> float:
        """What part of the model's FLOPs on `inputs` is left, head included: matrix products and convolutions."""
        from torch.utils.flop_counter import FlopCounterMode  # takes a moment to load

        counts = []
        with evaluation_mode(self):
            for module in (self, self.model):
                with FlopCounterMode(display=False) as counter:
                    module(inputs)
                counts.append(int(counter.get_total_flops()))
        return counts[0] / counts[1]


def early_exit(
    model: nn.Module, where: WithHeads | Mapping[str, nn.Module] | Sequence[str] | None, loader: Iterable[Any], *,
    tolerance: float = 0.0, examples: int = 2048,
) -> EarlyExit:  # fmt: skip
    """The first exit that is as accurate as the best one.

    Choosing on data makes the choice look better on them: choose on validation data, and report on others.

    Args:
        model: see `leantrain.analysis.probe`.
        where: a learner of `model` in blocks: its heads; {name of a module: what reads off its input}; names of
            modules, or None for all places as in `probe`, where linear read-outs are fitted to half of the examples
            and judged by the other half.
        loader: see `leantrain.analysis.probe`.
        tolerance: how much less accurate than the best it may be, as a part of 1, from 0 to 1.
        examples: for read-outs that are fitted: see `leantrain.analysis.probe`. Heads are judged by all of `loader`.

    Raises:
        UsageError: `tolerance` is out of range; otherwise as `leantrain.analysis.probe`.
    """
    if not 0 <= tolerance <= 1:
        raise UsageError(f"tolerance must be in [0, 1], got tolerance={tolerance}")
    device = next(model.parameters()).device
    if where is None or (isinstance(where, Sequence) and not isinstance(where, str)):
        hidden = look(model, loader, where, examples)
        found, ridges = measured(hidden)
        modules = dict(model.named_modules())  # the model's input, which is none of them, is no exit
        heads = {name: _read_out(hidden, ridge).to(device) for name, ridge in ridges.items() if name in modules}
        accuracies = {place.name: place.linear_probe for place in found.places if place.name in heads}
        accuracies[OUTPUT] = found.accuracy
    else:
        heads = _heads(where)
        accuracies = _judged(model, heads, loader, device)
    enough = max(accuracies.values()) - tolerance
    name = next(name for name, accuracy in accuracies.items() if accuracy >= enough)
    return EarlyExit(model, name, heads.get(name), accuracies)


class _Arrived(Exception):
    """The end of a pass that is left early; not an error."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def _leave(name: str, features: Tensor) -> None:
    raise _Arrived(features)


def _read_out(hidden: Hidden, ridge: Ridge) -> nn.Module:
    """For all classes that the model knows; those that were not seen score 0."""
    present = torch.unique(hidden.labels)
    weight, bias = torch.zeros(hidden.classes, ridge.weight.shape[1]), torch.zeros(hidden.classes)
    weight[present], bias[present] = ridge.weight.float(), ridge.bias.float()
    return ReadOut(weight, bias, hidden.every_position)


def _heads(where: object) -> dict[str, nn.Module]:
    if isinstance(where, Mapping):
        return dict(where)
    if not (hasattr(where, "cut") and hasattr(where, "auxiliaries")):
        raise UsageError(f"where must be a learner in blocks, heads by name, names or None, got {where!r}")
    return {name: each.head for name, each in zip(where.cut.names, where.auxiliaries, strict=True)}


@torch.no_grad()
def _judged(
    model: nn.Module, heads: Mapping[str, nn.Module], loader: Iterable[Any], device: torch.device
) -> dict[str, float]:
    """The accuracy of each exit, in the order in which a pass comes by them."""
    correct, count = dict[str, int](), 0
    with ExitStack() as modes:
        for module in (model, *heads.values()):
            modes.enter_context(evaluation_mode(module))
        for given in loader:
            inputs, targets = pair(given)
            inputs, targets = inputs.to(device), targets.to(device)

            def read(name: str, scores: Tensor, targets: Tensor = targets) -> None:
                correct[name] = correct.get(name, 0) + int((scores.argmax(-1) == targets).sum())

            with watched(model, list(heads), lambda name, features: read(name, heads[name](features))):
                read(OUTPUT, logits_of(model(inputs)))
            count += int((targets != IGNORED).sum())
    if not count:
        raise UsageError("judging exits needs a loader with at least one example, got one without")
    return {name: number / count for name, number in correct.items()}
