"""Predicted state is measured state, to the byte, and both are the formulas of the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from leantrain.optim import AdamW, Chain, GaLoreAdamW, Lion, QGaLoreAdamW, predicted_state_bytes, state_bytes

SHAPES = [(48, 130), (130, 48), (64, 64), (33,), (6, 5, 7)]
RANK = 4


def params(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape, device=device, dtype=dtype)) for shape in SHAPES]


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0)).to(param.dtype)
    optimizer.step()
    return optimizer


def galore_bytes(reverse: bool = False) -> int:
    """R (2 L + S) numbers for a matrix, or with the sides exchanged; two for each of the vector's. All of 4 bytes."""
    total = 0
    for shape in SHAPES:
        if len(shape) == 1:
            total += 2 * shape[0]
            continue
        short, long = sorted((shape[0], math.prod(shape[1:])))
        total += RANK * (2 * short + long if reverse else 2 * long + short)
    return 4 * total


CASES: list[tuple[str, Any, float]] = [
    ("torch AdamW", torch.optim.AdamW, sum(8 * math.prod(s) for s in SHAPES)),
    ("torch amsgrad", lambda p: torch.optim.AdamW(p, amsgrad=True), sum(12 * math.prod(s) for s in SHAPES)),
    ("torch SGD", torch.optim.SGD, 0),
    ("torch momentum", lambda p: torch.optim.SGD(p, momentum=0.9), sum(4 * math.prod(s) for s in SHAPES)),
    ("AdamW", AdamW, sum(8 * math.prod(s) for s in SHAPES)),
    ("Lion", lambda p: Chain(p, Lion()), sum(4 * math.prod(s) for s in SHAPES)),
    ("GaLore", lambda p: GaLoreAdamW(p, rank=RANK), galore_bytes()),
    ("GaLore reverse", lambda p: GaLoreAdamW(p, rank=RANK, side="reverse_std"), galore_bytes(reverse=True)),
]


@pytest.mark.parametrize(("make", "formula"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_prediction_measurement_and_formula_agree(make: Any, formula: float) -> None:
    assert predicted_state_bytes(make(params("meta"))) == formula
    measured = state_bytes(stepped(make(params())))
    # PyTorch counts its steps in tensors of no dimension, which are left out.
    assert measured == formula


@pytest.mark.parametrize(
    "options",
    [
        {"state_bits": 8, "full_precision_below": 0},
        {"state_bits": 4, "full_precision_below": 0},
        {"basis_bits": 8},
        {"basis_bits": 4},
        {"basis": "dct"},
        {"basis": "coordinate", "side": "reverse_std"},
        {"basis": "random"},
        {"state_bits": 8},  # all moments here are below 4,096 numbers: nothing is quantised
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prediction_is_measurement_however_state_is_stored(options: dict[str, Any], dtype: torch.dtype) -> None:
    predicted = predicted_state_bytes(GaLoreAdamW(params("meta", dtype), rank=RANK, **options))
    plain = predicted_state_bytes(GaLoreAdamW(params("meta", dtype), rank=RANK))
    assert predicted == state_bytes(stepped(GaLoreAdamW(params(dtype=dtype), rank=RANK, **options)))
    assert predicted < plain or options == {"state_bits": 8}


def test_q_galore_keeps_a_twelfth_of_adamws_state() -> None:
    """The arithmetic of its docstring: 1 + 4/256 bytes for a moment's number, half a byte and a little for a basis'."""
    weight = torch.nn.Parameter(torch.empty(2048, 512, device="meta"))
    predicted = predicted_state_bytes(QGaLoreAdamW([weight], rank=128))
    moments, basis = 2 * 128 * 2048 * (1 + 4 / 256), 128 * 512 / 2
    assert moments + basis < predicted < moments + 1.1 * basis
    assert predicted / (2 * 4 * weight.numel()) < 0.08


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(ValueError, match="the state of RMSprop cannot be predicted; known are"):
        predicted_state_bytes(torch.optim.RMSprop(params()))


def test_state_of_tensor_subclasses_is_counted_by_what_they_hold() -> None:
    """torchao keeps codes, scales and a table in one tensor of its own class."""
    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    state = torchao.OptimState8bit.zeros((64, 128), True, 256)
    holder = torch.optim.SGD([torch.nn.Parameter(torch.ones(64, 128))])
    holder.state[holder.param_groups[0]["params"][0]]["exp_avg"] = state
    assert state_bytes(holder) == 64 * 128 + 64 * 128 // 256 * 4 + 256 * 4
