"""Bytes and seconds of every exchange between four hosts, and the bandwidth below which each one saves seconds.

    python -m benchmarks.exchange.break_even             all of it: a quarter of an hour, as root
    python -m benchmarks.exchange.break_even MajorityVote DGC    some rows, beside Dense

Hosts are network namespaces of this machine (`benchmarks.netlab`), each with one process that trains a LLaMA of 1.5 M
parameters by leantrain's own loop, and with links of four rates. Bytes are those that the kernel counted on the hosts'
interfaces, without the headers of its packets and without what the loop itself sends in every step, which a run that
exchanges nothing shows. They stand beside what the exchange says it sent, which is what the ledger books.

    step(B) = T + 8 bytes / B                            T: at an unlimited rate, codec included
    B*      = 8 (bytes_dense - bytes) / (T - T_dense)    the bandwidth at which both take as long
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.netlab import Lab, Unavailable, here
from benchmarks.result import write_result

import torch  # isort: skip  # after netlab, which quietens it
import torch.distributed as dist
from torch import nn

from leantrain.exchange.dense import Stations
from leantrain.journal import Journal
from leantrain.processes import World
from leantrain.recipe import Component, Recipe, build_data, build_model
from leantrain.train import Run

HOSTS = 4
RATES = ("unlimited", "1gbit", "100mbit", "10mbit")
DELAYED = ("100mbit", 10.0)
SECONDS, MOST, TURNS = 3.0, 16, 3
"""A cell of the table takes about so long, in at most so many steps; at the unlimited rate all take so many turns."""
NOTHING, DENSE = "nothing", "Dense"

SGD = Component("torch.optim.SGD", {"lr": 0.01})
ADAMW = Component("leantrain.optim.AdamW", {"lr": 0.001})
MODEL = Component("leantrain.nn.Llama", {"hidden": 128, "mlp_hidden": 344, "heads": 4, "layers": 7})
DATA = Component("leantrain.data.Text", {"context": 16, "max_bytes": 200_000})


@dataclass(frozen=True)
class Case:
    """An exchange, an optimizer that it accepts, and the steps from one exchange to the next."""

    exchange: Component
    optim: Component = SGD
    every: int = 1
    warm: int = 2
    """Steps before the first that counts: in the second DDP has arranged its buckets for good."""


def _of(name: str, **arguments: Any) -> Component:
    return Component(name if "." in name else f"leantrain.exchange.{name}", arguments)


CASES: dict[str, Case] = {
    NOTHING: Case(_of("benchmarks.exchange.break_even.Nothing")),
    DENSE: Case(_of("Dense")),
    "bf16 hook": Case(_of("HalfPrecision", dtype="bfloat16")),
    "fp16 hook": Case(_of("HalfPrecision", dtype="float16")),
    "PowerSGD, rank 4": Case(_of("PowerSGD", rank=4, start=2), warm=3),
    "Projected, rank 32": Case(_of("Projected"), Component("leantrain.optim.GaLoreAdamW", {"lr": 0.001, "rank": 32})),
    "MajorityVote, sharded": Case(_of("MajorityVote", route="sharded")),
    "MajorityVote, gather": Case(_of("MajorityVote", route="gather")),
    "DGC, 0.1 %": Case(_of("DeepGradientCompression", keep=0.001)),
    "DGC, 0.1 %, gaps": Case(_of("DeepGradientCompression", keep=0.001, indices="gaps")),
    "LocalSGD, every 8": Case(_of("LocalSGD", every=8), ADAMW, every=8),
    "EntropyCoded, every 8": Case(_of("EntropyCoded", every=8), ADAMW, every=8),
    "DiLoCo, every 40": Case(_of("DiLoCo", every=40), ADAMW, every=40),
    "MoNNA, f = 1": Case(_of("MoNNA", byzantine=1)),
}


class Nothing(Stations):
    """Every process for itself: what is left is the loop's own traffic."""

    def attach(self, model: nn.Module) -> nn.Module:
        return model

    def gradient_sync(self, model: nn.Module, enabled: bool) -> Any:
        return nullcontext()

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        return 0

    def predicted_bytes(self, params: Any, world: int) -> int:
        return 0


@dataclass(frozen=True)
class Measured:
    """Of one exchange at one rate: seconds and bytes of a step, the latter as the kernel and as the exchange has it."""

    seconds: float
    payload: float
    """Bytes that the interface of a host sent per step, without headers: the mean over the hosts."""
    interface: float
    """The same with headers."""
    said: float
    steps: int


def measure(case: Case, lab: Lab, steps: int, model: Component = MODEL) -> Measured:
    """Train `steps` steps and look at the counters before and after."""
    with TemporaryDirectory() as folder:
        described = recipe(case, case.warm + steps + 1, model)
        found = lab.workers(_train, described, case.warm, steps, folder)
    seconds = [max(turn) for turn in zip(*(each["seconds"] for each in found), strict=True)]
    return Measured(
        seconds=statistics.median(seconds) if case.every == 1 else statistics.mean(seconds),
        payload=statistics.mean(each["payload"] for each in found) / steps,
        interface=statistics.mean(each["interface"] for each in found) / steps,
        said=statistics.mean(each["said"] for each in found) / steps,
        steps=steps,
    )


def recipe(case: Case, steps: int, model: Component = MODEL) -> Recipe:
    """Two windows of text per host and step: little to compute beside what there is to send."""
    return Recipe(
        name="break-even", model=model, data=DATA, optim=case.optim, exchange=case.exchange, steps=steps,
        batch_size=2 * HOSTS, clip=None, schedule="constant", warmup=0.0, trackers=[], device="cpu",
    )  # fmt: skip


def _train(rank: int, recipe: Recipe, warm: int, steps: int, folder: str) -> dict[str, Any]:
    """On each host."""
    world = World(rank, HOSTS, torch.device("cpu"))
    run = Run(recipe, world, Journal(Path(folder), lambda event: None, writes=False))
    for _ in range(warm):
        run.step(lambda: False)
    before, said, seconds = _settled(), 0, []
    for _ in range(steps):
        started = time.perf_counter()
        run.step(lambda: False)
        seconds.append(time.perf_counter() - started)
        said += run.exchange.bytes_sent_per_step(run.attached, HOSTS)
    sent = _settled() - before
    return {"seconds": seconds, "payload": sent.payload(), "interface": sent.tx_bytes, "said": said}


def _settled() -> Any:
    """The counter when all hosts are here and everything sent has been acknowledged."""
    dist.barrier()
    time.sleep(0.25)
    found = here()
    time.sleep(0.25)  # nobody goes on before all have looked
    return found


def enough_steps(case: Case, unlimited: Measured | None, bits: float | None) -> int:
    """Steps that take SECONDS at a rate, judged by what was seen at an unlimited one; whole periods, at least one."""
    if unlimited is None:
        return -(-MOST // case.every) * case.every
    one = unlimited.seconds + (8 * unlimited.payload / bits if bits else 0)
    return case.every * max(1, min(round(SECONDS / one), MOST) // case.every)


def in_turns(cases: Mapping[str, Case]) -> dict[str, Measured]:
    """Everything at the unlimited rate, several times in turn: on differences of these seconds the break-even rests."""
    turns: dict[str, list[Measured]] = {name: [] for name in cases}
    for _ in range(TURNS):
        for name, case in cases.items():
            with Lab(HOSTS) as lab:
                turns[name].append(measure(case, lab, enough_steps(case, None, None)))
    return {
        name: replace(seen[0], seconds=statistics.median(each.seconds for each in seen)) for name, seen in turns.items()
    }


def main(wanted: Sequence[str]) -> None:
    cases = {name: case for name, case in CASES.items() if not wanted or name in (NOTHING, DENSE) or name in wanted}
    prepare()
    found = {name: {RATES[0]: measured} for name, measured in in_turns(cases).items()}
    for rate, delay_ms in (*((rate, 0.0) for rate in RATES[1:]), DELAYED):
        label = f"{rate}, {delay_ms:g} ms" if delay_ms else rate
        for name, case in cases.items():
            with Lab(HOSTS, rate, delay_ms) as lab:
                steps = enough_steps(case, found[name][RATES[0]], lab.bits)
                found[name][label] = measure(case, lab, steps)
            print(f"{label:15} {name:25} {found[name][label]}", file=sys.stderr, flush=True)
    write_result(
        "exchange/break_even",
        title=f"{HOSTS} hosts, Llama of {parameters(MODEL) / 1e6:.2f} M parameters: bytes, seconds, break-even",
        columns=["exchange", "kB per step, kernel", "kB per step, said", "kernel / said", "x fewer than Dense",
                 *(f"ms at {label}" for label in found[DENSE]), "break-even, Mbit/s", "agrees with the seconds"],
        rows=[row(name, found) for name in cases if name != NOTHING],
        notes=notes(found),
    )  # fmt: skip


def prepare() -> None:
    """Make the tokens, before there are several processes to make them."""
    build_data(recipe(CASES[DENSE], 1))


def parameters(model: Component) -> int:
    """How many the model has that are trained."""
    with torch.device("meta"):
        built = build_model(recipe(CASES[DENSE], 1, model), build_data(recipe(CASES[DENSE], 1)))
    return sum(param.numel() for param in built.parameters() if param.requires_grad)


def row(name: str, found: dict[str, dict[str, Measured]]) -> list[Any]:
    own, dense = found[name], found[DENSE]
    sent, said = payload(name, found), own[RATES[0]].said
    bandwidth = break_even(name, found)
    return [
        name,
        f"{sent / 1e3:.1f}",
        f"{said / 1e3:.1f}",
        f"{sent / said:.3f}",
        f"{payload(DENSE, found) / sent:.1f}",
        *(f"{1e3 * measured.seconds:.0f}" for measured in own.values()),
        "" if name == DENSE else _bandwidth(bandwidth),
        "" if name == DENSE else _agreement(bandwidth, own, dense),
    ]


def payload(name: str, found: dict[str, dict[str, Measured]]) -> float:
    """Bytes per step that the exchange alone sent, by the kernel, at an unlimited rate."""
    return found[name][RATES[0]].payload - found[NOTHING][RATES[0]].payload


def break_even(name: str, found: dict[str, dict[str, Measured]]) -> float:
    """Bits per second below which a step takes less time than Dense's; infinite if it does at an unlimited rate."""
    fewer = payload(DENSE, found) - payload(name, found)
    longer = found[name][RATES[0]].seconds - found[DENSE][RATES[0]].seconds
    if fewer <= 0:
        return 0.0
    return 8 * fewer / longer if longer > 0 else float("inf")


def _bandwidth(bits: float) -> str:
    if bits == 0:
        return "none: it sends more"
    return "any here" if bits == float("inf") else f"{bits / 1e6:.0f}"


def _agreement(bandwidth: float, own: dict[str, Measured], dense: dict[str, Measured]) -> str:
    """At how many of the limited rates the faster one is the one that the break-even says."""
    limits = {"1gbit": 1e9, "100mbit": 1e8, "10mbit": 1e7}
    right = [(own[rate].seconds < dense[rate].seconds) == (bits < bandwidth) for rate, bits in limits.items()]
    return f"{sum(right)} of {len(right)}"


def notes(found: dict[str, dict[str, Measured]]) -> list[str]:
    idle, steps = found[NOTHING][RATES[0]], found[DENSE]
    return [
        "One process and one thread per host; all hosts share the machine's cores. Seconds: median over steps, of the "
        "slowest host; where not every step exchanges, the mean over whole periods. "
        f"Steps measured, Dense: {', '.join(f'{measured.steps} at {rate}' for rate, measured in steps.items())}. "
        "kB: payload sent by each host per step, mean over hosts and steps, headers apart, less the "
        f"{idle.payload / 1e3:.1f} kB with which the loop's processes agree in every step (a step that exchanges "
        f"nothing takes {1e3 * idle.seconds:.0f} ms). With headers Dense's interface sends "
        f"{steps['100mbit'].interface / steps['100mbit'].payload - 1:.1%} more at 100 Mbit/s. Break-even: "
        "8 (bytes_dense - bytes) / (T - T_dense), T at the unlimited rate; `any here` means faster than Dense even "
        "there. It is checked at 10 Mbit/s, 100 Mbit/s and 1 Gbit/s.",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(sys.argv[1:])
    except Unavailable as reason:
        print(f"skipped: {reason}", file=sys.stderr)
