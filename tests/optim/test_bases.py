"""What every basis promises, and what those promise that follow the gradient's singular vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.optim.bases import (
    BASES,
    DCT,
    SVD,
    Basis,
    Coordinate,
    Random,
    RandomizedSVD,
    SubspaceIteration,
    captured,
)

ALL = {**BASES, "dct-l2": DCT("l2"), "rsvd-power": RandomizedSVD(power=2)}
each_basis = pytest.mark.parametrize("basis", ALL.values(), ids=ALL.keys())
sizes = st.integers(2, 12)


def stack(k: int, m: int, n: int, decay: float = 0.6, seed: int = 0) -> Tensor:
    """Gradients whose singular values fall by `decay` each, as gradients' do."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(k, m, min(m, n), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(k, n, min(m, n), generator=generator, dtype=torch.float64)).Q
    return left * decay ** torch.arange(min(m, n), dtype=torch.float64) @ right.mT


def fitted(basis: Basis, grad: Tensor, rank: int, right: bool, before: dict[str, Tensor] | None = None) -> Tensor:
    """Directions after a fit: the first one, or one that follows what is stored in `before`, which is then replaced."""
    size = grad.shape[2 if right else 1]
    empty = {name: torch.stack([value] * len(grad)) for name, value in basis.init(size, rank, grad[0]).items()}
    stored = basis.fit(grad, before or empty, not before, rank, right)
    if before is not None:
        before.update(stored)
    return basis.directions(stored, size, rank, grad)


@each_basis
@given(
    k=st.integers(1, 3), m=sizes, n=sizes, rank=st.integers(1, 12), right=st.booleans(), wide=st.booleans(),
    seed=st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_directions_are_orthonormal_in_the_gradients_dtype(
    basis: Basis, k: int, m: int, n: int, rank: int, right: bool, wide: bool, seed: int
) -> None:
    rank, dtype = min(rank, m, n), torch.float64 if wide else torch.float32
    directions = fitted(
        basis, torch.randn(k, m, n, generator=torch.Generator().manual_seed(seed)).to(dtype), rank, right
    )
    assert directions.shape == (k, n if right else m, rank) and directions.dtype == dtype
    eye = torch.eye(rank, dtype=torch.float64).expand(k, -1, -1)
    precision = 1e-12 if wide else 1e-5
    torch.testing.assert_close((directions.mT @ directions).double(), eye, rtol=0, atol=precision)


@each_basis
@pytest.mark.parametrize(("m", "n", "right"), [(7, 5, True), (5, 7, True), (7, 5, False)])
def test_a_fit_stores_what_init_announced_in_memory_of_its_own(basis: Basis, m: int, n: int, right: bool) -> None:
    grad = torch.randn(2, m, n)
    empty = basis.init(n if right else m, 3, torch.empty(m, n, device="meta"))
    stored = basis.fit(
        grad, {name: torch.zeros(2, *value.shape, dtype=value.dtype) for name, value in empty.items()}, True, 3, right
    )
    assert {name: (value.shape, value.dtype) for name, value in stored.items()} == {
        name: ((2, *value.shape), value.dtype) for name, value in empty.items()
    }
    for value in stored.values():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
        assert value.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr()


@each_basis
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_projecting_what_was_projected_changes_nothing(basis: Basis, shape: tuple[int, int]) -> None:
    grad = stack(2, *shape)
    for right in (True, False):
        directions = fitted(basis, grad, 4, right)
        down = grad @ directions if right else directions.mT @ grad
        back = down @ directions.mT if right else directions @ down
        torch.testing.assert_close(back @ directions if right else directions.mT @ back, down, rtol=0, atol=1e-14)


@each_basis
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_the_left_side_is_the_right_side_of_the_transposed_gradient(basis: Basis, shape: tuple[int, int]) -> None:
    grad = stack(2, *shape)
    left, right = fitted(basis, grad, 3, False), fitted(basis, grad.mT.contiguous(), 3, True)
    torch.testing.assert_close(left @ left.mT, right @ right.mT, rtol=0, atol=1e-10)


@each_basis
@pytest.mark.parametrize("degenerate", ["zero", "rank one", "one entry", "tiny", "huge"])
def test_a_degenerate_gradient_still_gives_orthonormal_directions(basis: Basis, degenerate: str) -> None:
    grad = {
        "zero": torch.zeros(2, 8, 6),
        "rank one": torch.ones(2, 8, 6),
        "one entry": torch.zeros(2, 8, 6).index_fill_(1, torch.tensor([3]), 1.0) * torch.eye(6)[2],
        "tiny": stack(2, 8, 6).float() * 1e-18,
        "huge": stack(2, 8, 6).float() * 1e18,
    }[degenerate]
    for right in (True, False):
        before: dict[str, Tensor] = {}
        for _ in range(3):  # also where the basis it starts from was made from such a gradient
            directions = fitted(basis, grad, 4, right, before)
            torch.testing.assert_close(directions.mT @ directions, torch.eye(4).expand(2, -1, -1), rtol=0, atol=1e-5)


@each_basis
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_noticed_or_does_not_matter(basis: Basis, poison: float) -> None:
    grad = stack(2, 8, 6)
    grad[1, 2, 3] = poison
    try:
        directions = fitted(basis, grad, 3, True)
    except torch.linalg.LinAlgError:
        return
    clean = fitted(basis, stack(2, 8, 6), 3, True)
    blind = torch.equal(directions, clean)
    assert blind or not torch.isfinite(directions[1]).all()
    torch.testing.assert_close(directions[0], clean[0], rtol=0, atol=1e-12)


@each_basis
def test_a_fit_ignores_global_random_state(basis: Basis) -> None:
    grad = stack(1, 8, 6)
    torch.manual_seed(0)
    first = fitted(basis, grad, 3, True)
    torch.manual_seed(1)
    assert torch.equal(first, fitted(basis, grad, 3, True))


@each_basis
def test_without_a_gradient_to_be_like_directions_are_float32(basis: Basis) -> None:
    grad = stack(1, 8, 6).float()
    stored = basis.fit(grad, {"draw": torch.zeros(1, dtype=torch.int64)}, True, 3, True)
    directions = basis.directions(stored, 6, 3)
    assert directions.dtype == torch.float32 and torch.equal(directions, basis.directions(stored, 6, 3, grad))


def test_half_precision_storage_is_read_as_float32_or_as_it_is() -> None:
    basis = SVD()
    assert basis.init(6, 3, torch.empty(0, dtype=torch.bfloat16))["basis"].dtype == torch.bfloat16
    stored = {"basis": basis.fit(stack(1, 8, 6).float(), {}, True, 3, True)["basis"].bfloat16()}
    torch.testing.assert_close(basis.directions(stored, 6, 3), stored["basis"].float(), rtol=0, atol=0)
    assert basis.directions(stored, 6, 3, stored["basis"]) is stored["basis"]


@pytest.mark.parametrize(("m", "n"), [(20, 12), (12, 20), (12, 12)])
def test_svd_leaves_exactly_the_discarded_singular_values(m: int, n: int) -> None:
    grad, rank = stack(2, m, n), 4
    basis = fitted(SVD(), grad, rank, m >= n)
    back = grad @ basis @ basis.mT if m >= n else basis @ basis.mT @ grad
    lost = (grad - back).square().sum((-2, -1))
    expected = torch.linalg.svdvals(grad)[:, rank:].square().sum(-1)
    torch.testing.assert_close(lost, expected, rtol=1e-9, atol=0)


@given(m=sizes, n=sizes, rank=st.integers(1, 12), right=st.booleans())
@settings(max_examples=25, deadline=None)
def test_captured_is_what_the_projection_keeps(m: int, n: int, rank: int, right: bool) -> None:
    grad, rank = stack(2, m, n), min(rank, m, n)
    directions = fitted(Coordinate(), grad, rank, right)
    back = grad @ directions @ directions.mT if right else directions @ directions.mT @ grad
    for k in range(2):
        lost = (grad - back)[k].square().sum() / grad[k].square().sum()
        assert captured(grad[k], directions[k], right) == pytest.approx(1 - lost.item(), abs=1e-12)
    together = (grad - back).square().sum() / grad.square().sum()
    assert captured(grad, directions, right) == pytest.approx(1 - together.item(), abs=1e-12)


def test_of_a_zero_gradient_everything_is_captured() -> None:
    assert captured(torch.zeros(4, 3), torch.eye(3)[:, :1], True) == 1.0


@each_basis
@given(m=sizes, n=sizes, rank=st.integers(1, 12), right=st.booleans())
@settings(max_examples=20, deadline=None)
def test_no_basis_captures_more_than_the_svd(basis: Basis, m: int, n: int, rank: int, right: bool) -> None:
    grad, rank = stack(1, m, n), min(rank, m, n)
    best = captured(grad, fitted(SVD(), grad, rank, right), right)
    assert captured(grad, fitted(basis, grad, rank, right), right) <= best + 1e-12


@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 40)])
def test_following_a_drifting_gradient_subspace_iteration_keeps_up_with_svd(m: int, n: int) -> None:
    before: dict[str, Tensor] = {}
    right = m >= n
    start, drift = stack(1, m, n, 0.8, seed=1), stack(1, m, n, 0.8, seed=2)
    for step in range(6):
        grad = start + 0.1 * step * drift
        basis = fitted(SubspaceIteration(), grad, 6, right, before)
    assert captured(grad, basis, right) >= 0.97 * captured(grad, fitted(SVD(), grad, 6, right), right)


def test_more_first_steps_come_closer_to_the_svd() -> None:
    grad = stack(1, 40, 24, 0.9)
    tried = [SubspaceIteration(first=first) for first in (1, 2, 8)]
    shares = [captured(grad, fitted(basis, grad, 6, True), True) for basis in (*tried, SVD())]
    assert shares == sorted(shares) and shares[0] < shares[2]


def test_later_steps_are_single_ones_whatever_the_first_were() -> None:
    grad, before = stack(1, 12, 8), {"basis": torch.eye(8, 3, dtype=torch.float64).unsqueeze(0)}
    got = fitted(SubspaceIteration(first=5), grad, 3, True, dict(before))
    expected = torch.linalg.qr(grad.mT @ grad @ before["basis"]).Q
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [SubspaceIteration, RandomizedSVD, Random])
def test_a_seed_gives_one_start_and_another_seed_another(method: type[SubspaceIteration]) -> None:
    grad = stack(1, 10, 8)
    first, same, other = (fitted(method(seed=seed), grad, 3, True) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30)])
def test_randomised_svd_is_exact_where_the_gradient_has_no_more_directions_than_it_samples(m: int, n: int) -> None:
    grad = stack(2, m, n, 0.9, seed=3)
    left, values, right_h = torch.linalg.svd(grad, full_matrices=False)
    grad = left[..., :9] * values[:, None, :9] @ right_h[:, :9]
    for right in (True, False):
        found = fitted(RandomizedSVD(oversample=5), grad, 4, right)
        best = fitted(SVD(), grad, 4, right)
        torch.testing.assert_close(found @ found.mT, best @ best.mT, rtol=0, atol=1e-10)


def test_oversampling_and_power_steps_bring_randomised_svd_closer() -> None:
    grad = stack(4, 60, 40, 0.97)
    tried = [RandomizedSVD(0), RandomizedSVD(10), RandomizedSVD(10, power=1), RandomizedSVD(10, power=4), SVD()]
    shares = [captured(grad, fitted(basis, grad, 10, True), True) for basis in tried]
    assert shares == sorted(shares) and len(set(shares)) == len(shares)


@pytest.mark.parametrize("power", [0, 1, 3])
@pytest.mark.parametrize(("m", "n"), [(64, 48), (48, 64)])
def test_randomised_svd_is_scikit_learns_for_the_same_sample(m: int, n: int, power: int) -> None:
    extmath = pytest.importorskip("sklearn.utils.extmath")
    grad, rank, right = stack(1, m, n, 0.85, seed=5), 12, m >= n
    directions = fitted(RandomizedSVD(5, power=power), grad, rank, right)[0]

    class Given(np.random.RandomState):
        def normal(self, size: tuple[int, int]) -> np.ndarray:
            return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()

    tall = grad[0] if right else grad[0].mT
    vectors = torch.from_numpy(
        extmath.randomized_svd(
            tall.numpy(), rank, n_oversamples=5, n_iter=power, power_iteration_normalizer="QR", transpose=False,
            random_state=Given(),
        )[2]
    )  # fmt: skip
    torch.testing.assert_close(directions @ directions.mT, vectors.mT @ vectors, rtol=0, atol=1e-10)
    assert captured(grad, directions, right) >= 0.99 * captured(grad, fitted(SVD(), grad, rank, right), right)


@pytest.mark.parametrize("option", ["oversample", "power"])
def test_randomised_svd_refuses_a_negative_count(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} must be >= 0, got {option}=-1"):
        RandomizedSVD(**{option: -1})
