"""One optimizer step on four GPT-2-small blocks: AdamW in 32, 8 and 4 bits, ours and the peers', on one thread.

    python -m benchmarks.optim.adamw_low_bit

Every optimizer has its own copy of the same 28.3 M weights and gradients; the optimizers take turns, so that a change
in the machine's speed meets all of them. torchao's compile their step with the machine's C++ compiler and are left out
where that fails. Also checks how far the weights are from those of AdamW in float32 after 20 steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.result import write_result
from leantrain.optim import state_bytes
from leantrain.optim.adamw_low_bit import AdamW4bit, AdamW8bit

WIDTH, BLOCKS = 768, 4
SHAPES = ([(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]) * BLOCKS
TURNS = 15
FUSED, PEER = "torch AdamW, fused, 32 bits", "bitsandbytes AdamW8bit"
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def main() -> None:
    torch.set_num_threads(1)
    makers, missing = candidates()
    optimizers = {name: make(weights(SHAPES)) for name, make in makers.items()}
    first = {}
    for name, optimizer in list(optimizers.items()):
        try:
            first[name] = seconds(optimizer.step)
        except Exception as error:  # a compiler that is not there, or does not know this machine
            missing.append(f"{name} did not run ({type(error).__name__}).")
            del optimizers[name]
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(TURNS):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step))

    numbers = sum(rows * columns for rows, columns in SHAPES)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    rows = []
    for name, optimizer in optimizers.items():
        rows.append([
            name,
            f"{1e9 * median[name] / numbers:.2f}",
            f"{median[name] / median[FUSED]:.1f}",
            f"{median[PEER] / median[name]:.1f}" if PEER in median else "",
            f"{held_bytes(optimizer) / numbers:.4f}",
            f"{100 * distance(makers[name]):.2f} %",
        ])  # fmt: skip
    formula = sum(AdamW8bit.state_bytes(shape) for shape in SHAPES)
    write_result(
        "optim/adamw_low_bit",
        title=f"AdamW with its moments in few bits, four GPT-2-small blocks ({numbers / 1e6:.1f} M)",
        columns=[
            "optimizer", "ns / parameter", "x fused AdamW", "faster than bitsandbytes", "state bytes / parameter",
            "distance from 32 bits",
        ],
        rows=rows,
        notes=[
            f"AdamW8bit's state by its formula: {formula / 1e6:.3f} MB; measured equals it: "
            f"{state_bytes(optimizers['leantrain AdamW8bit']) == formula}.",
            "Distance: of the weights from those of 32 bits after 20 steps, against the way these have gone.",
            *missing,
        ],
    )  # fmt: skip


def candidates() -> tuple[dict[str, Make], list[str]]:
    """What makes each optimizer, and a line for every peer that is not installed."""
    makers: dict[str, Make] = {
        FUSED: lambda params: torch.optim.AdamW(params, weight_decay=0.0, fused=True),
        "leantrain AdamW8bit": AdamW8bit,
        "leantrain AdamW4bit": AdamW4bit,
    }
    missing = []
    try:
        import bitsandbytes

        makers[PEER] = lambda params: bitsandbytes.optim.AdamW8bit(params, weight_decay=0.0)
    except ImportError:
        missing.append("bitsandbytes is not installed.")
    try:
        import torchao.optim

        for name in ("AdamW8bit", "AdamW4bit"):
            peer = getattr(torchao.optim, name)
            makers[f"torchao {name}"] = lambda params, peer=peer: peer(params, weight_decay=0.0)
    except ImportError:
        missing.append("torchao is not installed.")
    return makers, missing


def weights(shapes: Sequence[tuple[int, int]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    return params


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state, also where a tensor is a wrapper around others, as torchao's are."""
    total = 0
    seen: set[int] = set()
    for state in optimizer.state.values():
        for value in state.values():
            if not isinstance(value, torch.Tensor) or not value.ndim:
                continue
            wrapped = [getattr(value, name) for name in getattr(value, "tensor_attrs", ())]
            for part in wrapped or [value]:
                storage = part.untyped_storage()
                total += 0 if storage.data_ptr() in seen else storage.nbytes()
                seen.add(storage.data_ptr())
    return total


def distance(make: Make) -> float:
    """Of the weights from those of float32 AdamW after 20 steps, as a share of the way these have gone."""
    shapes = [(96, 128), (128, 96)]
    start, coded, exact = weights(shapes), weights(shapes), weights(shapes)
    optimizers = (make(coded), torch.optim.AdamW(exact, weight_decay=0.0))
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(coded, exact, strict=True):
            one.grad = torch.randn(one.shape, generator=generator) * 1e-3
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        off = sum((a - b).square().sum() for a, b in zip(coded, exact, strict=True))
        way = sum((a - b).square().sum() for a, b in zip(start, exact, strict=True))
    return float(off / way) ** 0.5


def seconds(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
