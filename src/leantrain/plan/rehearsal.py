"""One training step, rehearsed with pretended tensors: what it would hold at its worst moment, by kind, exactly.

The model, the learner and the optimizer are the real ones. Only the numbers are missing, so that a step of a 7B model
takes seconds and no memory. A pass (forward and backward) is rehearsed once for all optimizers, and an optimizer's step
once per shape of parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from leantrain.data import Batch
from leantrain.learn.activation_checkpointing import checkpointed
from leantrain.ledger import record
from leantrain.ledger.activations import Activations
from leantrain.ledger.flops import FlopMeter
from leantrain.ledger.storages import reachable_tensors, storage_bytes, storage_keys
from leantrain.optim import Chain
from leantrain.optim.codes import large_chunks
from leantrain.optim.in_backward import InBackward, step_in_backward
from leantrain.plan.live import EARNEST, Live, new_pretence, pretending
from leantrain.plan.subject import Subject

_STEPPED_ALONE = 1 << 16
"""Numbers in a parameter from which a `Chain` steps it by itself, so that one of each shape tells about all."""
_LARGE = 1 << 22
"""Numbers in a parameter from which moments are coded in as large chunks as on a GPU, also for a CPU."""

Make = Callable[[nn.Module], Sequence[Optimizer]]
"""Builds the optimizers of a model."""


@dataclass(frozen=True)
class Moment:
    """What is held at one moment of a step, in bytes. The optimizer's state comes on top."""

    parameters: int = 0
    """Parameters and buffers."""
    gradients: int = 0
    activations: int = 0
    """Saved by autograd for the backward pass."""
    temporary: int = 0
    """The batch, results on their way, workspace."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.activations + self.temporary

    def with_workspace(self, size: int) -> Moment:
        """The same moment while an optimizer works in `size` bytes."""
        return replace(self, temporary=self.temporary + size)


@dataclass
class Pass:
    """Forward and backward."""

    parameters: int
    gradients: int
    """Of all parameters together."""
    largest_gradient: int
    activations: int
    """The most that was saved for the backward pass."""
    worst: Moment = field(default_factory=Moment)
    """With gradients kept until the end."""
    worst_if_freed: Moment = field(default_factory=Moment)
    """With every gradient freed as soon as it is complete."""
    end: Moment = field(default_factory=Moment)
    arrivals: list[tuple[nn.Parameter, Moment]] = field(default_factory=list)
    """When each parameter's gradient is complete, with this one gradient and no other: where a step in backward
    would be."""
    flops: int = 0
    moved: int = 0


@dataclass(frozen=True)
class Step:
    """The optimizer's step on all parameters."""

    state: int
    """Bytes of the optimizers' state."""
    tables: int
    """Bytes of what they keep beside it, for all parameters together."""
    workspace: int
    """The most that it holds for itself while it runs, gradients kept until the end."""
    flops: float
    """Of a typical step, its share of the refreshes included."""
    moved: float


@dataclass(frozen=True)
class StepInBackward:
    """The step of each parameter inside the backward pass."""

    first: int
    """Bytes that the first steps of all hold at most, what they leave behind included: there is no state before."""
    workspaces: dict[nn.Parameter, int]
    """Bytes that a parameter's later steps hold for themselves, beside its gradient and the state."""


class Rehearsal:
    """A subject's model in one number format, of pretended tensors.

    Args:
        subject: what is trained.
        dtype: format of the weights; None leaves it to the model.
        device: "cpu" or "cuda", whose operations are to be chosen.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype | None, device: str = "cpu") -> None:
        self.subject, self.device = subject, device
        self._pretence = new_pretence()
        self._live = Live(device, on_growth=self._grown)
        self._note: Callable[[], None] = lambda: None
        with self._pretending():
            with torch.device(device):
                self.model = subject.build_model()
            if dtype is not None:
                _convert(self.model, dtype)
            batch = subject.batch()
            self._batch = Batch(
                *(torch.empty(t.shape, dtype=t.dtype, device=device) for t in (batch.inputs, batch.targets, batch.ids))
            )

    def forward_and_backward(self, checkpoint: bool = False) -> Pass:
        """Rehearse a pass as the learner makes it; with `checkpoint`, repeated blocks keep only their inputs."""
        with self._pretending(), checkpointed(self.model) if checkpoint else nullcontext():
            return self._forward_and_backward()

    def step(self, make: Make, refresh: int | None = None) -> Step:
        """Rehearse the step of the optimizers that `make` builds for the model.

        Args:
            make: builds them.
            refresh: steps between two computations of what the first step computes; None: it computes nothing extra.
        """
        with self._stepping() as live:
            return self._step(make(self.model), live, refresh)

    def step_in_backward(self, make: Make, one: Pass) -> StepInBackward:
        """Rehearse `leantrain.optim.step_in_backward` on the parameters in the order in which `one` completes them."""
        with self._stepping() as live:
            before = live.bytes
            optimizer = self._in_backward(make)
            teams = _by_kind(optimizer.param_groups, [param for param, _ in one.arrivals])
            # This makes tables, too, which the second optimizer finds.
            first = max(self._arrive(optimizer, team, live) + live.bytes - before for team in teams)
            optimizer.remove()
            optimizer = self._in_backward(make)
            workspaces: dict[nn.Parameter, int] = {}
            for team in teams:
                workspace = max(self._arrive(optimizer, team, live) for _ in range(2))
                workspaces |= dict.fromkeys(team.stands_for, workspace)
            optimizer.remove()
            return StepInBackward(first, workspaces)

    def clipping(self) -> int:
        """Bytes that clipping by the norm of the whole gradient holds for itself."""
        with self._stepping() as live:
            params = self._with_gradients(self._trained())
            grads, before = [param.grad for param in params if param.grad is not None], live.bytes
            live.peak = before
            clip_grads_with_norm_(params, 1.0, get_total_norm(grads))
            self._without_gradients()
            return live.peak - before

    @contextmanager
    def _stepping(self) -> Iterator[Live]:
        live = Live(self.device, EARNEST)
        with pretending(self._pretence, live), _chunks_for(self.model):
            yield live

    def _pretending(self) -> AbstractContextManager[None]:
        return pretending(self._pretence, self._live)

    def _grown(self) -> None:
        self._note()

    def _trained(self) -> list[nn.Parameter]:
        return [param for param in self.model.parameters() if param.requires_grad]

    # The pass.

    def _forward_and_backward(self) -> Pass:
        subject, live, trained = self.subject, self._live, self._trained()
        kept = [*self.model.parameters(), *self.model.buffers()]
        sizes = [_bytes(param) for param in trained]
        held = storage_bytes(kept)
        found = Pass(held, sum(sizes), max(sizes), 0)
        saved, complete = Activations(), 0

        def moment(gradients: int) -> Moment:
            # Freed gradients are those that are complete and not counted.
            freed = complete - gradients
            rest = live.bytes - freed - held - gradients - saved.live
            return Moment(held, gradients, saved.live, rest)

        def note() -> None:
            found.worst = max(found.worst, moment(complete), key=lambda m: m.total)
            found.worst_if_freed = max(found.worst_if_freed, moment(0), key=lambda m: m.total)

        def arrived(param: nn.Parameter) -> None:
            nonlocal complete
            if len(found.arrivals) < len(trained):  # in the second micro-batch gradients are already there
                complete += _bytes(param)
                found.arrivals.append((param, moment(_bytes(param))))

        flops = FlopMeter()
        recorder = _Recorder(saved, storage_keys(chain(kept, (self._batch.inputs, self._batch.targets))), flops)
        handles = [param.register_post_accumulate_grad_hook(arrived) for param in trained]
        moved, self._note = live.moved, note
        previous = record.activate(recorder)
        try:
            learner = subject.build_learner(self.model, self._batch.inputs)
            for _ in range(min(subject.accumulate, 2)):
                result = learner.step(self._batch, weight=1 / subject.accumulate)
            found.end = moment(complete)
            del result
        finally:
            record.activate(previous)
            self._note = lambda: None
            for handle in handles:
                handle.remove()
            self._without_gradients()
        flops.end_step(1, 0)
        passes = min(subject.accumulate, 2)
        found.activations = saved.peak or 0
        found.flops = (flops.per_step() or 0) * subject.accumulate // passes
        found.moved = (live.moved - moved) * subject.accumulate // passes
        return found

    # The step.

    def _step(self, optimizers: Sequence[Optimizer], live: Live, refresh: int | None) -> Step:
        before = live.bytes
        teams = _teams(optimizers, self._trained())
        shares = [(self._team_step(optimizers, team.steps, live, refresh), team.times) for team in teams]
        held = storage_bytes(reachable_tensors([optimizer.state for optimizer in optimizers]))
        return Step(
            state=sum(step.state * times for step, times in shares),
            tables=max(0, live.bytes - before - held),
            workspace=max(step.workspace for step, _ in shares),
            flops=sum(step.flops * times for step, times in shares),
            moved=sum(step.moved * times for step, times in shares),
        )

    def _team_step(
        self, optimizers: Sequence[Optimizer], params: list[nn.Parameter], live: Live, refresh: int | None
    ) -> Step:
        """Two steps of these parameters: the first makes the state and what is renewed at a refresh."""
        workspace, flops, moved = 0, [], []
        for _ in range(2):
            self._with_gradients(params)
            live.peak, live.moved, live.flops = live.bytes, 0, 0
            for optimizer in optimizers:
                optimizer.step()
            flops.append(live.flops)
            moved.append(live.moved)
            workspace = max(workspace, live.peak - live.bytes)
            self._without_gradients()
        states = [optimizer.state[p] for optimizer in optimizers for p in params if p in optimizer.state]
        held = storage_bytes(reachable_tensors(states))
        return Step(held, 0, workspace, _typical(flops, refresh), _typical(moved, refresh))

    def _in_backward(self, make: Make) -> InBackward:
        (optimizer,) = make(self.model)
        return step_in_backward(self.model, optimizer, max_norm=self.subject.clip)

    def _arrive(self, optimizer: InBackward, team: _Team, live: Live) -> int:
        """A gradient arrives and is stepped; the most that was held beside it and what is there afterwards."""
        live.peak = live.bytes
        _Loss.apply(team.steps[0]).backward()
        optimizer.step()
        return live.peak - live.bytes - _bytes(team.steps[0])

    def _with_gradients(self, params: list[nn.Parameter]) -> list[nn.Parameter]:
        for param in params:
            param.grad = torch.empty_like(param)
        return params

    def _without_gradients(self) -> None:
        for param in self.model.parameters():
            param.grad = None


@dataclass(frozen=True)
class _Team:
    """Parameters that are stepped together, and those whose steps are each like theirs."""

    steps: list[nn.Parameter]
    stands_for: list[nn.Parameter]

    @property
    def times(self) -> int:
        return len(self.stands_for) // len(self.steps)


def _teams(optimizers: Sequence[Optimizer], trained: list[nn.Parameter]) -> list[_Team]:
    """Who has to be stepped to know the steps of all."""
    if not all(isinstance(optimizer, Chain) for optimizer in optimizers):
        return [_Team(trained, trained)]  # others may hold something for all parameters at once
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    small = [param for param in trained if param.numel() < _STEPPED_ALONE]
    teams = _by_kind(groups, [param for param in trained if param.numel() >= _STEPPED_ALONE])
    return [*teams, _Team(small, small)] if small else teams


def _by_kind(groups: Sequence[dict[str, Any]], params: list[nn.Parameter]) -> list[_Team]:
    """One of every shape, type and group, for all of its kind."""
    place = {id(param): number for number, group in enumerate(groups) for param in group["params"]}
    alike: dict[tuple[torch.Size, torch.dtype, int | None], list[nn.Parameter]] = {}
    for param in params:
        alike.setdefault((param.shape, param.dtype, place.get(id(param))), []).append(param)
    # The last of its kind: staggered refreshes reach it last, so that its second step is an ordinary one.
    return [_Team([members[-1]], members) for members in alike.values()]


def _chunks_for(model: nn.Module) -> AbstractContextManager[None]:
    """Where parameters are large, moments are coded in large chunks.

    The chunks are all alike, and a CPU's are so small that rehearsing a 7B model's would take minutes. What is thereby
    predicted too much is tens of megabytes, where parameters have gigabytes.
    """
    large = any(param.numel() >= _LARGE for param in model.parameters())
    return large_chunks() if large else nullcontext()


def _typical(first_and_second: list[int], refresh: int | None) -> float:
    first, second = first_and_second
    return second + (first - second) / refresh if refresh else second


class _Loss(torch.autograd.Function):
    """A loss that depends on one parameter, whose gradient comes out of nothing."""

    @staticmethod
    def forward(ctx: Any, param: Tensor) -> Tensor:
        ctx.save_for_backward(param)
        return param.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class _Recorder:
    """What the learner tells of its phases: where autograd saves, and FLOPs."""

    def __init__(self, saved: Activations, existing: set[int], flops: FlopMeter) -> None:
        self._saved, self._existing, self._flops = saved, existing, flops

    @contextmanager
    def phase(self, name: str, block: int | None = None) -> Iterator[None]:
        forward = name == "forward"
        watching = self._saved.recording(self._existing, follow_operations=False) if forward else nullcontext()
        with self._flops.counting(name), watching:
            yield

    def add(self, name: str, amount: float) -> None:
        """Counters of a run are no concern of a rehearsal."""


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """`model.to(dtype)`, which cannot exchange pretended parameters for others in place."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param.is_floating_point():
                made.setdefault(param, nn.Parameter(param.detach().to(dtype), param.requires_grad))
                module._parameters[name] = made[param]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = made.setdefault(buffer, buffer.to(dtype))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
