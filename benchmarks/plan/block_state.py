"""Optimizer state of one block of a 7B LLaMA in bf16: predicted, and measured after a real step.

    python -m benchmarks.plan.block_state

The whole model does not fit everywhere; its blocks are all alike, and one fits anywhere. Gradients are random numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.result import write_result
from leantrain.optim import AdamW, AdamW8bit, GaLoreAdamW, QGaLoreAdamW, predicted_state_bytes, state_bytes

RANK = 1024
SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]

Params = list[nn.Parameter]
METHODS: dict[str, Callable[[Params], torch.optim.Optimizer]] = {
    "AdamW": AdamW,
    "AdamW8bit": AdamW8bit,
    "GaLore": lambda p: GaLoreAdamW(p, rank=RANK, basis="subspace"),
    "GaLore, 8-bit moments": lambda p: GaLoreAdamW(p, rank=RANK, basis="subspace", state_bits=8),
    "GaLore, 8-bit moments and bases": lambda p: GaLoreAdamW(
        p, rank=RANK, basis="subspace", state_bits=8, basis_bits=8
    ),
    "Q-GaLore": lambda p: QGaLoreAdamW(p, rank=RANK, basis="subspace"),
}


def main() -> None:
    torch.set_num_threads(1)
    found = {name: predicted_and_measured(make) for name, make in METHODS.items()}
    base = found["AdamW"][1]
    write_result(
        "plan/block_state",
        title=f"Optimizer state of a 7B LLaMA's block in bf16, rank {RANK}",
        columns=["optimizer", "predicted MB", "measured MB", "saved against AdamW"],
        rows=[
            [name, f"{predicted / 1e6:.3f}", f"{measured / 1e6:.3f}", f"{100 * (1 - measured / base):.1f} %"]
            for name, (predicted, measured) in found.items()
        ],
        notes=[
            f"Predicted and measured are equal to the byte: {all(a == b for a, b in found.values())}. A whole model "
            "has embeddings and a head besides, which are not projected: see the table of whole models."
        ],
    )


def predicted_and_measured(make: Callable[[Params], torch.optim.Optimizer]) -> tuple[int, int]:
    """Bytes of state, from shapes alone and after a step."""
    predicted = predicted_state_bytes(make(block("meta")))
    params = block("cpu")
    optimizer = make(params)
    for param in params:  # one at a time, so that one gradient is there at a time
        param.grad = torch.randn(param.shape, dtype=torch.bfloat16)
        optimizer.step()
        param.grad = None
    return predicted, state_bytes(optimizer)


def block(device: str) -> Params:
    return [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device)) for shape in SHAPES]


if __name__ == "__main__":
    main()
