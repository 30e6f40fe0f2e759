"""Bases that only choose: the cosine matrix is what it should be, and the choice is the best of its kind."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.optim.bases import DCT, Columns, Coordinate, Identity, captured, columns, dct

fft = pytest.importorskip("scipy.fft")

SIZES = [2, 3, 64, 128, 257, 1024, 4096]
each_chooser = pytest.mark.parametrize("basis", [DCT("l1"), DCT("l2"), Coordinate()], ids=["l1", "l2", "coordinate"])


def gradient(m: int, n: int, seed: int = 0, k: int = 1) -> Tensor:
    return torch.randn(k, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(rows: Tensor) -> Tensor:
    return torch.from_numpy(fft.dct(rows.double().numpy(), type=2, norm="ortho", axis=-1))


def whole(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The cosine matrix with one direction per column."""
    return dct.cosines(torch.arange(size), size, dtype).mT


def chosen(basis: Columns, grad: Tensor, rank: int, right: bool = True) -> Tensor:
    return basis.fit(grad, {}, True, rank, right)["columns"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", SIZES)
def test_the_cosine_matrix_is_orthogonal_to_a_float32s_precision(size: int) -> None:
    exact = whole(size, torch.float32)[:, :: max(1, size // 500)].double()
    assert (exact.mT @ exact - torch.eye(exact.shape[1], dtype=torch.float64)).abs().max() < 2e-7


@pytest.mark.parametrize("size", SIZES[:-1])
def test_the_cosine_matrix_is_scipys(size: int) -> None:
    torch.testing.assert_close(whole(size), reference(torch.eye(size)), rtol=0, atol=1e-13)


def test_cosines_of_sizes_too_large_to_keep_are_those_of_the_kept_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    picked = torch.tensor([[0, 3, 299], [1, 150, 298]], dtype=torch.int32)
    kept = dct.cosines(picked, 300, torch.float32)
    monkeypatch.setattr(dct, "_KEPT_WHOLE", 299)
    assert torch.equal(dct.cosines(picked, 300, torch.float32), kept)


@given(size=st.integers(1, 700), rows=st.integers(1, 4), double=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_fast_transform_is_the_product_with_the_matrix(size: int, rows: int, double: bool) -> None:
    signal = gradient(rows, size, seed=size)[0].to(torch.float64 if double else torch.float32)
    fast, product = dct.fast_dct(signal), signal @ whole(size, signal.dtype)
    assert fast.dtype == signal.dtype
    tolerance = 1e-12 if double else 1e-5 * signal.norm().item()
    torch.testing.assert_close(fast, product, rtol=0, atol=tolerance)
    torch.testing.assert_close(fast.double(), reference(signal), rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [255, 256, 257])
def test_both_ways_to_the_transform_agree_where_one_takes_over(size: int) -> None:
    signal = gradient(3, size)
    torch.testing.assert_close(dct.dct(signal), reference(signal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [6, 7, 300, 301])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("right", [True, False])
def test_the_columns_are_those_with_the_highest_norm(size: int, norm: str, right: bool) -> None:
    grad = gradient(20, size, seed=size)
    coefficients = reference(grad[0])
    scores = coefficients.abs().sum(0) if norm == "l1" else coefficients.square().sum(0)
    expected = sorted(sorted(range(size), key=lambda i: -scores[i])[:4])
    got = chosen(DCT(norm), grad if right else grad.mT, 4, right)  # type: ignore[arg-type]
    assert got.dtype == torch.int32 and got.tolist() == [expected]


@given(m=st.integers(1, 6), n=st.integers(2, 8), rank=st.integers(1, 8), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_no_other_columns_capture_more_than_those_of_the_l2_norm(m: int, n: int, rank: int, seed: int) -> None:
    grad, rank = gradient(m, n, seed), min(rank, n)
    for basis, matrix in ((DCT("l2"), whole(n)), (Coordinate(), torch.eye(n, dtype=torch.float64))):
        best = max(captured(grad, matrix[:, list(c)], True) for c in itertools.combinations(range(n), rank))
        directions = basis.directions(basis.fit(grad, {}, True, rank, True), n, rank, grad)
        assert captured(grad, directions, True) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("right", [True, False])
def test_what_is_lost_is_the_energy_of_the_columns_left_out(right: bool) -> None:
    grad, basis = gradient(12, 9, seed=2), DCT("l2")
    size = 9 if right else 12
    energies = reference(grad[0] if right else grad[0].mT).square().sum(0).sort(descending=True).values
    shares = []
    for rank in range(1, size + 1):
        directions = basis.directions(basis.fit(grad, {}, True, rank, right), size, rank, grad)
        shares.append(captured(grad, directions, right))
        assert shares[-1] == pytest.approx(energies[:rank].sum().item() / grad.square().sum().item(), abs=1e-12)
        assert 1 - shares[-1] <= 1 - rank / size + 1e-12  # the worst case: all columns hold the same
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1, abs=1e-12)


@each_chooser
def test_with_all_columns_the_gradient_comes_back(basis: DCT) -> None:
    grad = gradient(5, 8)
    directions = basis.directions(basis.fit(grad, {}, True, 8, True), 8, 8, grad)
    torch.testing.assert_close(grad @ directions @ directions.mT, grad, rtol=0, atol=1e-13)


@each_chooser
def test_of_equal_columns_the_first_are_chosen(basis: DCT) -> None:
    assert chosen(basis, torch.zeros(2, 5, 9), 3).tolist() == [[0, 1, 2]] * 2


def test_a_gradient_larger_than_one_block_is_scored_whole() -> None:
    grad = gradient(1500, 300, k=2)
    assert grad.numel() > 3 * (1 << 18)
    torch.testing.assert_close(columns.norms(grad, "l1"), grad.abs().sum(-2), rtol=1e-12, atol=0)
    torch.testing.assert_close(columns.norms(grad.mT, "l2"), grad.square().sum(-1), rtol=1e-12, atol=0)


@each_chooser
def test_only_indices_are_stored(basis: DCT) -> None:
    stored = basis.fit(gradient(40, 30).float(), {}, True, 8, True)
    assert {name: (value.dtype, value.untyped_storage().nbytes()) for name, value in stored.items()} == {
        "columns": (torch.int32, 4 * 8)
    }


@each_chooser
def test_before_a_fit_the_first_directions_are_in_use(basis: DCT) -> None:
    stored = {name: value.unsqueeze(0) for name, value in basis.init(6, 3, torch.empty(0)).items()}
    assert stored["columns"].tolist() == [[0, 1, 2]]
    directions = basis.directions(stored, 6, 3)
    torch.testing.assert_close(directions.mT @ directions, torch.eye(3).unsqueeze(0), rtol=0, atol=1e-6)


@each_chooser
@given(n=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_the_change_of_basis_is_ones_where_a_column_stays_and_zeros_elsewhere(
    basis: DCT, n: int, rank: int, seed: int
) -> None:
    rank = min(rank, n)
    old, new = (basis.fit(gradient(4, n, seed + 100 * i, k=2), {}, True, rank, True) for i in range(2))
    before, after = (basis.directions(stored, n, rank, gradient(1, 1, k=2)) for stored in (old, new))
    place, stays = basis.carried(old, new)
    expected = torch.zeros(2, rank, rank, dtype=torch.float64).scatter_(
        1, place.unsqueeze(1), stays.unsqueeze(1).double()
    )
    torch.testing.assert_close(before.mT @ after, expected, rtol=0, atol=1e-12)
    for k in range(2):
        both = set(old["columns"][k].tolist()) & set(new["columns"][k].tolist())
        assert stays[k].sum() == len(both)


def test_identity_is_the_first_axes_on_every_matrix() -> None:
    basis, grad = Identity(), gradient(4, 6, k=3)
    assert basis.init(6, 2, grad) == {} == basis.fit(grad, {}, True, 2, True)
    assert torch.equal(basis.directions({}, 6, 2, grad), torch.eye(6, dtype=torch.float64)[:, :2].expand(3, -1, -1))


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(UsageError, match=r"norm must be one of \('l1', 'l2'\), got norm='max'"):
        DCT("max")  # type: ignore[arg-type]
