"""The AdamW step against PyTorch's fused one, taking turns on the same weights' copies, one thread.

python -m benchmarks.optim.adamw
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.optim.galore_step import seconds, weights
from benchmarks.result import write_result
from leantrain.optim import AdamW, Chain, GaLoreAdamW
from leantrain.optim.adam import Adam

TURNS = 40


def main() -> None:
    torch.set_num_threads(1)
    optimizers = {
        "torch.optim.AdamW, fused": torch.optim.AdamW(weights(), weight_decay=0.0, fused=True),
        "torch.optim.AdamW, default": torch.optim.AdamW(weights(), weight_decay=0.0),
        "leantrain.optim.AdamW": AdamW(weights()),
        "leantrain.optim.GaLoreAdamW without rank": GaLoreAdamW(weights()),
        "leantrain.optim.Chain of Adam()": Chain(weights(), Adam()),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for optimizer in optimizers.values():
        optimizer.step()
    for _ in range(TURNS):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step))
    base = statistics.median(times["torch.optim.AdamW, fused"])
    rows = [[name, f"{1e3 * (m := statistics.median(t)):.1f}", f"{m / base:.2f}"] for name, t in times.items()]
    write_result(
        "optim/adamw",
        title="AdamW step on 28.3 M parameters, one thread",
        columns=["optimizer", "median ms", "x fused AdamW"],
        rows=rows,
        notes=[f"{TURNS} turns of each, interleaved."],
    )


if __name__ == "__main__":
    main()
