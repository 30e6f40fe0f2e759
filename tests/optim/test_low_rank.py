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
from leantrain.optim import SVD, Adam, Chain, LowRank, SubspaceIteration
from leantrain.optim.low_rank import matrix_shape
from leantrain.optim.rules import State


@dataclass(frozen=True)
class Momentum:
    """The simplest linear rule: with it a full-rank projection must change nothing."""

    decay: float = 0.9
    moments: ClassVar[dict[str, int]] = {"buffer": 1}

    def init(self, param: Tensor) -> State:
        return {"buffer": torch.zeros_like(param)}

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        return state["buffer"].mul_(self.decay).add_(grad).clone()


@dataclass(frozen=True)
class Fixed:
    """A basis that is given, so that the projection can be followed by hand."""

    columns: Tensor = field(hash=False)

    def fit(self, grad: Tensor, previous: Tensor, fresh: bool, rank: int, right: bool) -> Tensor:
        return self.columns[:, :rank].to(grad.dtype).expand(len(grad), -1, -1).clone()


@dataclass(frozen=True)
class Failing:
    """Fails as LAPACK does when a gradient is not finite."""

    def fit(self, grad: Tensor, previous: Tensor, fresh: bool, rank: int, right: bool) -> Tensor:
        if not torch.isfinite(grad).all():
            raise torch.linalg.LinAlgError("failed to converge")
        return SVD().fit(grad, previous, fresh, rank, right)


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
    got = run(LowRank(Adam(), 3, scale=1.0, basis=Fixed(basis)), weight, grads)
    inner = run(_Dense(Adam()), weight @ basis[:, :3], [g @ basis[:, :3] for g in grads])
    expected = weight + (inner - weight @ basis[:, :3]) @ basis[:, :3].T
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class _Dense:
    """Adam as an ordinary rule, without PyTorch's fused kernel."""

    inner: Adam
    moments: ClassVar[dict[str, int]] = {}

    def init(self, param: Tensor) -> State:
        return self.inner.init(param)

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        return self.inner.update(grad, state, step)


def test_flipping_a_basis_vectors_sign_does_not_matter_when_moments_rotate() -> None:
    weight, grads = problem(8, 5)

    @dataclass(frozen=True)
    class Flipped(SVD):
        def fit(self, grad: Tensor, previous: Tensor, fresh: bool, rank: int, right: bool) -> Tensor:
            signs = torch.tensor([1.0, 1.0, 1.0] if fresh else [-1.0, 1.0, -1.0], dtype=grad.dtype)
            return super().fit(grad, previous, fresh, rank, right) * signs

    options = {"rank": 3, "refresh": 3, "on_refresh": "rotate"}
    straight, flipped = (run(LowRank(Adam(), basis=b, **options), weight, grads) for b in (SVD(), Flipped()))
    torch.testing.assert_close(straight, flipped, rtol=0, atol=1e-12)


def test_reset_starts_moments_and_bias_correction_again() -> None:
    """After a reset the next step has the size of a first step: every projected coordinate moves by lr * scale."""
    weight, grads = problem(8, 5, steps=4)
    basis = Fixed(torch.eye(5, dtype=torch.float64))
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


def test_a_first_basis_that_fails_is_the_axes_until_one_succeeds() -> None:
    weight = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = Chain([weight], LowRank(Adam(), 2, basis=Failing()))
    weight.grad = torch.full((6, 4), torch.inf)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["basis"], torch.eye(4, 2))
    weight.grad = torch.ones(6, 4)
    optimizer.step()
    assert not torch.equal(optimizer.state[weight]["basis"], torch.eye(4, 2))
    # The waiting time of the schedule counts from the basis that succeeded, at step 1.
    assert int(optimizer.state[weight]["next_refresh"]) == 1 + 200


def test_one_basis_inside_another_is_refused() -> None:
    with pytest.raises(ValueError, match="LowRank inside LowRank"):
        LowRank(LowRank(Adam(), 2), 6)


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
