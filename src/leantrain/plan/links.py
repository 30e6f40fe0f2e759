"""What each exchange of gradients would cost on a network, and below which bandwidth it is faster than plain DDP.

    seconds of a step       8 bytes / bandwidth + hops x latency + work
    break-even bandwidth    8 (bytes of dense - bytes) / (work + (hops - hops of dense) x latency)

Bytes come from each exchange's own formula for the model at hand. Work is measured here and now: the exchange handles
a gradient of a few million numbers in this process, among peers that are imitated, and its seconds are scaled to the
model. Forward and backward pass are left out: they are the same for all, and may hide a part of what is counted here.

Source: Agarwal et al. 2022 (On the Utility of Gradient Compression in Distributed Training Systems, MLSys).
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.exchange import (
    DeepGradientCompression,
    Dense,
    DiLoCo,
    EntropyCoded,
    Exchange,
    HalfPrecision,
    LocalSGD,
    MajorityVote,
    MoNNA,
    PowerSGD,
)
from leantrain.exchange.channel import Echo

EXCHANGES: dict[str, Callable[[], Exchange]] = {
    "Dense": Dense,
    "HalfPrecision": HalfPrecision,
    "PowerSGD": PowerSGD,
    "MajorityVote": MajorityVote,
    "DeepGradientCompression": DeepGradientCompression,
    "EntropyCoded": EntropyCoded,
    "LocalSGD": LocalSGD,
    "DiLoCo": DiLoCo,
    "MoNNA": lambda: MoNNA(byzantine=0),
}
"""With their default settings."""

_UNITS = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "Tbit": 1e12}
_SAMPLE = 2**20
"""Numbers of the gradient that is handled to measure the work."""
_REPEATS = 3
_BUCKET = 25 * 2**20
"""Bytes of gradients that DDP exchanges at once."""


@dataclass(frozen=True)
class OnLink:
    """One exchange on one network, per step and process."""

    exchange: str
    bytes: int
    hops: float
    """Messages that wait for one another."""
    work: float
    """Seconds of one core."""
    seconds: float
    break_even: float | None
    """Bits per second below which it is faster than Dense; None for Dense, inf if it always is, 0 if never."""


def plan_links(params: Sequence[Tensor], world: int, bandwidth: float, latency: float = 0.0) -> list[OnLink]:
    """Every exchange on one network, the fastest first.

    Args:
        params: the model's trained parameters; may be on the meta device or pretended.
        world: number of processes, >= 2.
        bandwidth: of every process's link, in bits per second.
        latency: seconds that a message takes from one process to another.
    """
    if world < 2:
        raise UsageError(f"processes must be 2 or more, because one alone sends nothing, got {world}")
    numbers = sum(param.numel() for param in params)
    buckets = max(1, -(-sum(param.numel() * param.element_size() for param in params) // _BUCKET))
    rows: list[OnLink] = []
    for name, make in EXCHANGES.items():
        work, hops = _work(make(), world)
        sent = make().predicted_bytes(params, world)
        hops, work = (buckets if hops >= 1 else 1) * hops, work * numbers / _SAMPLE
        seconds = 8 * sent / bandwidth + hops * latency + work
        rows.append(OnLink(name, sent, hops, work, seconds, _break_even(sent, hops, work, latency, rows)))
    return sorted(rows, key=lambda row: row.seconds)


def bits_per_second(text: str) -> float:
    """`100Mbit` is 1e8, `1Gbit` 1e9.

    Raises:
        UsageError: no number above 0, or no unit known here.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+?)(?:/s|ps)?", text)
    value = float(found[1]) * _UNITS[found[2]] if found and found[2] in _UNITS else 0.0
    if not value > 0:
        raise UsageError(
            f"bandwidth must be a number above 0 and a unit, such as 100Mbit or 1Gbit, got {text!r} "
            f"(allowed units: {', '.join(_UNITS)})"
        )
    return value


def _break_even(sent: int, hops: float, work: float, latency: float, rows: Sequence[OnLink]) -> float | None:
    if not rows:  # Dense itself
        return None
    saved, lost = rows[0].bytes - sent, work - rows[0].work + (hops - rows[0].hops) * latency
    if saved <= 0:
        return 0.0
    return 8 * saved / lost if lost > 0 else float("inf")


def _work(exchange: Exchange, world: int) -> tuple[float, float]:
    """Seconds of this process for a gradient of _SAMPLE numbers, and hops, per step in the mean.

    Exchanges that meet every some steps are timed at a meeting.
    """
    side = int(_SAMPLE**0.5)
    if type(exchange) in (Dense, HalfPrecision, PowerSGD):  # PyTorch's own: they run in real processes only
        steps = 2 if isinstance(exchange, PowerSGD) else 1
        return _median(_pytorchs(exchange, side)), 2.0 * (world - 1) * steps
    model, echo = nn.Linear(side, side, bias=False), Echo(world)
    attached = exchange.attach(model)
    exchange.channel = echo  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)

    def once() -> None:
        model.weight.grad = torch.randn(side, side, generator=generator) * 1e-3
        with torch.no_grad():
            model.weight.add_(model.weight.grad)
        echo.hops = 0

    def step() -> None:
        exchange.finish_gradients()
        exchange.after_step(last=True)

    period = getattr(exchange, "every", 1)
    seconds = _median(step, before=once)
    del attached
    return seconds / period, echo.hops / period


def _pytorchs(exchange: Exchange, side: int) -> Callable[[], object]:
    """What one of PyTorch's hooks computes for a matrix: for Dense nothing that counts."""
    gradient = torch.randn(side, side)
    if isinstance(exchange, PowerSGD):
        thin = torch.randn(side, exchange.columns)
        return lambda: (gradient + gradient) - (gradient @ thin) @ (gradient.T @ torch.linalg.qr(thin)[0]).T
    if isinstance(exchange, HalfPrecision):
        narrow = getattr(torch, exchange.dtype)
        return lambda: gradient.copy_(gradient.to(narrow).div_(2))
    return lambda: None


def _median(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds of `action`, without the first time."""
    found = []
    for _ in range(_REPEATS + 1):
        before()
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])
