"""The projection's laws: what must hold whatever the gradients are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.ledger import record
from leantrain.optim import SVD, Adam, AdamW, Chain, LowRank, Momentum, SubspaceIteration
from leantrain.optim.bases import Identity, Total, alone
from leantrain.optim.low_rank import Side, matrix_shape
from leantrain.optim.rules import State


@dataclass(frozen=True)
class Fixed(SVD):
    """A basis that is given, so that the projection can be followed by hand."""

    columns: Tensor = field(compare=False, kw_only=True)

    def fit(self, grad: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        return {"basis": self.columns[:, :rank].to(grad.dtype).expand(len(grad), -1, -1).clone()}


@dataclass(frozen=True)
class Failing(SVD):
    """Fails as LAPACK does when a gradient is not finite."""

    def fit(self, grad: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        if not torch.isfinite(grad).all():
            raise torch.linalg.LinAlgError("failed to converge")
        return super().fit(grad, stored, fresh, rank, right, total)


def run(rule: object, weight: Tensor, grads: list[Tensor], lr: float = 0.1) -> Tensor:
    param = torch.nn.Parameter(weight.clone())
    optimizer = Chain([param], rule, lr=lr)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach()


def problem(m: int, n: int, steps: int = 9) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(m * 100 + n)
    draw = [torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(steps + 1)]
    return draw[0], draw[1:]


@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5), (6, 6)])
def test_rotated_momentum_of_gradients_inside_the_subspace_is_plain_momentum(m: int, n: int) -> None:
    """Where nothing is projected away, refreshes must not show; moments that are merely kept do show."""
    weight, grads = problem(m, n)
    keep = min(m, n) - 1
    left, _, right = torch.linalg.svd(grads[0], full_matrices=False)
    left, right = left[:, :keep], right[:keep]
    grads = [left @ (left.T @ grad @ right.T) @ right for grad in grads]
    plain = run(Momentum(), weight, grads)
    rotated = run(LowRank(Momentum(), keep, refresh=2, scale=1.0, on_refresh="rotate"), weight, grads)
    torch.testing.assert_close(rotated, plain, rtol=0, atol=1e-10)
    kept = run(LowRank(Momentum(), keep, refresh=2, scale=1.0, on_refresh="keep"), weight, grads)
    assert (kept - plain).abs().max() > 1e-3


def test_adam_in_a_fixed_basis_is_adam_on_the_rotated_weight() -> None:
    weight, grads = problem(9, 5)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    got = run(LowRank(Adam(), 3, scale=1.0, basis=Fixed(columns=basis)), weight, grads)
    inner = run(_Dense(Adam()), weight @ basis[:, :3], [g @ basis[:, :3] for g in grads])
    expected = weight + (inner - weight @ basis[:, :3]) @ basis[:, :3].T
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class _Dense:
    """Adam as an ordinary rule, without PyTorch's fused kernel."""

    inner: Adam
    moments: ClassVar[dict[str, int]] = {}
    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        return self.inner.init(param)

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        return self.inner.update(grad, state, step)


def test_flipping_a_basis_vectors_sign_does_not_matter_when_moments_rotate() -> None:
    weight, grads = problem(8, 5)

    @dataclass(frozen=True)
    class Flipped(SVD):
        def fit(self, grad: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
            signs = torch.tensor([1.0, 1.0, 1.0] if fresh else [-1.0, 1.0, -1.0], dtype=grad.dtype)
            return {"basis": super().fit(grad, stored, fresh, rank, right, total)["basis"] * signs}

    options = {"rank": 3, "refresh": 3, "on_refresh": "rotate"}
    straight, flipped = (run(LowRank(Adam(), basis=b, **options), weight, grads) for b in (SVD(), Flipped()))
    torch.testing.assert_close(straight, flipped, rtol=0, atol=1e-12)


def test_reset_starts_moments_and_bias_correction_again() -> None:
    """After a reset the next step has the size of a first step: every projected coordinate moves by lr * scale."""
    weight, grads = problem(8, 5, steps=4)
    basis = Fixed(columns=torch.eye(5, dtype=torch.float64))
    rule = LowRank(Adam(eps=0.0), 3, refresh=3, scale=1.0, basis=basis, on_refresh="reset")
    moved = run(rule, weight, grads, lr=0.1) - run(rule, weight, grads[:3], lr=0.1)
    torch.testing.assert_close(moved[:, :3].abs(), torch.full((8, 3), 0.1, dtype=torch.float64))
    assert torch.equal(moved[:, 3:], torch.zeros(8, 2, dtype=torch.float64))


@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_a_tensor_is_stepped_as_the_matrix_of_its_first_axis(a: int, b: int, c: int, rank: int) -> None:
    shape = (a, b, c)
    if not LowRank.fits(shape, rank):
        assert rank >= min(a, b * c)
        return
    weight, grads = problem(a, b * c, steps=4)
    rule = LowRank(Adam(), rank, refresh=2)
    folded = run(rule, weight.view(shape), [g.view(shape) for g in grads])
    assert torch.equal(folded.view(a, -1), run(rule, weight, grads))
    assert matrix_shape(shape) == (a, b * c)


def test_a_failed_decomposition_is_counted_keeps_the_basis_and_is_tried_again() -> None:
    counted: list[str] = []

    class Counter:
        def add(self, name: str, amount: float) -> None:
            counted.append(name)

        def phase(self, name: str) -> None:
            raise AssertionError("an optimizer starts no phase")

    weights = [torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2)]
    optimizer = Chain(weights, LowRank(Adam(), 2, refresh=2, basis=Failing()))
    grads = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    previous = record.activate(Counter())  # type: ignore[arg-type]
    try:
        for step, grad in enumerate(grads):
            weights[0].grad = grad.clone() if step != 2 else torch.full((6, 4), torch.nan)
            weights[1].grad = grad.clone()
            basis = [optimizer.state[w]["basis"].clone() for w in weights] if step else []
            optimizer.step()
            if step == 2:
                assert torch.equal(basis[0], optimizer.state[weights[0]]["basis"])
                assert not torch.equal(basis[1], optimizer.state[weights[1]]["basis"])
            if step == 3:  # tried again one step later, not one period later
                assert not torch.equal(basis[0], optimizer.state[weights[0]]["basis"])
    finally:
        record.activate(previous)
    assert counted == ["event/basis_fallback"]
    assert [int(optimizer.state[w]["fallbacks"]) for w in weights] == [1, 0]


def test_without_a_first_basis_nothing_moves_until_one_succeeds() -> None:
    weight = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = Chain([weight], LowRank(Adam(), 2, basis=AlwaysFailingFirst(calls=[])))
    for step in range(2):
        weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        assert torch.equal(weight.detach(), torch.ones(6, 4)) == (step == 0)
    assert int(optimizer.state[weight]["fallbacks"]) == 1
    # The waiting time of the schedule counts from the basis that succeeded, at step 1.
    assert int(optimizer.state[weight]["next_refresh"]) == 1 + 200


@dataclass(frozen=True)
class AlwaysFailingFirst(SVD):
    calls: list[int] = field(compare=False, kw_only=True)

    def fit(self, grad: Tensor, stored: State, fresh: bool, rank: int, right: bool, total: Total = alone) -> State:
        self.calls.append(1)
        if len(self.calls) == 1:
            raise torch.linalg.LinAlgError("failed to converge")
        return super().fit(grad, stored, fresh, rank, right, total)


SHAPES = [(5, 8), (8, 5), (6, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_all_axes_as_basis_are_the_plain_optimizer(shape: tuple[int, int]) -> None:
    """The exact oracle of the projection: nothing is lost, nothing is turned, so nothing may differ."""
    weight, grads = problem(*shape)
    low = run(LowRank(Adam(), min(shape), refresh=2, scale=1.0, basis=Identity(), on_refresh="rotate"), weight, grads)
    plain = torch.nn.Parameter(weight.clone())
    optimizer = AdamW([plain], lr=0.1, weight_decay=0.0)
    for grad in grads:
        plain.grad = grad
        optimizer.step()
    torch.testing.assert_close(low, plain.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("side", "projected"), [
    ("std", {(5, 8): "rows", (8, 5): "columns", (6, 6): "columns"}),
    ("reverse_std", {(5, 8): "columns", (8, 5): "rows", (6, 6): "rows"}),
    ("left", dict.fromkeys(SHAPES, "rows")),
    ("right", dict.fromkeys(SHAPES, "columns")),
])  # fmt: skip
def test_the_side_that_is_projected(shape: tuple[int, int], side: Side, projected: dict[tuple[int, int], str]) -> None:
    """State shapes say which side it is, and the update lies in the basis found there."""
    weight, grads = problem(*shape)
    param = torch.nn.Parameter(weight.clone())
    optimizer = Chain([param], LowRank(Adam(), 3, side=side), lr=0.1)
    param.grad = grads[0]
    optimizer.step()
    rows, columns = shape
    basis, moved = optimizer.state[param]["basis"], param.detach() - weight
    if projected[shape] == "columns":
        assert optimizer.state[param]["exp_avg"].shape == (rows, 3) and basis.shape == (columns, 3)
        torch.testing.assert_close(moved @ basis @ basis.T, moved)
    else:
        assert optimizer.state[param]["exp_avg"].shape == (3, columns) and basis.shape == (rows, 3)
        torch.testing.assert_close(basis @ basis.T @ moved, moved)


def test_reverse_std_never_stores_more() -> None:
    for shape in SHAPES:
        sizes = {}
        for side in ("std", "reverse_std"):
            state = LowRank(Adam(), 2, side=side).init(torch.empty(shape, device="meta"))  # type: ignore[arg-type]
            sizes[side] = sum(value.numel() for value in state.values() if value.ndim)
        assert sizes["reverse_std"] <= sizes["std"]
        assert (sizes["reverse_std"] == sizes["std"]) == (shape[0] == shape[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_parts_of_an_update_make_the_update(shape: tuple[int, int]) -> None:
    weight, grads = problem(*shape)
    rule = LowRank(Adam(), 3, refresh=3, on_refresh="rotate")
    whole = {name: value.unsqueeze(0) for name, value in rule.init(weight).items()}
    parts = {name: value.clone() for name, value in whole.items()}
    for number, grad in enumerate(grads):
        step, halves = torch.tensor([float(number)], dtype=torch.float64), (0.25 * grad, 0.75 * grad)
        expected = rule.update(grad.unsqueeze(0), whole, step)
        rule.prepare(grad.unsqueeze(0), parts, step)
        assert not rule.due(parts, step).any()
        projected = sum(rule.project(half.unsqueeze(0), parts) for half in halves)
        assert isinstance(projected, Tensor)
        got = rule.update_projected(projected, parts, step, grad.shape)
        torch.testing.assert_close(got.dense(), expected.dense(), rtol=0, atol=1e-12)
        # What was projected and lifted is projected to the same again.
        again = rule.project(rule.lift(projected, parts, grad.shape), parts)
        torch.testing.assert_close(again, projected, rtol=0, atol=1e-12)


def test_a_settled_matrix_is_refreshed_less_and_an_unsettled_one_as_before() -> None:
    """Two matrices in one stack: one whose gradients keep their directions, one whose gradients have none."""
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(12, 2, generator=generator) @ torch.randn(2, 10, generator=generator)
    weights = [torch.nn.Parameter(torch.zeros(12, 10)) for _ in range(2)]
    optimizer = Chain(weights, LowRank(Adam(), 2, refresh=2, settled=0.9), lr=0.0)
    periods = []
    for _ in range(60):
        weights[0].grad = still * torch.rand((), generator=generator)
        weights[1].grad = torch.randn(12, 10, generator=generator)
        optimizer.step()
        periods.append([int(optimizer.state[w]["period"]) for w in weights])
    # Bases at 0, 2, ... 10: five overlaps, period 4; five more at 14 ... 30: period 8.
    assert [p[0] for p in periods] == [2] * 10 + [4] * 20 + [8] * 30
    assert {p[1] for p in periods} == {2}


def test_a_matrix_that_is_settled_no_more_returns_to_its_period() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(12, 10))
    optimizer = Chain([weight], LowRank(Adam(), 2, refresh=1, settled=0.9), lr=0.0)
    still = torch.randn(12, 2, generator=generator) @ torch.randn(2, 10, generator=generator)
    for step in range(40):
        weight.grad = still if step < 6 else torch.randn(12, 10, generator=generator)
        optimizer.step()
        if step == 5:
            assert int(optimizer.state[weight]["period"]) == 2
    assert int(optimizer.state[weight]["period"]) == 1


def test_one_basis_inside_another_is_refused() -> None:
    with pytest.raises(ValueError, match="LowRank inside LowRank"):
        LowRank(LowRank(Adam(), 2), 6)


@pytest.mark.parametrize("settled", [0.0, 1.5, -0.4])
def test_settled_is_a_share(settled: float) -> None:
    with pytest.raises(ValueError, match=f"settled must be in .0, 1. or None, got settled={settled}"):
        LowRank(Adam(), 2, settled=settled)


def test_half_precision_weights_move_as_float32_ones_do_to_their_precision() -> None:
    weight, grads = problem(12, 10, steps=5)
    rule = LowRank(Adam(), 3, refresh=2)
    wide = run(rule, weight.float(), [g.float() for g in grads])
    narrow = run(rule, weight.bfloat16(), [g.bfloat16() for g in grads])
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=2e-2, atol=2e-2)


def test_subspace_iteration_ignores_global_random_state() -> None:
    weight, grads = problem(8, 5)
    rule = LowRank(Adam(), 2, basis=SubspaceIteration())
    torch.manual_seed(0)
    first = run(rule, weight, grads)
    torch.manual_seed(1)
    assert torch.equal(first, run(rule, weight, grads))
