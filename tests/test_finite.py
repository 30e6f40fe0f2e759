"""A number that is not finite is noticed: on the CPU at once, on CUDA one step later."""

from __future__ import annotations

import math

import pytest
import torch

from leantrain.finite import FiniteGuard

BAD = [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (-math.inf, 0.0)]


@pytest.mark.parametrize(("loss", "norm"), BAD)
def test_on_the_cpu_a_bad_number_is_told_in_its_own_step(loss: float, norm: float) -> None:
    guard = FiniteGuard()
    assert guard.watch(1, torch.tensor(0.5), torch.tensor(3.4e38)) is None
    assert guard.watch(7, torch.tensor(loss), torch.tensor(norm)) == (
        f"at step 7 the loss is {loss:g} and the gradient norm {norm:g}"
    )
    assert guard.settle() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("loss", "norm"), BAD)
def test_on_cuda_a_bad_number_is_told_by_the_next_step_or_before_saving(loss: float, norm: float) -> None:
    def watch(guard: FiniteGuard, step: int, loss: float, norm: float) -> str | None:
        return guard.watch(step, torch.tensor(loss, device="cuda"), torch.tensor(norm, device="cuda"))

    told = f"at step 7 the loss is {loss:g} and the gradient norm {norm:g}"
    guard = FiniteGuard()
    assert watch(guard, 6, 1.0, 1.0) is None
    assert watch(guard, 7, loss, norm) is None
    assert watch(guard, 8, 1.0, 1.0) == told
    assert guard.settle() is None
    assert watch(guard, 7, loss, norm) is None
    assert guard.settle() == told
    assert guard.settle() is None
