"""Rows spread over processes: every process finds the whole matrix's basis from its own rows and a few sums."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from leantrain.optim.bases import (
    BASES,
    DCT,
    SVD,
    Basis,
    RandomizedSVD,
    SubspaceIteration,
)
from leantrain.optim.rules import State

ALL = {**BASES, "dct-l2": DCT("l2"), "rsvd-power": RandomizedSVD(power=1), "subspace-3": SubspaceIteration(first=3)}
each_basis = pytest.mark.parametrize("basis", ALL.values(), ids=ALL.keys())
each_split = pytest.mark.parametrize("rows", [[20, 10], [7, 16, 7], [9, 0, 11, 10]], ids=str)
SIZE, RANK = 14, 5


class Reducer:
    """Sums over threads that stand for processes, and counts the numbers that each of them sends."""

    def __init__(self, processes: int) -> None:
        self.parts: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(processes, timeout=20)
        self.numbers = 0

    def of(self, process: int) -> Callable[[Tensor], Tensor]:
        def total(part: Tensor) -> Tensor:
            self.parts[process] = part
            self.barrier.wait()
            result = sum(self.parts[p] for p in sorted(self.parts))
            if process == 0:
                self.numbers += part.numel()
            self.barrier.wait()
            assert isinstance(result, Tensor)
            return result

        return total


def spread(basis: Basis, grad: Tensor, rows: list[int], stored: State, fresh: bool) -> tuple[list[State], int]:
    """What each process stores, and how many numbers it sent."""
    reducer = Reducer(len(rows))

    def fit(process: int) -> State:
        part = grad.split(rows, dim=1)[process]
        return basis.fit(part, stored, fresh, RANK, True, reducer.of(process))

    with ThreadPoolExecutor(len(rows)) as pool:
        return list(pool.map(fit, range(len(rows)))), reducer.numbers


def gradients(dtype: torch.dtype, decay: float = 0.7, k: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(k, 30, SIZE, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(k, SIZE, SIZE, generator=generator, dtype=torch.float64)).Q
    return (left * decay ** torch.arange(SIZE) @ right.mT).to(dtype)


def empty(basis: Basis, grad: Tensor) -> State:
    return {name: torch.stack([value] * len(grad)) for name, value in basis.init(SIZE, RANK, grad).items()}


def subspace(basis: Basis, stored: State, grad: Tensor) -> Tensor:
    """The projector on the directions: signs and order of singular vectors mean nothing."""
    directions = basis.directions(stored, SIZE, RANK, grad)
    return directions @ directions.mT


@each_basis
@each_split
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["f64", "f32"])
def test_all_find_the_whole_matrixs_basis(basis: Basis, rows: list[int], dtype: torch.dtype, tolerance: float) -> None:
    grad = gradients(dtype)
    alone, together, fresh = empty(basis, grad), empty(basis, grad), True
    for turn in range(3):  # the second and third fit start from a basis
        now = grad + 0.1 * turn * grad.flip(1)
        alone = basis.fit(now, alone, fresh, RANK, True)
        found, _ = spread(basis, now, rows, together, fresh)
        for other in found[1:]:
            assert all(torch.equal(other[name], value) for name, value in found[0].items())
        together, fresh = found[0], False
        assert {name: (v.shape, v.dtype) for name, v in together.items()} == {
            name: (v.shape, v.dtype) for name, v in alone.items()
        }
        torch.testing.assert_close(subspace(basis, together, now), subspace(basis, alone, now), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("basis", "numbers"),
    [
        (SubspaceIteration(), SIZE * RANK),
        (SVD(), SIZE * SIZE),
        (RandomizedSVD(5), (RANK + 5) * SIZE + (RANK + 5) ** 2),
        (RandomizedSVD(5, power=1), 2 * (RANK + 5) * SIZE + 2 * (RANK + 5) ** 2),
        (DCT(), SIZE),
        (BASES["coordinate"], SIZE),
        (BASES["random"], 0),
        (BASES["identity"], 0),
    ],
    ids=str,
)
def test_what_travels_is_what_the_docstring_says(basis: Basis, numbers: int) -> None:
    grad = gradients(torch.float32, k=1)
    assert spread(basis, grad, [14, 16], empty(basis, grad), True)[1] == numbers


@pytest.mark.parametrize("basis", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("kind", ["zero", "rank two"])
def test_spread_gradients_with_too_few_directions_still_give_orthonormal_ones(basis: Basis, kind: str) -> None:
    grad = torch.zeros(2, 30, SIZE)
    if kind == "rank two":
        grad[:, 3], grad[:, 25, ::2] = 1.0, 2.0
    found, _ = spread(basis, grad, [15, 15], empty(basis, grad), True)
    directions = basis.directions(found[0], SIZE, RANK, grad)
    torch.testing.assert_close(directions.mT @ directions, torch.eye(RANK).expand(2, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("basis", ALL.values(), ids=ALL.keys())
def test_one_process_s_bad_rows_are_noticed_by_all(basis: Basis) -> None:
    grad = gradients(torch.float32, k=1)
    grad[0, 29, 0] = torch.nan  # in the last process's rows
    seen = []
    reducer = Reducer(2)

    def fit(process: int) -> None:
        try:
            part = grad.split(15, dim=1)[process]
            stored = basis.fit(part, empty(basis, grad), True, RANK, True, reducer.of(process))
            seen.append(all(bool(torch.isfinite(value).all()) for value in stored.values()))
        except torch.linalg.LinAlgError:
            seen.append("failed")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fit, range(2)))
    blind = basis in (BASES["random"], BASES["identity"])
    assert seen[0] == seen[1] and (seen[0] is True) == blind
