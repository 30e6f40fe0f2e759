"""What goes into the modules of a network while it runs: where to look, and a sample of what is there to see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from heapq import heappush, heapreplace
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

from leantrain.cutting import sensible, survey
from leantrain.errors import RunError, UsageError, nearest
from leantrain.modes import evaluation_mode
from leantrain.outputs import logits_of

INPUT = "input"
"""The place of what the model itself is given."""
IGNORED = -100  # PyTorch's and Hugging Face's value for a target that does not count
_POSITIONS = 16
"""Most positions that are looked at of one sequence: neighbours tell much the same."""
_POOLED = 1024
"""Most numbers that a stack of feature maps is pooled to."""


@dataclass(frozen=True)
class Hidden:
    """What was seen of N examples; of a text, of N positions."""

    features: dict[str, Tensor]
    """By place: [N, width] float32, pooled, on the CPU."""
    dead: dict[str, float]
    """By place: the share of units that gave one and the same number wherever they were looked at."""
    labels: Tensor
    """[N] int64."""
    predicted: Tensor
    """[N] int64: the class with the model's largest logit."""
    fitting: Tensor
    """[N] bool: a random half of the examples, to fit with; the rest is to judge by. A sequence is on one side as a
    whole."""
    classes: int
    """How many logits the model has."""
    every_position: bool
    """Whether the examples are positions of texts."""


@torch.no_grad()
def look(
    model: nn.Module, loader: Iterable[Any], names: Sequence[str] | None, examples: int, shuffle: bool = False
) -> Hidden:
    """See what goes into modules while the model runs, in evaluation mode.

    Args:
        names: of the modules; None: see `places`, with the model's own input first where it is made of real numbers.
        examples: how many to see; of texts, how many positions.
        shuffle: whether to draw them from all of `loader` instead of its first batches.

    Raises:
        UsageError, RunError: as `leantrain.analysis.probe`.
    """
    if examples < 4:
        raise UsageError(f"examples must be at least 4, got examples={examples}")
    device = next(model.parameters()).device
    layers: dict[str, _Layer] = {}
    labels, predicted, fitting = list[Tensor](), list[Tensor](), list[Tensor]()
    classes, at = 0, None
    draw = torch.Generator().manual_seed(0)  # not every other one: labels that take turns would be on one side
    for given in _drawn(loader, examples) if shuffle else loader:
        seen = sum(map(len, labels))
        if seen >= examples:
            break
        inputs, targets = pair(given)
        at = _positions(targets)
        taken = -(-(examples - seen) // (1 if at is None else len(at)))
        inputs, targets = inputs[:taken].to(device), targets[:taken].cpu()
        label = targets if at is None else targets[:, at].flatten()
        kept = label != IGNORED
        if not layers:
            raw = [INPUT] if names is None and inputs.is_floating_point() else []
            names = places(model, inputs[:2]) if names is None else names
            layers = {name: _Layer() for name in (*raw, *names)}
        if not layers:
            raise UsageError(f"there is no place in {type(model).__name__} to look at; give names of modules")
        see = partial(_see, layers, at, kept)
        if INPUT in layers and INPUT not in (names or ()):
            see(INPUT, inputs)
        with evaluation_mode(model), watched(model, names or (), see):
            logits = logits_of(model(inputs))
        if logits.shape[:-1] != targets.shape:
            raise UsageError(f"targets {list(targets.shape)} do not fit the model's output {list(logits.shape)}")
        half = torch.rand(len(targets), generator=draw) < 0.5
        fitting.append((half if at is None else half.repeat_interleave(len(at)))[kept])
        labels.append(label[kept])
        predicted.append((logits if at is None else logits[:, at].flatten(0, 1)).argmax(-1).cpu()[kept])
        classes = logits.shape[-1]
    if not labels:
        raise UsageError("a probe needs a loader with at least one batch, got one without")
    features = {name: torch.cat(layer.rows)[:examples] for name, layer in layers.items()}
    for name, rows in features.items():
        if not bool(rows.isfinite().all()):
            raise RunError(f"what goes into {name} is not finite")
    own, guessed, half = (torch.cat(each)[:examples] for each in (labels, predicted, fitting))
    if min(len(set(each.tolist())) for each in (own[half], own[~half])) < 2:
        raise UsageError(
            f"a probe needs examples of two classes to fit with and two to judge by; of {len(own)} examples, half "
            "has fewer: give more, in random order"
        )
    dead = {name: layer.dead() for name, layer in layers.items()}
    return Hidden(features, dead, own, guessed, half, classes, at is not None)


class _Layer:
    """What has gone into a module so far."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.low = self.high = torch.empty(0)

    def see(self, features: Tensor, at: Tensor | None, kept: Tensor) -> None:
        """At once, and as a copy: the module may change it in place."""
        self.rows.append(pooled(features, at).to("cpu", torch.float32, copy=True)[kept])
        units = features.movedim(1, -1) if features.dim() == 4 else features  # of maps the channels
        units = units.reshape(-1, units.shape[-1])
        low, high = units.amin(0), units.amax(0)
        if len(self.rows) == 1:
            self.low, self.high = low, high
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def dead(self) -> float:
        """The share of units that moved by less than a millionth of the layer's largest number."""
        largest = torch.maximum(self.low.abs(), self.high.abs()).max()
        return float((self.high - self.low <= 1e-6 * largest).float().mean())


def _see(layers: Mapping[str, _Layer], at: Tensor | None, kept: Tensor, name: str, features: Tensor) -> None:
    layers[name].see(features, at, kept)


def places(model: nn.Module, sample: Tensor) -> list[str]:
    """The modules to look in front of: one between any two computations with weights, in the order of a pass.

    Where another way leads around a module, as inside a residual connection, its input is not all that the network
    knows there, and it is none of them. Frozen weights count as well.

    Args:
        sample: [n, ...] inputs for a forward pass in evaluation mode.
    """
    before = [(param, param.requires_grad) for param in model.parameters() if param.is_floating_point()]
    try:
        for param, _ in before:
            param.requires_grad_()
        found = survey(model, sample)
        if shared := _shared(found.end):
            with _each_use_its_own(model, shared):
                found = survey(model, sample)
        return [place.name for place in sensible(model, found)]
    finally:
        for param, required in before:
            param.requires_grad_(required)


@contextmanager
def _each_use_its_own(model: nn.Module, shared: Sequence[nn.Parameter]) -> Iterator[None]:
    """In the block, gradients see each use of a shared parameter as that of another one. As one they would lead around
    everything that lies between its uses."""
    known = {id(param) for param in shared}
    for param in shared:
        param.requires_grad_(False)
    users = [m for m in model.modules() if any(id(param) in known for param in m.parameters(recurse=False))]
    handles = [module.register_forward_hook(_with_something_to_train) for module in users]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_something_to_train(module: nn.Module, args: Any, output: Any) -> Any:
    if not (isinstance(output, Tensor) and output.is_floating_point()):
        return output
    return output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)


def _shared(end: Node) -> list[nn.Parameter]:
    """Parameters that a forward pass uses more than once."""
    uses, seen, waiting = Counter[Node](), {end}, [end]
    while waiting:
        for following, _ in waiting.pop().next_functions:
            if following is not None and hasattr(following, "variable"):
                uses[following] += 1
            elif following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return [node.variable for node, times in uses.items() if times > 1]  # type: ignore[attr-defined]


@contextmanager
def watched(model: nn.Module, names: Sequence[str], arrive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """In the block, a forward pass calls `arrive` with the features that go into each named module, as it comes by.

    Raises:
        UsageError: a name that the model does not have; in a pass, a module that takes no features or that it comes
            by twice.
    """
    modules = {name: module_named(model, name) for name in names}
    times = Counter[str]()

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        features = next((each for each in given if isinstance(each, Tensor) and each.is_floating_point()), None)
        times[name] += 1
        if features is None or times[name] > 1:
            why = "no features go into it" if features is None else "it is called several times in one forward pass"
            raise UsageError(f"one cannot look in front of {name}: {why}")
        arrive(name, features)

    handles = [modules[name].register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name in names]
    try:
        yield
        if missed := [name for name in names if not times[name]]:
            raise UsageError(f"one cannot look in front of {missed[0]}: the forward pass does not call it")
    finally:
        for handle in handles:
            handle.remove()


def _drawn(loader: Iterable[Any], examples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random examples of all of `loader`, enough of them, in batches as large as its largest."""
    draw, size, number = torch.Generator().manual_seed(0), 1, count()
    kept: list[tuple[float, int, Tensor, Tensor]] = []  # a heap: of the numbers drawn so far, the largest ones
    for given in loader:
        inputs, targets = pair(given)
        at = _positions(targets)
        wanted, size = -(-examples // (1 if at is None else len(at))), max(size, len(inputs))
        for luck, x, y in zip(torch.rand(len(inputs), generator=draw).tolist(), inputs, targets, strict=True):
            if len(kept) < wanted:
                heappush(kept, (luck, next(number), x.clone(), y.clone()))
            elif luck > kept[0][0]:
                heapreplace(kept, (luck, next(number), x.clone(), y.clone()))
    kept.sort()
    for start in range(0, len(kept), size):
        _, _, xs, ys = zip(*kept[start : start + size], strict=True)
        yield torch.stack(xs), torch.stack(ys)


def pair(given: Any) -> tuple[Tensor, Tensor]:
    """The inputs and targets of what a loader gives."""
    inputs, targets = given[:2] if isinstance(given, (tuple, list)) else (given.inputs, given.targets)
    if len(inputs) != len(targets):
        raise UsageError(f"inputs and targets must count the same examples, got {len(inputs)} and {len(targets)}")
    return inputs, targets


def module_named(model: nn.Module, name: str) -> nn.Module:
    """The part of the model that has this name.

    Raises:
        UsageError: there is none.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not name or name not in modules:
        raise UsageError(f"{type(model).__name__} has no module {name!r}{nearest(name, list(filter(None, modules)))}")
    return modules[name]


def pooled(features: Tensor, positions: Tensor | None = None) -> Tensor:
    """[B, ...] features as [B, width]: the mean over tokens, and maps pooled to at most 1,024 numbers.

    Args:
        features: vectors [B, C], tokens [B, T, C] or maps [B, C, H, W]; anything else is flattened.
        positions: [P] indices: of tokens these P, each as an example of its own: [B * P, C].
    """
    if positions is not None:
        if features.dim() != 3 or features.shape[1] <= int(positions.max()):
            raise UsageError(f"features for a target at every position must be [B, T, C], got {list(features.shape)}")
        return features[:, positions.to(features.device)].flatten(0, 1)
    if features.dim() == 3:
        return features.mean(1)
    if features.dim() == 4 and features[0].numel() > _POOLED:
        side = max(1, int((_POOLED / features.shape[1]) ** 0.5))
        features = F.adaptive_avg_pool2d(features, (min(side, features.shape[2]), min(side, features.shape[3])))
    return features.flatten(1)


def _positions(targets: Tensor) -> Tensor | None:
    """Which positions of sequences to look at, evenly spread; None where an example has one target."""
    if targets.dtype != torch.int64 or targets.dim() not in (1, 2):
        raise UsageError(
            "a probe asks which class an example is of: targets must be int64 [B], or [B, T] for texts, got "
            f"{str(targets.dtype).removeprefix('torch.')} {list(targets.shape)}"
        )
    if targets.dim() == 1:
        return None
    return torch.linspace(0, targets.shape[1] - 1, min(_POSITIONS, targets.shape[1])).round().long()
