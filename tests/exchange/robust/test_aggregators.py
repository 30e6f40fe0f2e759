"""Rules against ByzFL and against transcriptions of their definitions that try everything, in float64."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.robust.aggregators import (
    AGGREGATORS,
    FEWEST,
    centered_clipping,
    coordinate_median,
    geometric_median,
    krum,
    minimum_diameter_average,
    minimum_variance_average,
    multi_krum,
    nearest_neighbor_average,
    nearest_neighbor_mixing,
    trimmed_mean,
)
from leantrain.exchange.robust.distances import central_row

ROBUST = sorted(set(AGGREGATORS) - {"mean"})
each_robust_rule = pytest.mark.parametrize("name", ROBUST)


def fewest(name: str, f: int) -> int:
    return FEWEST.get(name, lambda f: 2 * f + 1)(f)


def vectors(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Tensor, int]:
    """A rule, vectors it takes, and how many may be lies."""
    name, f = draw(st.sampled_from(ROBUST)), draw(st.integers(0, 3))
    n = draw(st.integers(fewest(name, f), fewest(name, f) + 4))
    return name, vectors(n, draw(st.integers(1, 9)), draw(st.integers(0, 1000))), f


# Independent references.


def brute_krum_scores(x: np.ndarray, neighbours: int) -> list[float]:
    scores = []
    for i in range(len(x)):
        others = sorted(sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True)) for j in range(len(x)) if j != i)
        scores.append(sum(others[:neighbours]))
    return scores


def brute_subset(x: np.ndarray, f: int, badness: Callable[[np.ndarray], float]) -> np.ndarray:
    subsets = [list(rows) for rows in combinations(range(len(x)), len(x) - f)]
    return x[min(subsets, key=lambda rows: badness(x[rows]))].mean(0)


def diameter(x: np.ndarray) -> float:
    return max((float(np.linalg.norm(a - b)) for a, b in combinations(x, 2)), default=0.0)


def top_variance(x: np.ndarray) -> float:
    return float(np.linalg.norm(x - x.mean(0), ord=2))


def sum_of_distances(x: np.ndarray, z: np.ndarray) -> float:
    return float(np.linalg.norm(x - z, axis=1).sum())


BRUTE: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "nearest_neighbor_average": lambda x, f: x[np.argsort(np.linalg.norm(x - x[0], axis=1))[: len(x) - f]].mean(0),
    "krum": lambda x, f: x[int(np.argmin(brute_krum_scores(x, len(x) - f - 2)))],
    "multi_krum": lambda x, f: x[np.argsort(brute_krum_scores(x, len(x) - f - 2))[: len(x) - f]].mean(0),
    "coordinate_median": lambda x, f: np.median(x, axis=0),
    "trimmed_mean": lambda x, f: np.sort(x, axis=0)[f : len(x) - f].mean(0),
    "minimum_diameter_average": lambda x, f: brute_subset(x, f, diameter),
    "minimum_variance_average": lambda x, f: brute_subset(x, f, top_variance),
}


@given(cases())
@settings(max_examples=150, deadline=None)
def test_a_rule_is_what_its_definition_says(case: tuple[str, Tensor, int]) -> None:
    name, stack, f = case
    if name in BRUTE:
        expected = BRUTE[name](stack.numpy(), f)
        np.testing.assert_allclose(AGGREGATORS[name](stack, f).numpy(), expected, rtol=0, atol=1e-9)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_no_point_nearby_has_a_smaller_sum_of_distances_than_the_geometric_median(n: int, d: int, seed: int) -> None:
    stack = vectors(n, d, seed)
    found = geometric_median(stack, 0, steps=2000, tolerance=1e-12).numpy()
    least = sum_of_distances(stack.numpy(), found)
    probes = np.random.default_rng(seed).normal(size=(60, d)) * np.geomspace(1e-4, 1, 60)[:, None]
    assert least <= min(sum_of_distances(stack.numpy(), found + probe) for probe in probes) + 1e-5
    assert least <= min(sum_of_distances(stack.numpy(), x) for x in stack.numpy()) + 1e-5


def test_the_geometric_median_of_a_triangle_sees_its_sides_under_equal_angles() -> None:
    stack = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    away = torch.nn.functional.normalize(stack - geometric_median(stack, 0, steps=1000, tolerance=1e-12), dim=1)
    torch.testing.assert_close(
        (away @ away.T).fill_diagonal_(-0.5), torch.full((3, 3), -0.5).double(), atol=1e-6, rtol=0
    )


def test_far_liars_do_not_hold_the_geometric_median() -> None:
    """Started at zero, three iterations of Weiszfeld's end far from where honest vectors are."""
    honest = 100 + 0.1 * vectors(6, 20)
    stack = torch.cat([honest, torch.zeros(2, 20, dtype=torch.float64)])
    assert (geometric_median(stack, 2) - honest.mean(0)).norm() < 2 * (honest - honest.mean(0)).norm(dim=1).max()


def tied(name: str, x: np.ndarray, f: int) -> bool:
    """Whether several choices are equally good, of which a rule takes the first: two vectors that are each other's
    only neighbour, or subsets with the same two farthest."""
    if name == "minimum_diameter_average":
        diameters = sorted(diameter(x[list(rows)]) for rows in combinations(range(len(x)), len(x) - f))
        return len(diameters) > 1 and diameters[0] == diameters[1]
    return name in ("krum", "multi_krum") and len(x) - f - 2 == 1


# ByzFL.


@pytest.fixture(scope="module")
def byzfl() -> types.ModuleType:
    """ByzFL's aggregators, without the rest of it, which wants torchvision."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("byzfl is not installed")
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators")


THEIRS: dict[str, tuple[Callable[[Any, int], Any], Callable[[Tensor, int], Tensor]]] = {
    "median": (lambda b, f: b.Median(), coordinate_median),
    "trimmed mean": (lambda b, f: b.TrMean(f), trimmed_mean),
    "MDA": (lambda b, f: b.MDA(f), minimum_diameter_average),
    "NNM": (lambda b, f: b.NNM(f), nearest_neighbor_mixing),
    "MoNNA": (lambda b, f: b.MoNNA(f, idx=1), lambda x, f: nearest_neighbor_average(x, f, own=1)),
    "centred clipping": (
        lambda b, f: b.CenteredClipping(L=3, tau=0.7),
        lambda x, f: centered_clipping(x, f, radius=0.7, steps=3, start=torch.zeros_like(x[0])),
    ),
    "Krum, of one liar fewer": (lambda b, f: b.Krum(f), lambda x, f: krum(x, f - 1)),
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize(("n", "f", "d"), [(5, 1, 3), (8, 2, 40), (11, 3, 100), (10, 4, 7)])
def test_byzfl_agrees(byzfl: types.ModuleType, name: str, n: int, f: int, d: int) -> None:
    theirs, ours = THEIRS[name]
    stack = vectors(n, d, seed=n).float()
    torch.testing.assert_close(ours(stack, f), theirs(byzfl, f)(stack), atol=1e-5, rtol=1e-5)


def test_krum_of_byzfl_counts_one_neighbour_more(byzfl: types.ModuleType) -> None:
    different = [
        seed for seed in range(100)
        if not torch.equal(krum(vectors(7, 2, seed).float(), 2), byzfl.Krum(2)(vectors(7, 2, seed).float()))
    ]  # fmt: skip
    assert different


# Laws.


@given(cases(), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_the_order_of_the_vectors_changes_nothing(case: tuple[str, Tensor, int], seed: int) -> None:
    name, stack, f = case
    assume(not tied(name, stack.numpy(), f))
    order = torch.randperm(len(stack), generator=torch.Generator().manual_seed(seed))
    if name == "nearest_neighbor_average":
        moved = nearest_neighbor_average(stack[order], f, own=order.tolist().index(0))
    else:
        moved = AGGREGATORS[name](stack[order], f)
    torch.testing.assert_close(moved, AGGREGATORS[name](stack, f), atol=1e-6, rtol=1e-6)


@given(cases(), st.floats(-50, 50), st.floats(0.01, 100))
@settings(max_examples=100, deadline=None)
def test_a_shift_and_a_scale_of_all_vectors_are_those_of_the_result(
    case: tuple[str, Tensor, int], shift: float, scale: float
) -> None:
    name, stack, f = case
    offset = shift * torch.linspace(-1, 1, stack.shape[1], dtype=torch.float64)
    moved = AGGREGATORS[name](scale * stack + offset, f)
    torch.testing.assert_close(moved, scale * AGGREGATORS[name](stack, f) + offset, atol=1e-5 * scale, rtol=1e-6)


LIES = [0.0, 1e-3, -1.0, 1e6, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]


@given(cases(), st.lists(st.sampled_from(LIES), min_size=3, max_size=3), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_what_n_minus_f_vectors_agree_on_is_the_result(
    case: tuple[str, Tensor, int], lies: list[float], seed: int
) -> None:
    name, stack, f = case
    stack = stack.float()
    agreed = stack[0].clone()
    order = torch.randperm(len(stack), generator=torch.Generator().manual_seed(seed))
    liars = [row for row in order.tolist() if row != 0][:f]
    stack[:] = agreed
    for row, number in zip(liars, lies, strict=False):
        stack[row] = agreed * 0.5 + number
    assert torch.equal(AGGREGATORS[name](stack, f), agreed), name


@each_robust_rule
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_f_vectors_that_are_no_numbers_leave_the_result_among_the_honest(name: str, number: float) -> None:
    stack = vectors(9, 30).float()
    stack[[2, 6], 17] = number
    found = AGGREGATORS[name](stack, 2)
    honest = stack[[0, 1, 3, 4, 5, 7, 8]]
    assert (found >= honest.amin(0) - 1e-6).all() and (found <= honest.amax(0) + 1e-6).all()


@each_robust_rule
def test_more_than_f_vectors_that_are_not_finite_have_no_aggregate(name: str) -> None:
    stack = vectors(9, 5)
    stack[[1, 4, 8]] = torch.nan
    found = AGGREGATORS[name](stack, 2)
    if name == "nearest_neighbor_average":
        assert torch.equal(found, stack[0])
    else:
        assert found.isnan().all()


@each_robust_rule
def test_a_large_lie_moves_no_rule_far(name: str) -> None:
    """Honest vectors are within 1 of each other, and the result within a few of them, whatever the size of the lie."""
    honest = 0.1 * vectors(7, 10)
    for size in (1.0, 1e3, 1e9, 1e30):
        stack = torch.cat([honest, size * torch.ones(2, 10, dtype=torch.float64)])
        assert (AGGREGATORS[name](stack, 2) - honest.mean(0)).norm() < 2.5


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_nearest_neighbours_without_liars_are_the_mean_for_everybody_bit_for_bit(n: int) -> None:
    stack = vectors(n, 1000).float()
    found = [nearest_neighbor_average(stack, 0, own) for own in range(n)]
    torch.testing.assert_close(found[0], stack.double().mean(0).float(), atol=1e-6, rtol=1e-6)
    assert all(torch.equal(each, found[0]) for each in found)


@given(st.integers(0, 3), st.integers(0, 4), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_a_worker_always_counts_itself_among_its_neighbours(f: int, more: int, d: int, seed: int) -> None:
    n = 2 * f + 1 + more
    own, theirs = vectors(2, d, seed)
    stack = torch.stack([own, *[theirs] * (n - 1)])  # the others agree, and are nearer to each other than to this one
    expected = (own + (n - f - 1) * theirs) / (n - f)
    torch.testing.assert_close(nearest_neighbor_average(stack, f, 0), expected)


def test_close_models_far_from_the_origin_keep_their_order() -> None:
    """Squared norms in float32 would have no digit left of these distances."""
    offsets = torch.tensor([0.0, 3.5, 1.0, 2.0, 10.0])
    stack = 1000 + offsets[:, None] * 2.0**-12 * torch.ones(5, 70_000)
    assert torch.equal(nearest_neighbor_average(stack, 2, own=0)[0], 1000 + torch.tensor(2.0**-12))
    assert torch.equal(krum(stack, 1)[0], stack[2, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@each_robust_rule
def test_the_result_has_the_type_of_the_vectors(name: str, dtype: torch.dtype) -> None:
    stack = vectors(7, 5).to(dtype)
    found = AGGREGATORS[name](stack, 2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), AGGREGATORS[name](stack.double(), 2), atol=1e-2, rtol=1e-2)


@each_robust_rule
def test_vectors_are_left_as_they_were_and_the_result_is_no_view_of_them(name: str) -> None:
    stack = vectors(9, 6)
    before = stack.clone()
    AGGREGATORS[name](stack, 2).zero_()
    assert torch.equal(stack, before)


@pytest.mark.parametrize("rule", [trimmed_mean, coordinate_median, geometric_median, krum, minimum_diameter_average])
def test_chunks_of_coordinates_make_no_difference(rule: Callable[[Tensor, int], Tensor], monkeypatch: Any) -> None:
    stack = vectors(7, 100)
    whole = rule(stack, 1)
    monkeypatch.setattr("leantrain.exchange.robust.distances._COLUMNS", 7)
    torch.testing.assert_close(rule(stack, 1), whole, atol=1e-9, rtol=0)


# Mixing, clipping, the row in the middle.


@given(st.integers(0, 3), st.integers(0, 4), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_mixing_gives_every_worker_the_mean_of_its_neighbours(f: int, more: int, d: int, seed: int) -> None:
    stack = vectors(2 * f + 1 + more, d, seed)
    mixed = nearest_neighbor_mixing(stack, f)
    for row in range(len(stack)):
        torch.testing.assert_close(mixed[row], nearest_neighbor_average(stack, f, row))


def test_mixing_leaves_lies_out_and_as_they_are() -> None:
    stack = vectors(7, 5)
    stack[3], stack[5, 2] = torch.nan, torch.inf
    mixed = nearest_neighbor_mixing(stack, 2)
    torch.testing.assert_close(mixed[3], stack[3], equal_nan=True)
    torch.testing.assert_close(mixed[5], stack[5])
    torch.testing.assert_close(mixed[[0, 1, 2, 4, 6]], stack[[0, 1, 2, 4, 6]].mean(0).expand(5, -1))
    assert trimmed_mean(mixed, 2).isfinite().all()


def test_clipping_to_a_large_radius_is_the_mean_and_to_none_is_the_start() -> None:
    stack, start = vectors(5, 6), torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(centered_clipping(stack, 0, radius=1e9, start=start), stack.mean(0))
    assert torch.equal(centered_clipping(stack, 0, radius=0.0, start=start), start)


def test_the_row_in_the_middle_is_no_outlier() -> None:
    stack = vectors(7, 4)
    stack[[0, 6]] += 100
    middle = central_row(stack, 2)
    assert middle == int(np.argmin(brute_krum_scores(stack.numpy(), 4))) and middle not in (0, 6)


# Refusals.


@each_robust_rule
@pytest.mark.parametrize("f", [1, 2, 3])
def test_too_few_vectors_are_refused_with_what_would_be_allowed(name: str, f: int) -> None:
    n = fewest(name, f) - 1
    with pytest.raises(
        UsageError, match=rf"{name} with f={f} needs at least {n + 1} vectors, got n={n}, which allows f <= {f - 1}"
    ):
        AGGREGATORS[name](vectors(n, 3), f)
    AGGREGATORS[name](vectors(n + 1, 3), f)


def test_krum_of_two_vectors_allows_no_f_at_all() -> None:
    with pytest.raises(UsageError, match="krum with f=0 needs at least 3 vectors, got n=2, which allows no f at all"):
        krum(vectors(2, 3), 0)


@pytest.mark.parametrize("f", [-1, 1.0, True, None])
def test_f_is_a_whole_number(f: Any) -> None:
    with pytest.raises(UsageError, match="must be an integer >= 0, got"):
        trimmed_mean(vectors(5, 3), f)


@pytest.mark.parametrize(
    "stack", [torch.zeros(5), torch.zeros(5, 3, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(3, 0)]
)
@each_robust_rule
def test_other_tensors_are_refused(name: str, stack: Tensor) -> None:
    with pytest.raises(UsageError, match=rf"{name} takes float vectors \[n, d\], got torch"):
        AGGREGATORS[name](stack, 0)


def test_arguments_are_checked() -> None:
    stack = vectors(5, 3)
    with pytest.raises(UsageError, match="own must be a row of the stack, 0 to 4, got 5"):
        nearest_neighbor_average(stack, 1, own=5)
    with pytest.raises(UsageError, match="radius must be a number >= 0, got -1"):
        centered_clipping(stack, 1, radius=-1)
    with pytest.raises(UsageError, match=r"start must be \[3\], one number per coordinate, got \[4\]"):
        centered_clipping(stack, 1, start=torch.zeros(4))
    with pytest.raises(UsageError, match="38760 subsets of 14 of n=20 vectors are too many"):
        minimum_variance_average(vectors(20, 2), 6)


def test_multi_krum_of_everybody_is_the_mean_and_krum_is_one_of_them() -> None:
    stack = vectors(6, 3)
    torch.testing.assert_close(multi_krum(stack, 0), stack.mean(0))
    assert any(torch.equal(krum(stack, 1), row) for row in stack)


def test_every_order_of_three_vectors_has_the_same_median() -> None:
    stack = vectors(3, 4)
    results = [coordinate_median(stack[list(order)], 1) for order in permutations(range(3))]
    assert all(torch.equal(each, results[0]) for each in results)
