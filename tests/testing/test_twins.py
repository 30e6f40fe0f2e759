"""The twins against what is known without them: PyTorch in float64, and the laws of a projection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.testing.twins import SlowAdamW, SlowGaLoreAdamW, SlowSGD


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def after(twin, shapes, steps=7):
    weights = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    for step in range(steps):
        twin.step(weights, [random(*shape, seed=100 * step + i) for i, shape in enumerate(shapes)])
    return weights


def after_torch(optimizer_class, shapes, steps=7, **options):
    weights = [torch.nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    optimizer = optimizer_class(weights, **options)
    for step in range(steps):
        for i, weight in enumerate(weights):
            weight.grad = random(*weight.shape, seed=100 * step + i)
        optimizer.step()
    return [weight.detach() for weight in weights]


SHAPES = [(6, 4), (4, 6), (5,), (2, 3, 4)]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.3, 0.6), "eps": 0.1}])
def test_slow_adamw_is_torchs_in_float64(options):
    options = {"lr": 0.1, "weight_decay": 0.2, **options}
    torch.testing.assert_close(
        after(SlowAdamW(**options), SHAPES), after_torch(torch.optim.AdamW, SHAPES, **options), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True}]
)
def test_slow_sgd_is_torchs_in_float64(options):
    options = {"lr": 0.1, "weight_decay": 0.2, **options}
    torch.testing.assert_close(
        after(SlowSGD(**options), SHAPES), after_torch(torch.optim.SGD, SHAPES, **options), rtol=1e-12, atol=1e-14
    )


def test_slow_galore_without_rank_is_slow_adamw():
    options = {"lr": 0.1, "weight_decay": 0.2}
    galore, adamw = after(SlowGaLoreAdamW(**options), SHAPES), after(SlowAdamW(**options), SHAPES)
    torch.testing.assert_close(galore, adamw, rtol=1e-13, atol=1e-14)


@given(rows=st.integers(2, 7), columns=st.integers(2, 7), rank=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_slow_galore_moves_within_the_leading_directions_of_the_shorter_side(rows, columns, rank):
    weights, gradient = [torch.zeros(rows, columns, dtype=torch.float64)], random(rows, columns)
    SlowGaLoreAdamW(lr=1.0, rank=rank, scale=1.0).step(weights, [gradient])
    if min(rows, columns) <= rank:  # plain Adam: a step of one for every number
        torch.testing.assert_close(weights[0].abs(), torch.ones_like(weights[0]), rtol=1e-6, atol=0)
        return
    U, _, Vh = torch.linalg.svd(gradient)
    leading = Vh[:rank].T @ Vh[:rank] if rows >= columns else U[:, :rank] @ U[:, :rank].T
    moved = weights[0] @ leading if rows >= columns else leading @ weights[0]
    torch.testing.assert_close(moved, weights[0], rtol=0, atol=1e-4)
    assert torch.linalg.matrix_rank(weights[0], rtol=1e-6) <= rank


def test_slow_galore_treats_a_tensor_as_its_matrix():
    twin = {"lr": 0.1, "rank": 2, "refresh": 3, "weight_decay": 0.1}
    flat = [random(4, 9)]
    deep = [flat[0].reshape(4, 3, 3).clone()]
    one, other = SlowGaLoreAdamW(**twin), SlowGaLoreAdamW(**twin)
    for step in range(5):
        gradient = random(4, 9, seed=step)
        one.step(flat, [gradient])
        other.step(deep, [gradient.reshape(4, 3, 3)])
    assert torch.equal(flat[0].reshape(4, 3, 3), deep[0])


def test_slow_galore_refreshes_when_it_should():
    def refreshes(stagger):
        twin = SlowGaLoreAdamW(lr=0.1, rank=1, refresh=5, stagger=stagger)
        weights, seen = [random(4, 3), random(3, 4), random(3), random(5, 5)], []
        for step in range(16):
            before = [memory.get("P") for memory in twin.memory] or [None] * 4
            twin.step(weights, [random(*w.shape, seed=50 * step + i) for i, w in enumerate(weights)])
            seen += [(i, step) for i, memory in enumerate(twin.memory) if memory.get("P") is not before[i]]
        return {i: [step for j, step in seen if j == i] for i in range(4)}

    assert refreshes(stagger=False) == {0: [0, 5, 10, 15], 1: [0, 5, 10, 15], 2: [], 3: [0, 5, 10, 15]}
    assert refreshes(stagger=True) == {0: [0, 2, 7, 12], 1: [0, 4, 9, 14], 2: [], 3: [0, 5, 10, 15]}


def test_slow_galore_rotation_cannot_see_signs_of_the_basis(monkeypatch):
    def run():
        return after(SlowGaLoreAdamW(lr=0.1, rank=2, refresh=2, on_refresh="rotate", stagger=False), [(6, 4), (4, 6)])

    expected, svd, calls = run(), torch.linalg.svd, []

    def flipped(matrix, full_matrices):
        U, S, Vh = svd(matrix, full_matrices=full_matrices)
        calls.append(1)
        sign = torch.tensor([-1.0 if (len(calls) + k) % 2 else 1.0 for k in range(S.numel())])
        return U * sign, S, Vh * sign[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    torch.testing.assert_close(run(), expected, rtol=1e-9, atol=1e-12)


def test_slow_galore_refuses_a_basis_it_does_not_describe():
    with pytest.raises(NotImplementedError, match="'subspace'"):
        SlowGaLoreAdamW(basis="subspace")
