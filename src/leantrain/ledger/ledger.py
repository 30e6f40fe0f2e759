"""What a training run costs: time by phase, FLOPs, peak memory by kind, bytes sent, energy.

    with Ledger(model, optimizer) as ledger:
        for inputs, targets in batches:
            with ledger.phase("forward"):
                loss = cross_entropy(model(inputs), targets)
            with ledger.phase("backward"):
                loss.backward()
            with ledger.phase("update"):
                optimizer.step()
                optimizer.zero_grad()
            ledger.step_done(examples=len(inputs))
    print(ledger)

A ledger watches and never changes what it watches: losses, gradients and weights are bit for bit those of a run without
it. What is costly to watch is watched on sampled steps only: the first two and every `memory_every`-th.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from leantrain.errors import UsageError, nearest
from leantrain.ledger import record, table
from leantrain.ledger.clock import UNCOUNTED, clock_for
from leantrain.ledger.energy import meter_for
from leantrain.ledger.flops import FlopMeter, compiles_its_step, is_compiled
from leantrain.ledger.memory import KINDS, MemoryMeter
from leantrain.ledger.process_memory import peak_for
from leantrain.ledger.samples import StepTimes

OTHER = "other"
_EVENT = "event/"


class Ledger:
    """Measures the training that happens inside its `with` block, and adds up over several blocks.

    Args:
        model: the module being trained; pass the compiled one if it is compiled. Its parameters decide the device.
        optimizer: one optimizer, several, or None; whatever has a `state` like a torch.optim.Optimizer.
        memory_every: steps between samples of memory and FLOPs, after the first two steps.
        activations: whether what autograd saves may be measured. It takes hooks that torch.func, for one, forbids.
        flops: whether FLOPs may be counted. They never are for a compiled model, which would run uncompiled meanwhile.

    Raises:
        UsageError: `model` is not a module, an optimizer has no state, or memory_every is less than 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        memory_every: int = 100,
        activations: bool = True,
        flops: bool = True,
    ) -> None:
        _check(model, memory_every)
        self._model, self._memory_every, self._flops_wanted = model, memory_every, flops
        self._device = _device(model)
        self._clock, self._energy = clock_for(self._device), meter_for(self._device)
        self._total_peak = peak_for(self._device)
        self._optimizers = _optimizers(optimizer)
        self._memory, self._flops = MemoryMeter(model, self._optimizers, activations), FlopMeter()
        self._peaks_before: dict[str, int | None] = {}  # of the earlier part of a resumed run
        self._steps = self._examples = self._tokens = 0
        self._times = StepTimes((*record.PHASES, OTHER))
        self._counters: Counter[str] = Counter()
        self._blocks: Counter[str] = Counter()  # seconds by phase and block, as "backward/3"
        self._phases = {name: _Phase(self, name) for name in record.PHASES}
        self._of_blocks: dict[str, _Phase] = {}
        self._open: list[str] = []  # the phases entered and not left, outermost first
        self._watches: list[ExitStack] = []  # what watches each of them, on a sampled step
        self._active = self._paused = False

    def watch(self, optimizer: Optimizer | Iterable[Optimizer] | None) -> None:
        """Measure the state of these optimizers from now on, instead of those before."""
        self._optimizers = _optimizers(optimizer)
        self._memory.watch(self._optimizers)

    # The four things a training loop calls.

    def __enter__(self) -> Ledger:
        if self._active:
            raise UsageError("this ledger is already recording; `with ledger:` cannot be entered twice at once")
        self._active, self._paused, self._steps_here = True, False, 0
        compiled = is_compiled(self._model) or any(map(compiles_its_step, self._optimizers))
        self._may_follow_operations = self._flops_wanted and not compiled
        self._total_peak.start(already_held=self._memory.held())
        self._previous = record.activate(self)
        self._energy.start()
        self._clock.start()
        self._begin_step()
        return self

    def __exit__(self, *_: object) -> None:
        record.activate(self._previous)
        while self._watches:  # of phases that were entered by hand and never left
            self._watches.pop().close()
        self._open.clear()
        self._energy.stop()
        self._total_peak.sample()
        self._book(wait=True)
        self._active = False

    def phase(self, name: str, block: int | None = None) -> AbstractContextManager[object]:
        """Time the block as part of phase `name` of the current step; of nested phases, the innermost has the time.
        Time of a `block` of layers, counted from 1, is also added up by itself.

        Raises:
            UsageError: `name` is none of data, forward, backward, exchange, update; or the ledger is not recording.
        """
        if name not in self._phases:
            raise UsageError(f"unknown phase {name!r}{nearest(name, record.PHASES)}")
        if block is None:
            return self._phases[name]
        key = f"{name}/{block}"
        if key not in self._of_blocks:
            self._of_blocks[key] = _Phase(self, key)
        return self._of_blocks[key]

    def step_done(self, examples: int = 0, tokens: int = 0) -> None:
        """End a step that trained on `examples` examples with `tokens` tokens; the next one begins here.

        Raises:
            UsageError: the ledger is not recording, a phase or a pause is still open, or a number is negative.
        """
        self._require_recording("step_done()")
        if self._open or self._paused:
            raise UsageError(f"step_done() inside {f'phase {self._open[-1]!r}' if self._open else 'a pause'}")
        if examples < 0 or tokens < 0:
            raise UsageError(f"step_done() needs numbers >= 0, got examples={examples}, tokens={tokens}")
        self._clock.end_step()
        if self._samples_memory:
            self._memory.held()
            self._total_peak.sample()
        self._flops.end_step(examples, tokens)
        self._steps, self._steps_here = self._steps + 1, self._steps_here + 1
        self._examples, self._tokens = self._examples + examples, self._tokens + tokens
        self._book()
        self._energy.poll()
        self._begin_step()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the block out of everything: evaluation, checkpoints. What `record` is told meanwhile is ignored."""
        self._require_recording("pause()")
        if self._open:
            raise UsageError(f"pause() inside phase {self._open[-1]!r}")
        if self._paused:
            yield
            return
        self._paused = True
        self._clock.switch(UNCOUNTED)
        self._energy.stop()
        self._total_peak.pause()
        try:
            yield
        finally:
            self._total_peak.resume()
            self._energy.start()
            self._clock.switch(OTHER)
            self._paused = False

    def add(self, name: str, amount: float) -> None:
        """Add to the run's counter `name`; the rooms call this through `leantrain.ledger.record`."""
        if not self._paused:
            self._counters[name] += amount  # type: ignore[assignment]  # amounts may be fractional

    # What it cost.

    def summary(self) -> dict[str, Any]:
        """The costs so far as JSON-able values; docs/ledger.md says what each figure is and is not.

        Raises:
            UsageError: no step has been recorded.
        """
        self._settle()
        if self._steps == 0:
            raise UsageError("nothing recorded yet: call ledger.step_done() at the end of each step")
        return {
            "steps": self._steps,
            "step_seconds": self._times.of_steps(),
            "phase_seconds": self._times.of_phases(),
            "block_seconds": self._block_seconds(),
            "peak_bytes": self._peak_bytes(),
            "flops": {"per_step": self._flops.per_step(), "total": self._flops.total()},
            "bytes_sent": round(self._counters["bytes_sent"]),
            "examples": self._examples,
            "tokens": self._tokens,
            "energy_joules": self._energy.joules,
            "energy_source": self._energy.source,
            "events": {k.removeprefix(_EVENT): n for k, n in self._counters.items() if k != "bytes_sent"},
            "device": self._device.type,
        }

    def flops_by_phase(self) -> dict[str, int] | None:
        """FLOPs of a typical step, by phase; None if they were not counted."""
        return self._flops.by_phase()

    def __str__(self) -> str:
        return table.render(self.summary(), self.flops_by_phase()) if self._steps else "Ledger: no step recorded yet"

    def state_dict(self) -> dict[str, Any]:
        """Everything counted so far, JSON-able, so that a resumed run goes on counting."""
        self._settle()
        return {
            "steps": self._steps,
            "examples": self._examples,
            "tokens": self._tokens,
            "times": self._times.state_dict(),
            "peaks": self._peaks(),
            "counters": dict(self._counters),
            "blocks": dict(self._blocks),
            "flops": self._flops.state_dict(),
            "energy": self._energy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave: counters add up, peaks are the larger ones."""
        self._steps, self._examples, self._tokens = state["steps"], state["examples"], state["tokens"]
        self._times.load_state_dict(state["times"])
        self._peaks_before = dict(state["peaks"])
        self._counters, self._blocks = Counter(state["counters"]), Counter(state["blocks"])
        self._flops.load_state_dict(state["flops"])
        self._energy.load_state_dict(state["energy"])

    # How it is done.

    def _begin_step(self) -> None:
        self._samples_memory = self._steps_here < 2 or self._steps % self._memory_every == 0
        self._counts_flops = self._may_follow_operations and (self._samples_memory or self._flops.wants_next)
        self._flops.begin_step()
        self._clock.switch(OTHER)

    def _enter_phase(self, name: str) -> None:
        self._require_recording(f"phase({name!r})")
        around, phase = self._open[-1] if self._open else "", name.partition("/")[0]
        self._open.append(name)
        if self._paused:
            return
        if self._samples_memory or self._counts_flops:
            self._clock.switch(UNCOUNTED)
            watched = around.partition("/")[0] == phase  # a block's part of a phase that is being watched as a whole
            self._watches.append(ExitStack() if watched else self._watch(phase))
        self._clock.switch(name)

    def _leave_phase(self, *error: Any) -> None:
        self._open.pop()
        if self._paused:
            return
        if self._watches:
            self._clock.switch(UNCOUNTED)
            self._watches.pop().__exit__(*error)
            if self._samples_memory:
                self._memory.observe()
                self._total_peak.sample()
        self._clock.switch(self._open[-1] if self._open else OTHER)

    def _watch(self, phase: str) -> ExitStack:
        with ExitStack() as stack:
            if self._counts_flops:
                stack.enter_context(self._flops.counting(phase))
            if self._samples_memory:
                stack.enter_context(self._memory.watching(phase, self._may_follow_operations))
            return stack.pop_all()

    def _settle(self) -> None:
        """Bring every meter up to date, waiting for the device."""
        if self._active and not self._paused:
            self._energy.update()
            self._total_peak.sample()
        self._book(wait=True)

    def _book(self, wait: bool = False) -> None:
        for seconds in self._clock.finished(wait):
            phases: Counter[str] = Counter()
            for key, spent in seconds.items():
                phases[key.partition("/")[0]] += spent  # type: ignore[assignment]  # seconds are fractional
                if "/" in key:
                    self._blocks[key] += spent  # type: ignore[assignment]
            self._times.add(dict(phases))

    def _block_seconds(self) -> dict[str, dict[str, float]]:
        """Seconds of every block by phase, the mean over all steps; empty where nothing was told of blocks."""
        found: dict[str, dict[str, float]] = {}
        for key in sorted(self._blocks, key=lambda key: int(key.partition("/")[2])):
            phase, _, block = key.partition("/")
            found.setdefault(block, {})[phase] = self._blocks[key] / self._steps
        return found

    def _peaks(self) -> dict[str, int | None]:
        here = {**self._memory.peaks, "together": self._memory.together, "total": self._total_peak.read()}
        return {kind: _larger(value, self._peaks_before.get(kind)) for kind, value in here.items()}

    def _peak_bytes(self) -> dict[str, int | None]:
        peaks = self._peaks()
        total, together = peaks["total"], peaks["together"]
        other = None if total is None or together is None else max(0, total - together)
        return {**{kind: peaks[kind] for kind in KINDS}, "other": other, "total": total}

    def _require_recording(self, call: str) -> None:
        if not self._active:
            raise UsageError(f"{call} outside of `with ledger:`; a ledger records only inside its block")


class _Phase:
    """What `ledger.phase(name)` returns; made once per phase, since it is entered on every step."""

    __slots__ = ("_ledger", "_name")

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger, self._name = ledger, name

    def __enter__(self) -> None:
        self._ledger._enter_phase(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ledger._leave_phase(kind, error, trace)
        if isinstance(error, RuntimeError) and "support saved tensor hooks" in str(error):
            raise UsageError(
                "the model uses torch.func, which forbids the hooks that measure activations; "
                "use Ledger(model, optimizer, activations=False)"
            ) from error


def _check(model: object, memory_every: int) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if memory_every < 1:
        raise UsageError(f"memory_every must be >= 1 step, got memory_every={memory_every}")


def _optimizers(given: Any) -> list[Optimizer]:
    optimizers = [] if given is None else [given] if hasattr(given, "state") else list(given)
    for optimizer in optimizers:
        if not hasattr(optimizer, "state"):
            got = type(optimizer).__name__
            raise UsageError(f"optimizer must be a torch.optim.Optimizer, several or None, got {got}")
    return optimizers


def _device(model: nn.Module) -> torch.device:
    """Where the model computes, as far as measuring goes: its first CUDA device, else the CPU."""
    devices = (tensor.device for tensor in (*model.parameters(), *model.buffers()))
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


def _larger(a: int | None, b: int | None) -> int | None:
    known = [value for value in (a, b) if value is not None]
    return max(known, default=None)
