"""Random directions: a function of their counter, and fair to every direction on average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leantrain.optim.bases import Random, captured

each_kind = pytest.mark.parametrize("orthonormal", [True, False])


def draw(basis: Random, *counts: int, size: int = 8, rank: int = 3, like: Tensor | None = None) -> Tensor:
    return basis.directions({"draw": torch.tensor(counts)}, size, rank, like)


@each_kind
def test_a_count_always_gives_the_same_directions_and_each_count_others(orthonormal: bool) -> None:
    basis = Random(orthonormal=orthonormal)
    some = draw(basis, 1, 2, 1, 1 + 2**32)
    assert torch.equal(some[0], some[2]) and torch.equal(some[:2], draw(basis, 1, 2))
    # Far apart, as a caller starts the counts of matrices that are to differ.
    assert not torch.equal(some[0], some[1]) and not torch.equal(some[0], some[3])
    assert not torch.equal(draw(basis, 1, rank=4)[..., :3], draw(basis, 1))


@each_kind
def test_every_fit_is_a_new_draw_that_only_counts(orthonormal: bool) -> None:
    basis = Random(orthonormal=orthonormal)
    stored = {name: value.expand(2) for name, value in basis.init(8, 3, torch.empty(0, device="meta")).items()}
    assert stored["draw"].tolist() == [0, 0]
    fits = []
    for _ in range(3):
        stored = basis.fit(torch.zeros(2, 9, 8), stored, not fits, 3, True)
        fits.append(basis.directions(stored, 8, 3))
    assert stored["draw"].tolist() == [3, 3] and stored["draw"].dtype == torch.int64
    assert not torch.equal(fits[0], fits[1]) and not torch.equal(fits[1], fits[2])


@each_kind
def test_directions_come_in_the_dtype_of_the_gradient(orthonormal: bool) -> None:
    basis = Random(orthonormal=orthonormal)
    for dtype in (torch.float64, torch.bfloat16):
        assert draw(basis, 1, like=torch.empty(1, 2, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_orthonormal_draws_are_fair_to_every_direction(rank: int) -> None:
    """The mean of P P^T is (R / S) I, so any gradient keeps a share of R / S of its energy on average."""
    size, number = 6, 4000
    directions = draw(Random(), *range(number), size=size, rank=rank, like=torch.empty(1, dtype=torch.float64))
    mean = (directions @ directions.mT).mean(0)
    torch.testing.assert_close(mean, torch.eye(size, dtype=torch.float64) * rank / size, rtol=0, atol=4 / number**0.5)
    grad = torch.randn(5, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = [captured(grad, one, True) for one in directions[:1000]]
    assert sum(shares) / 1000 == pytest.approx(rank / size, abs=0.03)


def test_gaussian_draws_keep_lengths_on_average() -> None:
    directions = draw(Random(orthonormal=False), *range(300), size=20, rank=5).double()
    assert directions.mean().item() == pytest.approx(0, abs=0.01)
    assert directions.var().item() == pytest.approx(1 / 5, rel=0.03)
    torch.testing.assert_close(
        (directions @ directions.mT).mean(0), torch.eye(20, dtype=torch.float64), rtol=0, atol=0.15
    )
