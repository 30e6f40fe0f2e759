"""Where to divide a model into partitions, and how many times larger a batch each of them can then take.

    kept(i, j)    bytes of the input of layers i to j and of what autograd keeps of them and of the head and loss behind
                  them, each storage once
    divide        contiguous groups of which the largest kept (or seconds, or parameters) is as small as can be
    factors m_k   doubled, all together and then one after another, as long as at every moment
                      m_k kept_k of the partition at work + all that waits <= budget * what backpropagation holds

Bytes are those that grow with the batch: the difference of two passes, the second one with twice the examples. Costs
these two forward passes, with a head at every place where the model can be cut, and for the times six more, all on a
few examples. Precision is that of the parameters.

The division is the linear partition problem; memory as what is to be balanced between locally trained modules follows
Karkar et al. 2023 (NeurIPS, arXiv 2309.17357), as does a least number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leantrain.balance import seconds_between
from leantrain.cutting import Place, Survey, sensible, survey
from leantrain.errors import UsageError, nearest
from leantrain.learn.heads import Head
from leantrain.learn.local_losses import Kind, LocalLoss, make_local_loss
from leantrain.learn.losses import Loss, Objective, objective
from leantrain.outputs import logits_of

Aim = Literal["memory", "time", "parameters"]


@dataclass(frozen=True)
class Partition:
    """What one partition takes. All bytes are those of one example."""

    begins: str
    """The module before whose input it begins; "" for the model's own input."""
    layers: int
    """Places at which it could be divided further, and one."""
    kept: int
    """Bytes of its input and of what autograd keeps of it, its head and its loss; without the model's own inputs."""
    features: int
    """Bytes of its input; 0 for the first, whose input is the model's."""
    beside: int
    """Bytes of what goes with it: the targets and, before the first or if they are whole numbers, the inputs."""
    parameters: int
    """Numbers to train, without the head's."""
    seconds: float
    """Of its forward pass, without the head's, on the examples that were looked at."""

    @property
    def waiting(self) -> int:
        """Bytes in its queue."""
        return self.features + self.beside


@dataclass(frozen=True)
class PartitionPlan:
    """A division of a model into partitions. All bytes are those of one example."""

    partitions: tuple[Partition, ...]
    whole: int
    """Bytes that backpropagation holds: what autograd keeps, the inputs and the targets."""

    @property
    def names(self) -> list[str]:
        """The modules before whose inputs to cut: `cut` of the learners in blocks."""
        return [each.begins for each in self.partitions[1:]]

    def batch_factors(self, budget: float = 1.0) -> list[int]:
        """How many times larger than the loop's each partition's batch can be.

        Args:
            budget: what partitions may hold at any moment, as a part of what backpropagation does; above 0.

        Returns:
            A power of 2 for each partition; all 1 where even that does not fit.

        Raises:
            UsageError: `budget` is not above 0.
        """
        if not budget > 0:
            raise UsageError(f"budget must be above 0, got {budget!r}")
        factors = [1] * len(self.partitions)
        while True:
            # All of them first: what one makes more of than the next one takes would wait.
            order = sorted(range(len(factors)), key=lambda index: (factors[index], index))
            choices = [[2 * factor for factor in factors]]
            choices += [[factor * (1 + (n == index)) for n, factor in enumerate(factors)] for index in order]
            fitting = (choice for choice in choices if self.held(choice) <= budget * self.whole)
            if (found := next(fitting, None)) is None:
                return factors
            factors = found

    def held(self, factors: Sequence[int]) -> int:
        """The most that is ever held with these factors, in bytes for every example of the loop's batch: by the
        partition at work and in the queues."""
        waiting, most = [0] * len(factors), 0
        for _ in range(2 * math.lcm(*factors)):
            coming = 1
            for index, (factor, own) in enumerate(zip(factors, self.partitions, strict=True)):
                waiting[index] += coming
                coming = factor if waiting[index] >= factor else 0
                waiting[index] -= coming
                queued = sum(
                    n * (each.features + each.beside) for n, each in zip(waiting, self.partitions, strict=True)
                )
                most = max(most, coming * (own.kept + own.beside) + queued)
        return most

    def with_inputs(self) -> PartitionPlan:
        """The same where the model's inputs wait before every partition."""
        beside = self.partitions[0].beside
        return replace(self, partitions=tuple(replace(each, beside=beside) for each in self.partitions))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'begins before':24} layers  bytes kept  waiting  parameters  seconds forward"]
        lines += [
            f"{each.begins or 'the input':24} {each.layers:6}  {each.kept:10}  {each.waiting:7}  "
            f"{each.parameters:10}  {each.seconds:.2g}"
            for each in self.partitions
        ]
        return "\n".join([*lines, f"bytes of one example; backpropagation holds {self.whole}"])


def plan_partitions(
    model: nn.Module, loss: Loss, *, sample: Tensor, cut: Sequence[str] | None = None, blocks: int | None = None,
    plan: Aim = "memory", floor: int = 1, head: Head = "linear", local: Kind = "prediction",
) -> PartitionPlan:  # fmt: skip
    """Measure `model` on `sample` and divide it. Its weights, buffers, modes and random state stay as they are.

    Args:
        model: any module that `leantrain.cutting.Cut` can cut.
        loss: as of the learner.
        sample: [n, ...] inputs, n >= 2.
        cut: names of modules before which to cut: nothing is chosen, only measured.
        blocks: instead of `cut`, how many partitions to make.
        plan: what of the dearest partition is to be small then: what autograd keeps ("memory"), forward "time", or
            "parameters".
        floor: fewest layers in a partition, >= 1; a layer is what lies between two places at which one can cut.
        head, local: as of the learner; see `leantrain.learn.Blocks`.

    Raises:
        UsageError: both or neither of `cut` and `blocks`; an unknown `plan`; a place at which the model cannot be cut;
            more partitions of `floor` layers than there are layers.
    """
    if (cut is None) == (blocks is None):
        raise UsageError(f"give cut=[names of modules] or blocks=number, one of the two; got {cut=}, {blocks=}")
    if plan not in get_args(Aim):
        raise UsageError(f"plan {plan!r} is unknown{nearest(str(plan), get_args(Aim))}")
    found = survey(model, sample)
    clean = {place.name: place for place in found.clean}
    if cut is None:
        places = sensible(model, found)
    elif unknown := [name for name in cut if name not in clean]:
        raise UsageError(f"cut: {type(model).__name__} cannot be cut before {unknown[0]}{nearest(unknown[0], clean)}")
    else:
        places = [place for place in found.places if place.name in cut]
    layers = _Layers(model, loss, sample, found, places, head, local)
    if cut is None:
        assert blocks is not None
        if floor < 1 or not 1 <= blocks <= len(layers) // floor:
            raise UsageError(
                f"blocks must be 1 to {len(layers) // max(1, floor)} and floor >= 1: {type(model).__name__} has "
                f"{len(layers)} layers between which it can be cut; got blocks={blocks}, floor={floor}"
            )
        begins = divide(partial(layers.cost, plan), len(layers), blocks, floor)
    else:
        begins = list(range(1, len(layers)))
    edges = [0, *begins, len(layers)]
    partitions = tuple(layers.partition(start, end) for start, end in pairwise(edges))
    return PartitionPlan(partitions, layers.kept(0, len(layers)) + layers.beside[0])


def divide(cost: Callable[[int, int], float], layers: int, groups: int, floor: int = 1) -> list[int]:
    """Where to divide layers into contiguous groups, so that the dearest is as cheap as can be.

    Args:
        cost: of the layers from a first one up to, not including, a last one: what they cost as one group, >= 0.
        layers: how many there are.
        groups: how many groups to make, 1 to layers / floor.
        floor: fewest layers of a group, >= 1.

    Returns:
        [groups - 1] rising indices of the layers with which the second and later groups begin. Of several divisions
        with an equally cheap dearest group, one with the least sum of squared costs.
    """
    worst = (float("inf"), float("inf"), 0)
    # best[end]: (dearest, sum of squares) of the layers before `end` in so many groups, and where the last one begins.
    best = {0: (0.0, 0.0, 0)}
    begun = []
    for group in range(1, groups + 1):
        left = (groups - group) * floor
        following = {}
        for end in range(group * floor, layers - left + 1):
            following[end] = worst
            for start in range((group - 1) * floor, end - floor + 1):
                dearest, squares, _ = best.get(start, worst)
                own = cost(start, end)
                following[end] = min(following[end], (max(dearest, own), squares + own * own, start))
        best = following
        begun.append({end: start for end, (_, _, start) in best.items()})
    found, end = [], layers
    for starts in reversed(begun[1:]):
        end = starts[end]
        found.append(end)
    return found[::-1]


class _Layers:
    """What lies between neighbouring places, measured; a group of layers is given by its first and behind its last."""

    def __init__(
        self, model: nn.Module, loss: Loss, sample: Tensor, found: Survey, places: Sequence[Place], head: Head,
        local: Kind,
    ) -> None:  # fmt: skip
        self._names = [place.name for place in places]
        self._examples = len(sample)
        self._parameters = [sum(param.numel() for param in params) for params in found.parameters(places)]
        self._seconds = seconds_between(model, sample, self._names)
        targets = _made_up_targets(loss, found.output)
        self._features = [0, *(_bytes(place.features) for place in places)]
        later = _bytes(targets) if sample.is_floating_point() else _bytes(targets) + _bytes(sample)
        self.beside = [(_bytes(sample) + _bytes(targets)) // len(sample), *[later // len(sample)] * len(places)]
        self._kept = [[0] * (len(self) - start) for start in range(len(self))]
        for times, sign in ((1, -1), (2, 1)):
            inputs, wanted = (torch.cat([each] * times) for each in (sample, targets))
            saved = _saved_by_layer(model, loss, inputs, wanted, found, places, head, local)
            for start in range(len(self)):
                kept = _kept_from(start, *saved)
                self._kept[start] = [
                    sum(both) for both in zip(self._kept[start], (sign * n for n in kept), strict=True)
                ]

    def __len__(self) -> int:
        return len(self._names) + 1

    def cost(self, plan: Aim, start: int, end: int) -> float:
        if plan == "memory":
            return self.kept(start, end)
        return sum((self._seconds if plan == "time" else self._parameters)[start:end])

    def kept(self, start: int, end: int) -> int:
        """Bytes an example."""
        return self._kept[start][end - start - 1] // self._examples

    def partition(self, start: int, end: int) -> Partition:
        return Partition(
            begins=self._names[start - 1] if start else "",
            layers=end - start,
            kept=self.kept(start, end),
            features=self._features[start] // self._examples,
            beside=self.beside[start],
            parameters=sum(self._parameters[start:end]),
            seconds=sum(self._seconds[start:end]),
        )


_Sizes = dict[int, int]
"""Bytes of storages, by a key of each."""


@torch.random.fork_rng()
def _saved_by_layer(
    model: nn.Module, loss: Loss, sample: Tensor, targets: Tensor, found: Survey, places: Sequence[Place], head: Head,
    local: Kind,
) -> tuple[list[_Sizes], list[_Sizes], list[_Sizes]]:  # fmt: skip
    """Of every layer its input, what autograd saves of it, and what of a head and a loss behind it, in one pass as of
    training. The first one's input is the model's and is left out."""
    judged = Objective(_keeps_like_cross_entropy, sums=lambda *_: {}) if callable(loss) else objective(loss)
    saved: list[_Sizes] = [{} for _ in range(len(places) + 1)]
    behind: list[_Sizes] = [{} for _ in saved]
    inputs: list[_Sizes] = [{}]
    into, alive = [saved[0]], list[Tensor]()  # a storage that is alive keeps its key to itself
    fixed = {_key(tensor) for tensor in (sample, *model.parameters(), *model.buffers())}
    heads: dict[torch.Size, LocalLoss] = {}

    def keep(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # an output leads to the node that saves it: a circle
        if tensor.layout is torch.strided and (key := _key(tensor)) not in fixed:
            into[0][key] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    def arrived(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(
            each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.is_floating_point()
        )
        if given.shape not in heads:
            features = places[number].features
            heads[given.shape] = made = make_local_loss(
                local, head, features, found.output, model, judged, inputs=sample
            )
            fixed.update(_key(tensor) for tensor in (*made.parameters(), *made.buffers()))
        alive.append(given.detach())
        inputs.append({_key(given): given.untyped_storage().nbytes()})
        into[:] = [behind[number]]
        heads[given.shape](given, targets, sample, given.detach())
        into[:] = [saved[number + 1]]

    buffers = [buffer.clone() for buffer in model.buffers()]
    modules = dict(model.named_modules())
    handles = [
        modules[place.name].register_forward_pre_hook(partial(arrived, number), with_kwargs=True)
        for number, place in enumerate(places)
    ]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = logits_of(model(sample))
            into[:] = [behind[-1]]
            judged.mean(output, targets)
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
    return inputs, saved, behind


def _kept_from(start: int, inputs: Sequence[_Sizes], saved: Sequence[_Sizes], behind: Sequence[_Sizes]) -> list[int]:
    """Bytes of the layers from `start` on, up to every later end."""
    together = inputs[start]
    found = []
    for own, head in zip(saved[start:], behind[start:], strict=True):
        together = together | own
        found.append(sum((together | head).values()))
    return found


def _made_up_targets(loss: Loss, output: Tensor) -> Tensor:
    """Targets of the kind that goes with such an output (logits); of a loss of one's own, classes."""
    if loss == "regression":
        return torch.zeros_like(output)
    return torch.zeros(output.shape[:-1], dtype=torch.int64, device=output.device)


def _keeps_like_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """In place of somebody's own loss, of which nobody knows what targets it takes."""
    return outputs.float().log_softmax(-1).mean()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
