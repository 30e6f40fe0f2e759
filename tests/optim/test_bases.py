"""Bases are orthonormal, own their memory, and hold as much of the gradient as they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.optim import SVD, SubspaceIteration

sizes = st.integers(2, 12)


def stack(k: int, m: int, n: int, decay: float = 0.6, seed: int = 0) -> torch.Tensor:
    """Gradients whose singular values fall by `decay` each, as gradients' do."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(k, m, min(m, n), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(k, n, min(m, n), generator=generator, dtype=torch.float64)).Q
    return left * decay ** torch.arange(min(m, n), dtype=torch.float64) @ right.mT


def energy(grad: torch.Tensor, basis: torch.Tensor, right: bool) -> torch.Tensor:
    projected = grad @ basis if right else basis.mT @ grad
    return projected.square().sum((-2, -1)) / grad.square().sum((-2, -1))


@pytest.mark.parametrize("method", [SVD(), SubspaceIteration()], ids=["svd", "subspace"])
@given(k=st.integers(1, 3), m=sizes, n=sizes, rank=st.integers(1, 11), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_columns_are_orthonormal_and_own_their_memory(
    method: SVD | SubspaceIteration, k: int, m: int, n: int, rank: int, seed: int
) -> None:
    right, rank = m >= n, min(rank, m, n)
    grad = torch.randn(k, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = method.fit(grad, torch.empty(0), True, rank, right)
    assert basis.shape == (k, min(m, n), rank)
    assert basis.untyped_storage().nbytes() == basis.numel() * 8
    torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64).expand(k, -1, -1))


@pytest.mark.parametrize(("m", "n"), [(20, 12), (12, 20), (12, 12)])
def test_svd_leaves_exactly_the_discarded_singular_values(m: int, n: int) -> None:
    grad, rank = stack(2, m, n), 4
    basis = SVD().fit(grad, torch.empty(0), True, rank, m >= n)
    back = grad @ basis @ basis.mT if m >= n else basis @ basis.mT @ grad
    lost = (grad - back).square().sum((-2, -1))
    expected = torch.linalg.svdvals(grad)[:, rank:].square().sum(-1)
    torch.testing.assert_close(lost, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 40)])
def test_following_a_drifting_gradient_subspace_iteration_keeps_up_with_svd(m: int, n: int) -> None:
    method, basis, right = SubspaceIteration(), torch.empty(0), m >= n
    start, drift = stack(1, m, n, 0.8, seed=1), stack(1, m, n, 0.8, seed=2)
    for step in range(6):
        grad = start + 0.1 * step * drift
        basis = method.fit(grad, basis, step == 0, 6, right)
    best = SVD().fit(grad, torch.empty(0), True, 6, right)
    assert (energy(grad, basis, right) >= 0.97 * energy(grad, best, right)).all()


def test_more_first_steps_come_closer_to_the_svd() -> None:
    grad = stack(1, 40, 24, 0.9)
    captured = [
        energy(grad, SubspaceIteration(first=first).fit(grad, torch.empty(0), True, 6, True), True).item()
        for first in (1, 2, 8)
    ]
    assert captured[0] < captured[1] < captured[2] <= energy(grad, SVD().fit(grad, grad, True, 6, True), True).item()


def test_a_seed_gives_one_start_and_another_seed_another() -> None:
    grad = stack(1, 10, 8)
    first, same, other = (SubspaceIteration(seed=s).fit(grad, torch.empty(0), True, 3, True) for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
