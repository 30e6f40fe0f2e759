"""The whole ledger in plain training loops: exact figures, no influence, clear refusals."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from leantrain import Ledger
from leantrain.errors import UsageError
from leantrain.ledger import record
from leantrain.ledger.energy import EnergyMeter
from leantrain.nn import Llama

BATCH, IN, WIDE, OUT = 6, 8, 12, 5
FLOAT = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, WIDE), nn.GELU(), nn.Dropout(0.2), nn.BatchNorm1d(WIDE), nn.Linear(WIDE, OUT))


def batch(step: int, size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, IN, generator=generator), torch.randint(0, OUT, (size,), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> torch.Tensor:
    """One step as the rooms write it: it tells `record`, whoever listens."""
    inputs, targets = batch(number)
    with record.phase("forward"):
        loss = cross_entropy(model(inputs), targets)
    with record.phase("backward"):
        loss.backward()
    with record.phase("update"):
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def train(
    ledger: Ledger | None, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range
) -> list[torch.Tensor]:
    torch.manual_seed(1)  # for dropout
    if ledger is None:
        return [step(model, optimizer, number) for number in steps]
    losses = []
    with ledger:
        for number in steps:
            losses.append(step(model, optimizer, number))
            ledger.step_done(examples=BATCH)
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def trained(steps: int = 5, **options: Any) -> Ledger:
    model = network()
    optimizer = adamw(model)
    ledger = Ledger(model, optimizer, **options)
    train(ledger, model, optimizer, range(steps))
    return ledger


def test_a_language_model_trains_bit_for_bit_the_same_too() -> None:
    # Has what a network of Linear layers has not: SiLU, attention, RMSNorm, embeddings, rotary positions.
    outcomes = []
    for use in (False, True):
        torch.manual_seed(0)
        model = Llama(vocab_size=64, context=32, preset="tiny")
        optimizer = adamw(model)
        with Ledger(model, optimizer, memory_every=1) if use else nullcontext():
            for number in range(2):
                tokens = torch.randint(64, (3, 33), generator=torch.Generator().manual_seed(number))
                with record.phase("forward"):
                    loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                with record.phase("backward"):
                    loss.backward()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                with record.phase("update"):
                    optimizer.step()
                    optimizer.zero_grad()
        outcomes.append([loss.detach(), *gradients, *model.parameters()])
    for without, with_ledger in zip(*outcomes, strict=True):
        assert torch.equal(without, with_ledger)


@pytest.mark.parametrize(
    "options", [{}, {"memory_every": 1}, {"memory_every": 3}, {"activations": False}, {"flops": False}], ids=str
)
def test_training_is_bit_for_bit_the_same_with_and_without_a_ledger(options: dict[str, Any]) -> None:
    outcomes = []
    for use in (False, True):
        model = network()
        optimizer = adamw(model)
        ledger = Ledger(model, optimizer, **options) if use else None
        losses = train(ledger, model, optimizer, range(8))
        states = [value for state in optimizer.state.values() for value in state.values()]
        outcomes.append([*losses, *model.state_dict().values(), *states, torch.rand(3)])  # and the generator
    for without, with_ledger in zip(*outcomes, strict=True):
        assert torch.equal(without, with_ledger)


def test_the_summary_has_every_figure_and_goes_through_json() -> None:
    summary = trained().summary()
    assert json.loads(json.dumps(summary)) == summary
    assert set(summary) == {
        "steps", "step_seconds", "phase_seconds", "block_seconds", "peak_bytes", "flops", "bytes_sent", "examples",
        "tokens", "energy_joules", "energy_source", "events", "device",
    }  # fmt: skip
    assert set(summary["step_seconds"]) == {"median", "p99", "max", "total"}
    assert set(summary["phase_seconds"]) == {"data", "forward", "backward", "exchange", "update", "other"}
    assert set(summary["peak_bytes"]) == {
        "parameters", "gradients", "optimizer_state", "activations", "other", "total",
    }  # fmt: skip
    assert (summary["steps"], summary["examples"], summary["tokens"], summary["device"]) == (5, 5 * BATCH, 0, "cpu")


def test_memory_and_flops_of_a_step_are_exact() -> None:
    model = nn.Sequential(nn.Linear(IN, WIDE), nn.ReLU(), nn.Linear(WIDE, OUT))
    optimizer = adamw(model)
    ledger = Ledger(model, optimizer)
    train(ledger, model, optimizer, range(4))
    parameters = (IN + 1) * WIDE + (WIDE + 1) * OUT
    peaks = ledger.summary()["peak_bytes"]
    assert peaks["parameters"] == peaks["gradients"] == parameters * FLOAT
    assert peaks["optimizer_state"] == (2 * parameters + 4) * FLOAT  # two moments; a step counter for each of 4 tensors
    assert peaks["activations"] == (BATCH * WIDE + BATCH * OUT + 1) * FLOAT  # hidden layer, log-probabilities, weight
    first, second = 2 * BATCH * IN * WIDE, 2 * BATCH * WIDE * OUT
    assert ledger.flops_by_phase() == {"forward": first + second, "backward": first + 2 * second, "update": 0}
    assert ledger.summary()["flops"] == {"per_step": 2 * first + 3 * second, "total": 4 * (2 * first + 3 * second)}


class Projected(torch.optim.Optimizer):
    """Descent inside a subspace: two thin matrix products per matrix and step, and one basis made on the first."""

    def __init__(self, params: Any, rank: int) -> None:
        super().__init__(params, {"rank": rank})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if "basis" not in self.state[p]:
                    self.state[p]["basis"] = torch.linalg.qr(p.grad @ p.grad.T)[0][:, : group["rank"]].clone()
                basis = self.state[p]["basis"]
                p.sub_(basis @ (basis.T @ p.grad), alpha=0.1)


def test_projections_inside_an_optimizer_step_count_as_update() -> None:
    model = nn.Linear(IN, OUT, bias=False)
    optimizer = Projected(model.parameters(), rank=2)
    ledger = Ledger(model, optimizer)
    train(ledger, model, optimizer, range(5))
    projections = 2 * (2 * 2 * OUT * IN)
    phases = ledger.flops_by_phase()
    assert phases is not None
    assert phases["update"] == projections
    assert ledger.summary()["peak_bytes"]["optimizer_state"] == OUT * 2 * FLOAT
    product = 2 * BATCH * IN * OUT
    qr = 4 * OUT**3 - 4 * OUT**3 // 3
    basis = 2 * OUT * OUT * IN + qr  # on the first step only, and counted once
    assert ledger.summary()["flops"]["total"] == 5 * (2 * product + projections) + basis


def test_what_may_not_be_watched_is_not_known_and_the_rest_still_is() -> None:
    everything, less = trained().summary(), trained(activations=False, flops=False).summary()
    assert less["peak_bytes"]["activations"] is None
    assert less["flops"] == {"per_step": None, "total": None}
    for kind in ("parameters", "gradients", "optimizer_state"):
        assert less["peak_bytes"][kind] == everything["peak_bytes"][kind] > 0


def test_several_optimizers_count_together() -> None:
    model = network()
    halves = [torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[4].parameters(), momentum=0.9)]
    with Ledger(model, halves) as ledger:
        cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        for optimizer in halves:
            optimizer.step()
        ledger.step_done()
    first, last = (IN + 1) * WIDE, (WIDE + 1) * OUT
    assert ledger.summary()["peak_bytes"]["optimizer_state"] == (2 * first + 2 + last) * FLOAT


def test_time_of_a_block_is_its_own_and_its_phase_s() -> None:
    ledger = Ledger(nn.Linear(2, 2))
    with ledger:
        for _ in range(2):
            with record.phase("forward", 1):
                time.sleep(0.01)
                with record.phase("backward", 2):
                    time.sleep(0.03)
            ledger.step_done()
    again = Ledger(nn.Linear(2, 2))
    again.load_state_dict(ledger.state_dict())
    for each in (ledger, again):
        blocks, phases = each.summary()["block_seconds"], each.summary()["phase_seconds"]
        assert list(blocks) == ["1", "2"]
        assert 0.01 <= blocks["1"]["forward"] < 0.03 <= blocks["2"]["backward"]
        assert phases["forward"] == pytest.approx(blocks["1"]["forward"], rel=0.5)
    assert "block 2" in str(ledger)


def test_time_goes_to_the_phase_it_was_spent_in() -> None:
    with Ledger(nn.Linear(1, 1), activations=False, flops=False) as ledger:
        for _ in range(3):
            with ledger.phase("data"):
                time.sleep(0.01)
            with ledger.phase("backward"):
                time.sleep(0.005)
                with ledger.phase("exchange"):
                    time.sleep(0.03)
                time.sleep(0.005)
            time.sleep(0.003)
            ledger.step_done()
    summary = ledger.summary()
    phases = summary["phase_seconds"]
    # Sleeping takes at least what was asked for; how much more, a busy machine decides.
    assert phases["exchange"] >= 0.03
    assert phases["data"] >= 0.01
    assert phases["backward"] >= 0.01
    assert phases["other"] >= 0.003
    assert phases["forward"] == phases["update"] == 0.0
    assert phases["backward"] < phases["exchange"]
    assert summary["step_seconds"]["total"] >= 3 * 0.053


def test_the_ledgers_own_measuring_is_nobodys_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1, 1)
    ledger = Ledger(model)
    observe = ledger._memory.observe
    monkeypatch.setattr(ledger._memory, "observe", lambda: (time.sleep(0.05), observe())[1])
    with ledger:
        with ledger.phase("forward"):
            model(torch.ones(1, 1))
        ledger.step_done()
    assert ledger.summary()["step_seconds"]["max"] < 0.05


def test_a_pause_counts_nothing() -> None:
    model = network()
    optimizer = adamw(model)
    with Ledger(model, optimizer) as ledger:
        step(model, optimizer, 0)
        with ledger.pause(), ledger.pause():
            time.sleep(0.1)
            record.add("bytes_sent", 1000)
            with record.phase("forward"), torch.no_grad():
                model(torch.randn(1000, IN))
            held = torch.ones(30_000_000)  # 120 MB for a moment
            del held
        record.add("bytes_sent", 7)
        ledger.step_done(examples=BATCH)
    summary = ledger.summary()
    plain = trained(steps=1).summary()
    assert summary["bytes_sent"] == 7
    assert summary["step_seconds"]["total"] < 0.1
    assert summary["flops"] == plain["flops"]
    assert summary["peak_bytes"]["activations"] == plain["peak_bytes"]["activations"]
    assert summary["peak_bytes"]["total"] is None or summary["peak_bytes"]["total"] < 100e6


class FakeEnergy:
    name = "fake"

    def __init__(self) -> None:
        self.joules = 0.0

    def read(self) -> float:
        return self.joules


class FakePeak:
    """A peak that is lost when it is reset, as the real ones are."""

    def __init__(self) -> None:
        self.highest = self.kept = 0

    def start(self, already_held: int) -> None:
        self.highest = 0

    def sample(self) -> None:
        self.kept = max(self.kept, self.highest)

    def pause(self) -> None:
        self.sample()

    def resume(self) -> None:
        self.highest = 0

    def read(self) -> int:
        return self.kept


def test_energy_and_peak_are_those_outside_the_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    energy, peak = FakeEnergy(), FakePeak()
    monkeypatch.setattr("leantrain.ledger.ledger.meter_for", lambda device: EnergyMeter(lambda: energy))
    monkeypatch.setattr("leantrain.ledger.ledger.peak_for", lambda device: peak)
    energy.joules = 1000.0
    with Ledger(nn.Linear(1, 1)) as ledger:
        energy.joules, peak.highest = 1003.0, 700
        with ledger.pause():
            energy.joules, peak.highest = 1050.0, 9000
        energy.joules, peak.highest = 1054.0, 500
        ledger.step_done()
        assert ledger.summary()["energy_joules"] == pytest.approx(7.0)  # also in the middle of a run
        energy.joules = 1056.0
    energy.joules = 2000.0
    summary = ledger.summary()
    assert summary["energy_joules"] == pytest.approx(9.0)
    assert summary["energy_source"] == "fake"
    assert summary["peak_bytes"]["total"] == 700


def test_other_is_the_total_less_what_the_kinds_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = FakePeak()
    monkeypatch.setattr("leantrain.ledger.ledger.peak_for", lambda device: peak)
    model = nn.Linear(IN, OUT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, IN)).sum().backward()
    optimizer.step()
    with Ledger(model, optimizer) as ledger:
        peak.highest = 100_000
        ledger.step_done()
    parameters = (IN + 1) * OUT * FLOAT
    assert ledger.summary()["peak_bytes"]["other"] == 100_000 - 3 * parameters  # parameters, gradients, momentum


def test_long_runs_poll_the_energy_counter_before_it_can_wrap_around(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, polled = Ledger(nn.Linear(1, 1)), []
    monkeypatch.setattr(ledger._energy, "poll", lambda: polled.append(ledger._steps))
    with ledger:
        for _ in range(3):
            ledger.step_done()
    assert polled == [1, 2, 3]


def test_what_the_rooms_add_is_counted_and_events_keep_their_names() -> None:
    with Ledger(nn.Linear(1, 1)) as ledger:
        record.add("bytes_sent", 2.0**40)
        record.add("bytes_sent", 5)
        record.add("examples_skipped", 3)
        record.event("svd_fell_back")
        record.event("svd_fell_back")
        ledger.step_done(examples=2, tokens=64)
    record.event("after the block")
    summary = ledger.summary()
    assert summary["bytes_sent"] == 2**40 + 5
    assert summary["events"] == {"examples_skipped": 3, "svd_fell_back": 2}
    assert (summary["examples"], summary["tokens"]) == (2, 64)


def test_costly_watching_happens_on_the_first_two_and_every_nth_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = adamw(model)
    ledger = Ledger(model, optimizer, memory_every=5)
    watched = []
    watch = ledger._watch
    monkeypatch.setattr(ledger, "_watch", lambda phase: (watched.append((ledger._steps, phase)), watch(phase))[1])
    train(ledger, model, optimizer, range(12))
    assert sorted({number for number, _ in watched}) == [0, 1, 5, 10]


def test_a_step_of_a_new_size_has_the_next_one_counted() -> None:
    model = nn.Linear(IN, OUT)
    sizes = [4, 4, 4, 7, 7, 4]
    with Ledger(model) as ledger:
        for size in sizes:
            with ledger.phase("forward"):
                model(batch(0, size)[0])
            ledger.step_done(examples=size)
    assert ledger.summary()["flops"]["total"] == sum(2 * size * IN * OUT for size in sizes)
    assert [row[:2] for row in ledger.state_dict()["flops"]["counted"]] == [[4, 0], [7, 0]]


def test_a_resumed_run_has_the_figures_of_an_uninterrupted_one() -> None:
    whole = trained(steps=6).summary()
    model = network()
    optimizer = adamw(model)
    first = Ledger(model, optimizer)
    with first:
        record.add("bytes_sent", 10)
    train(first, model, optimizer, range(4))
    second = Ledger(model, optimizer)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with second:
        record.add("bytes_sent", 5)
    train(second, model, optimizer, range(4, 6))
    resumed = second.summary()
    for key in ("steps", "examples", "flops"):
        assert resumed[key] == whole[key]
    assert resumed["bytes_sent"] == 15
    for kind in ("parameters", "gradients", "optimizer_state", "activations"):
        assert resumed["peak_bytes"][kind] == whole["peak_bytes"][kind]
    assert resumed["step_seconds"]["total"] > first.summary()["step_seconds"]["total"]


def test_a_peak_before_the_interruption_is_remembered() -> None:
    state = copy.deepcopy(trained().state_dict())
    state["peaks"].update(activations=10**9, total=10**10)
    ledger = Ledger(network())
    ledger.load_state_dict(state)
    peaks = ledger.summary()["peak_bytes"]
    assert peaks["activations"] == 10**9
    assert peaks["total"] == 10**10


def test_a_step_that_failed_is_dropped_and_the_ledger_can_go_on() -> None:
    model = network()
    optimizer = adamw(model)
    ledger = Ledger(model, optimizer)
    with pytest.raises(ZeroDivisionError), ledger:
        step(model, optimizer, 0)
        ledger.step_done(examples=BATCH)
        with ledger.phase("forward"):
            model(batch(1)[0])
            raise ZeroDivisionError
    train(ledger, model, optimizer, range(1, 3))
    assert ledger.summary()["steps"] == 3
    assert ledger.summary()["flops"] == trained(steps=3).summary()["flops"]


def test_one_ledger_inside_another_takes_over_and_gives_back() -> None:
    with Ledger(nn.Linear(1, 1)) as outer:
        with Ledger(nn.Linear(1, 1)) as inner:
            record.event("inside")
            inner.step_done()
        record.event("outside")
        outer.step_done()
    assert inner.summary()["events"] == {"inside": 1}
    assert outer.summary()["events"] == {"outside": 1}


def test_an_optimizer_that_compiles_its_step_is_left_alone() -> None:
    """torchao's refuses to step while operations are counted."""
    torchao = pytest.importorskip("torchao.optim")
    model = network()
    optimizer = torchao.AdamW8bit(model.parameters(), lr=1e-3)
    batch = torch.randn(4, next(model.parameters()).shape[1])
    with Ledger(model, optimizer, memory_every=1) as ledger:
        model(batch).sum().backward()
        with ledger.phase("update"):
            optimizer.step()
        ledger.step_done(examples=4)
    assert ledger.summary()["flops"] is None or ledger.summary()["flops"]["total"] is None


def test_a_compiled_model_is_never_run_uncompiled_to_count_it() -> None:
    model = torch.compile(network(), backend="eager")
    ledger = Ledger(model)  # type: ignore[arg-type]
    optimizer = adamw(model)  # type: ignore[arg-type]
    train(ledger, model, optimizer, range(2))  # type: ignore[arg-type]
    summary = ledger.summary()
    assert summary["flops"] == {"per_step": None, "total": None}
    assert summary["peak_bytes"]["activations"] > 0
    assert "FLOPs per step       not measured" in str(ledger)


def test_distributed_tensors_count_what_this_process_holds() -> None:
    # Two ranks in one process: a DTensor's arithmetic on sizes needs no partner.
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Linear(4, 10, bias=False)
        shard = DTensor.from_local(torch.zeros(5, 4), mesh, [Shard(0)])
        model.weight = nn.Parameter(shard)
        with Ledger(model) as ledger:
            with ledger.phase("backward"):
                model.weight.to_local().sum().backward()
            ledger.step_done()
    finally:
        torch.distributed.destroy_process_group()
    assert ledger.summary()["peak_bytes"]["parameters"] == 5 * 4 * FLOAT
    assert ledger.summary()["peak_bytes"]["gradients"] == 5 * 4 * FLOAT


def test_models_with_function_transforms_are_told_what_to_do() -> None:
    def loop(ledger: Ledger) -> None:
        with ledger:
            with ledger.phase("forward"):
                torch.func.grad(lambda x: x.sin().sum())(torch.ones(3))
            ledger.step_done()

    with pytest.raises(UsageError, match="activations=False"):
        loop(Ledger(nn.Linear(1, 1)))
    loop(Ledger(nn.Linear(1, 1), activations=False))


def test_print_shows_a_table_and_an_unused_ledger_says_so() -> None:
    assert "saved activations" in str(trained())
    assert str(Ledger(network())) == "Ledger: no step recorded yet"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda ledger: ledger.phase("foward"), r"unknown phase 'foward'; did you mean 'forward'\?"),
        (lambda ledger: ledger.phase("forward").__enter__(), "outside of `with ledger:`"),
        (lambda ledger: ledger.step_done(), "outside of `with ledger:`"),
        (lambda ledger: ledger.pause().__enter__(), "outside of `with ledger:`"),
        (lambda ledger: ledger.summary(), "nothing recorded yet"),
        (lambda ledger: ledger.__enter__().__enter__(), "cannot be entered twice"),
        (lambda ledger: ledger.__enter__().step_done(examples=-1), "examples=-1"),
        (lambda ledger: (ledger.__enter__().phase("update").__enter__(), ledger.step_done()), "inside phase 'update'"),
        (lambda ledger: (ledger.__enter__().phase("data").__enter__(), ledger.pause().__enter__()), "inside phase"),
        (lambda ledger: Ledger("model"), "model must be a torch.nn.Module, got str"),
        (lambda ledger: Ledger(nn.Linear(1, 1), [3]), "optimizer must be a torch.optim.Optimizer"),
        (lambda ledger: Ledger(nn.Linear(1, 1), memory_every=0), "memory_every must be >= 1 step, got memory_every=0"),
    ],
)
def test_misuse_is_named(act: Callable[[Ledger], object], message: str) -> None:
    ledger = Ledger(nn.Linear(1, 1))
    try:
        with pytest.raises(UsageError, match=message):
            act(ledger)
    finally:
        if ledger._active:
            ledger.__exit__()
    assert torch._C._len_torch_dispatch_stack() == 0  # what followed a phase that was left open is gone too
