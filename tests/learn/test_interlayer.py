"""Interlayer regularisation: products against autograd, the penalty against its formula, and blocks with both."""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import reduce
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from leantrain import snapshot
from leantrain.errors import UsageError
from leantrain.learn import LocalUpdates
from leantrain.learn.fitting import Pair
from leantrain.learn.interlayer import (
    DepthPreconditioner,
    Interlayer,
    LookAhead,
    Transport,
    WithTransport,
    collapse,
    factorise,
)
from leantrain.nn import MLP, ResNetCifar

few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 7)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors_of(layer: nn.Module) -> list[Tensor]:
    return [p for name, p in layer.named_parameters() if name.startswith("parametrizations.weight")]


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def factored(weight: Tensor, depth: int) -> nn.Linear:
    layer = linear(weight)
    factorise(layer, [""], depth)
    return layer


# Factors


@few
@given(rows=sizes, columns=sizes, depth=st.integers(2, 4), seed=st.integers(0, 9))
def test_factors_are_balanced_and_their_product_is_the_matrix(rows: int, columns: int, depth: int, seed: int) -> None:
    weight = drawn(rows, columns, seed=seed)
    layer = factored(weight, depth)
    torch.testing.assert_close(layer.weight, nn.Parameter(weight), rtol=1e-10, atol=1e-12)
    factors = factors_of(layer)
    assert len(factors) == depth
    assert sorted(map(tuple, map(torch.Tensor.size, factors)))[: depth - 1] == [(min(rows, columns),) * 2] * (depth - 1)
    for lower, upper in pairwise(factors):
        torch.testing.assert_close(upper.mT @ upper, lower @ lower.mT, rtol=1e-9, atol=1e-10)


def test_a_convolutional_network_computes_the_same_with_factors_and_after_collapsing_them() -> None:
    torch.manual_seed(0)
    model = ResNetCifar(depth=20).double().eval()
    images, names = drawn(3, 3, 12, 12), set(model.state_dict())
    before = model(images)
    assert factorise(model, depth=3) is model
    with_factors = model(images)
    torch.testing.assert_close(with_factors, before, rtol=1e-8, atol=1e-8)
    assert "layers.0.conv1.parametrizations.weight.original2" in model.state_dict()
    assert "head.weight" in model.state_dict(), "the output layer is no hidden one"
    assert collapse(model) is model
    assert torch.equal(model(images), with_factors)
    assert set(model.state_dict()) == names
    assert type(model.layers[0].conv1) is nn.Conv2d


def test_factors_train_and_collapse_to_what_was_trained() -> None:
    torch.manual_seed(0)
    model = MLP(features=6, classes=3, hidden=[8, 8])
    factorise(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = drawn(32, 6).float(), torch.arange(32) % 3
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    trained = model(inputs)
    assert torch.equal(collapse(model)(inputs), trained)
    assert all(param.requires_grad and param.is_leaf for param in model.parameters())


def test_a_frozen_layer_stays_frozen() -> None:
    model = MLP(features=6, classes=3, hidden=[8, 8])
    model.layers[0].weight.requires_grad_(False)
    factorise(model)
    assert not any(factor.requires_grad for factor in factors_of(model.layers[0]))
    assert all(factor.requires_grad for factor in factors_of(model.layers[1]))
    collapse(model)
    assert isinstance(model.layers[0].weight, nn.Parameter)
    assert [layer.weight.requires_grad for layer in model.layers] == [False, True]


def test_transposed_layers_and_half_precision_can_be_factored() -> None:
    transposed = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 3).double()
    before, inputs = copy.deepcopy(transposed), drawn(4, 3)
    factorise(transposed, [""], depth=2)
    torch.testing.assert_close(transposed(inputs), before(inputs))
    half = nn.Linear(8, 8, dtype=torch.bfloat16)
    weight = half.weight.detach().clone()
    factorise(half, [""])
    assert {factor.dtype for factor in factors_of(half)} == {torch.bfloat16}
    torch.testing.assert_close(half.weight.detach(), weight, rtol=0.05, atol=0.02)


def test_what_cannot_be_factored_or_collapsed_is_refused_and_left_alone() -> None:
    model = MLP(features=6, classes=3, hidden=[8, 8])
    before = list(model.state_dict())
    with pytest.raises(UsageError, match=r"layer 'layers.2' to factor; did you mean 'layers\.[01]'"):
        factorise(model, ["layers.0", "layers.2"])
    with pytest.raises(UsageError, match="depth must be an integer >= 2, got depth=1"):
        factorise(model, depth=1)
    with pytest.raises(UsageError, match="no factored layer"):
        collapse(model)
    assert list(model.state_dict()) == before
    factorise(model, ["layers.0"])
    with pytest.raises(UsageError, match=r"layers\.0 cannot be factored: its weight is computed"):
        factorise(model, ["layers.0"])
    parametrizations.weight_norm(model.layers[1])
    collapse(model)
    assert "layers.1.parametrizations.weight.original0" in model.state_dict(), "weight normalisation is not ours"
    with pytest.raises(UsageError, match="no hidden"):
        factorise(nn.Sequential(nn.Linear(3, 3)))
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    with pytest.raises(UsageError, match="also that of another layer"):
        factorise(shared, ["0"])
    with pytest.raises(UsageError, match="in groups"):
        factorise(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), ["0"])


# The preconditioner


def by_autograd(weight: Tensor, gradient: Tensor, depth: int) -> Tensor:
    """What one step on balanced factors changes of their product, to first order, for a learning rate of 1."""
    layer = factored(weight, depth)
    layer.weight.backward(gradient)
    factors = factors_of(layer)
    with torch.no_grad():
        return sum(
            (
                reduce(lambda low, up: up @ low, [f.grad if i == j else f for i, f in enumerate(factors)])
                for j in range(depth)
            ),
            torch.zeros(()),
        )


def transformed(weight: Tensor, gradient: Tensor, depth: int, **how: Any) -> Tensor:
    param = nn.Parameter(weight.clone())
    param.grad = gradient.clone()
    DepthPreconditioner([param], depth, **how).apply()
    return param.grad


@few
@given(rows=sizes, columns=sizes, depth=st.integers(2, 4), seed=st.integers(0, 9))
def test_the_formula_is_the_first_order_step_of_balanced_factors(
    rows: int, columns: int, depth: int, seed: int
) -> None:
    weight, gradient = drawn(rows, columns, seed=seed), drawn(rows, columns, seed=seed + 10)
    found = transformed(weight, gradient, depth, floor=0.0, keep_norm=False)
    torch.testing.assert_close(found, by_autograd(weight, gradient, depth), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_with_a_floor_it_is_the_formula_of_floored_eigenvalues(shape: tuple[int, int]) -> None:
    weight, gradient, floor, depth = drawn(*shape), drawn(*shape, seed=1), 0.3, 3
    w, g = (weight, gradient) if shape[0] <= shape[1] else (weight.mT, gradient.mT)
    values, basis = torch.linalg.eigh(w @ w.mT)
    assert values[0] < floor * values[-1] < values[-2]
    values = values.clamp_min(floor * values[-1])

    def power(q: float) -> Tensor:
        return basis @ torch.diag(values**q) @ basis.mT

    expected = power(2 / 3) @ g + power(1 / 3) @ g @ w.mT @ power(-2 / 3) @ w + g @ w.mT @ power(-1 / 3) @ w
    found = transformed(weight, gradient, depth, floor=floor, keep_norm=False)
    torch.testing.assert_close(found, expected if shape[0] <= shape[1] else expected.mT)


def test_depth_one_is_the_identity_and_norms_are_kept() -> None:
    weight, gradient = drawn(5, 4), drawn(5, 4, seed=1)
    assert torch.equal(transformed(weight, gradient, 1), gradient)
    found = transformed(weight, gradient, 3)
    torch.testing.assert_close(found.norm(), gradient.norm())
    assert not torch.allclose(found, gradient)
    torch.testing.assert_close(transformed(weight * 1e-4, gradient, 3), found), "only directions count then"
    torch.testing.assert_close(transformed(weight * 0, gradient, 3), gradient)
    assert torch.equal(transformed(weight * 0, gradient, 3, keep_norm=False), gradient * 0)
    assert torch.equal(transformed(weight, gradient * 0, 3), gradient * 0)


def test_kernels_count_as_matrices_and_half_precision_works() -> None:
    kernel, gradient = drawn(4, 3, 2, 2), drawn(4, 3, 2, 2, seed=1)
    flat = transformed(kernel.flatten(1), gradient.flatten(1), 2)
    torch.testing.assert_close(transformed(kernel, gradient, 2), flat.view(4, 3, 2, 2))
    coarse = transformed(kernel.bfloat16(), gradient.bfloat16(), 2)
    torch.testing.assert_close(coarse.double(), flat.view(4, 3, 2, 2), rtol=0.05, atol=0.05)


@few
@given(rows=sizes, columns=sizes, depth=st.integers(2, 4), seed=st.integers(0, 9))
def test_a_stale_spectrum_still_gives_a_direction_of_descent(rows: int, columns: int, depth: int, seed: int) -> None:
    param = nn.Parameter(drawn(rows, columns, seed=seed))
    preconditioner = DepthPreconditioner([param], depth, every=10)
    for step in range(3):
        gradient = drawn(rows, columns, seed=100 + 10 * seed + step)
        param.grad = gradient.clone()
        preconditioner.apply()
        assert (param.grad * gradient).sum() > 0
        with torch.no_grad():
            param.copy_(drawn(rows, columns, seed=1000 + 10 * seed + step))


def test_it_follows_the_path_of_a_product_of_three_matrices_to_first_order_in_the_learning_rate() -> None:
    def apart(lr: float, steps: int) -> float:
        """How far the two ends are from each other, as a part of the way."""
        target, start = drawn(12, 8), drawn(12, 8, seed=1) / 3
        layer, param = factored(start, 3), nn.Parameter(start.clone())
        preconditioner = DepthPreconditioner([param], 3, every=1, floor=0.0, keep_norm=False)
        on_factors, on_matrix = torch.optim.SGD(layer.parameters(), lr), torch.optim.SGD([param], lr)
        for _ in range(steps):
            param.grad = param.detach() - target
            preconditioner.apply()
            on_matrix.step()
            on_factors.zero_grad()
            weight = layer.weight
            weight.backward(weight.detach() - target)
            on_factors.step()
        end = layer.weight.detach()
        assert (end - target).norm() < 0.8 * (start - target).norm()
        return ((param.detach() - end).norm() / (end - start).norm()).item()

    coarse, fine = apart(1e-3, 100), apart(5e-4, 200)
    assert fine < 2e-3
    assert 1.8 < coarse / fine < 2.2


def test_spectra_are_found_every_so_many_steps_and_go_into_the_state() -> None:
    def step(preconditioner: DepthPreconditioner, params: list[nn.Parameter], number: int) -> None:
        for index, param in enumerate(params):
            param.grad = drawn(*param.shape, seed=10 * number + index)
        if number % 2:
            params[1].grad = None  # a block that is not trained now is not counted
        preconditioner.apply()
        with torch.no_grad():
            for param in params:
                if param.grad is not None:
                    param -= 0.3 * param.grad

    params = [nn.Parameter(drawn(5, 3)), nn.Parameter(drawn(3, 4))]
    whole = DepthPreconditioner(params, 2, every=3)
    for number in range(4):
        step(whole, params, number)
    assert whole.state_dict()["applied"] == [4, 2]
    saved, copies = copy.deepcopy(whole.state_dict()), [nn.Parameter(param.detach().clone()) for param in params]
    assert len(snapshot.of_values(saved, "preconditioner").tensors) == 6, "it can go into a checkpoint"
    resumed, forgetful = DepthPreconditioner(copies, 2, every=3), DepthPreconditioner(params, 2, every=3)
    resumed.load_state_dict(saved)
    for number in range(4, 9):
        step(whole, params, number)
        step(resumed, copies, number)
    assert all(torch.equal(one, other) for one, other in zip(params, copies, strict=True))
    with pytest.raises(UsageError, match="other shapes"):
        DepthPreconditioner([params[0]], 2).load_state_dict(saved)
    with pytest.raises(UsageError, match="other shapes"):
        DepthPreconditioner([nn.Parameter(drawn(9, 9)), params[1]], 2).load_state_dict(saved)
    forgetful.load_state_dict(DepthPreconditioner(params, 2).state_dict())  # one that has not been applied yet


# Look-ahead and transport


@few
@given(
    shape=st.one_of(
        st.tuples(sizes), st.tuples(sizes, sizes), st.tuples(sizes, st.integers(2, 5), st.integers(2, 5))
    ),
    layers=st.integers(1, 2),
)  # fmt: skip
def test_a_look_ahead_head_gives_its_head_features_of_the_same_shape(shape: tuple[int, ...], layers: int) -> None:
    features = drawn(3, *shape).requires_grad_()
    seen: list[Tensor] = []

    class Head(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            seen.append(features)
            return features.flatten(1).sum(1)

    head = LookAhead(Head(), features, layers)
    head(features).sum().backward()
    assert seen[0].shape == features.shape
    assert (seen[0] >= 0).all()
    assert features.grad is not None
    matrices = [param for param in head.parameters() if param.dim() > 1]
    assert len(matrices) == layers
    assert {param.dtype for param in matrices} == {torch.float64}


def test_a_look_ahead_layer_is_what_its_docstring_says() -> None:
    features = drawn(4, 6)
    head = LookAhead(nn.Identity(), features)
    hidden = features @ head.ahead[0].weight.mT
    spread = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(features), spread.clamp_min(0))


def test_transport_is_half_the_mean_square_of_the_way_over_tau() -> None:
    before, features = drawn(5, 3, 4).requires_grad_(), drawn(5, 3, 4, seed=1).requires_grad_()
    penalty = Transport(before, features, tau=0.1)(features, before)
    torch.testing.assert_close(penalty, ((features - before) ** 2).mean() / 0.2)
    penalty.backward()
    torch.testing.assert_close(features.grad, (features - before).detach() / 0.1 / 60)
    assert before.grad is None, "the block below is not pulled along"


features_of = st.one_of(
    st.tuples(st.integers(1, 6)), st.tuples(st.integers(1, 5), st.integers(1, 6)),
    st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
)  # fmt: skip


@few
@given(source=features_of, goal=features_of)
def test_any_features_can_be_brought_to_the_shape_of_any_others(source: tuple[int, ...], goal: tuple[int, ...]) -> None:
    before, features = drawn(3, *source), drawn(3, *goal, seed=1)
    transport = Transport(before, features, tau=1.0)
    assert transport.projected(before, features).shape == features.shape
    again = Transport(before, features, tau=1.0)
    assert torch.equal(transport(features, before), again(features, before))
    if source == goal:
        assert torch.equal(transport.projected(before, features), before)


def test_projections_pool_positions_and_keep_mean_squares() -> None:
    maps, smaller = drawn(2, 3, 4, 4), drawn(2, 3, 2, 2)
    pooled = Transport(maps, smaller, tau=1.0).projected(maps, smaller)
    torch.testing.assert_close(pooled, maps.view(2, 3, 2, 2, 2, 2).mean((3, 5)))
    wide, narrow = drawn(50, 800), drawn(50, 300)
    transport = Transport(wide, narrow, tau=1.0)
    ratio = transport.projected(wide, narrow).square().mean() / wide.square().mean()
    assert 0.95 < ratio < 1.05
    tokens = drawn(2, 7, 800)
    assert transport.projection is not None
    found = Transport(tokens, drawn(2, 7, 300), tau=1.0).projected(tokens, drawn(2, 7, 300))
    torch.testing.assert_close(found, tokens @ transport.projection.mT)


def test_transport_is_computed_in_float32_at_least() -> None:
    before = torch.full((2, 1000), 200.0, dtype=torch.float16)
    penalty = Transport(before, before, tau=1e-3)(-before, before)  # its square and sum are beyond float16
    assert penalty.dtype == torch.float32
    assert penalty == 400**2 / 2e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"look_ahead": -1}, "look_ahead must be an integer >= 0, got look_ahead=-1"),
        ({"factors": 0}, "factors must be an integer >= 1"),
        ({"depth": 2.5}, "depth must be an integer >= 1, got depth=2.5"),
        ({"factors": 2, "depth": 3}, "factors=2 and depth=3"),
        ({"transport": 0.0}, r"tau above 0, got 0\.0"),
        ({"transport": float("nan")}, "tau above 0, got nan"),
    ],
)
def test_steps_outside_their_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Interlayer(**arguments)


def test_other_values_outside_their_range_are_refused() -> None:
    matrix = nn.Parameter(drawn(2, 2))
    for arguments in ({"depth": 0}, {"every": 0}, {"floor": -0.1}, {"floor": 1.5}):
        with pytest.raises(UsageError, match=next(iter(arguments))):
            DepthPreconditioner([matrix], **arguments)
    with pytest.raises(UsageError, match=r"shape \[3\]"):
        DepthPreconditioner([nn.Parameter(drawn(3))])
    with pytest.raises(UsageError, match=r"got \[3\]"):
        LookAhead(nn.Identity(), drawn(3))
    with pytest.raises(UsageError, match=r"got \[1, 1, 1, 1, 1\]"):
        Transport(drawn(2, 2), drawn(1, 1, 1, 1, 1), tau=1.0)


# In blocks


def made(interlayer: Interlayer, **how: Any) -> LocalUpdates:
    torch.manual_seed(0)
    model = MLP(features=6, classes=3, hidden=[8, 8, 8, 8])
    how = {"sample": drawn(2, 6).float(), "cut": ["layers.1", "layers.2"], **asdict(interlayer), **how}
    return LocalUpdates(model, "classification", **how)


BATCH = Pair(drawn(16, 6).float(), torch.arange(16) % 3)


def gradients(learner: LocalUpdates) -> dict[str, Tensor]:
    learner.step(BATCH)
    learner.hand_over()
    return {name: param.grad.clone() for name, param in learner.module.named_parameters() if param.grad is not None}


def test_without_a_step_nothing_changes() -> None:
    torch.manual_seed(0)
    model = MLP(features=6, classes=3, hidden=[8, 8, 8, 8])
    plain = LocalUpdates(model, "classification", sample=drawn(2, 6).float(), cut=["layers.1", "layers.2"])
    expected, found = gradients(plain), gradients(made(Interlayer()))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_transport_pulls_every_block_but_the_first() -> None:
    plain, pulled = made(Interlayer()), made(Interlayer(transport=0.1))
    before, after = plain.step(BATCH).metrics, pulled.step(BATCH).metrics
    h = [torch.relu(pulled.model.layers[0](BATCH.inputs))]
    h.append(torch.relu(pulled.model.layers[1](h[0])))
    assert torch.equal(after["block1/loss"], before["block1/loss"])
    torch.testing.assert_close(after["block2/loss"] - before["block2/loss"], (h[1] - h[0]).square().mean() / 0.2)
    assert torch.equal(after["block3/loss"], before["block3/loss"]), "the last block has the model's own loss alone"
    assert isinstance(pulled.local_loss(1), WithTransport)
    assert torch.equal(pulled.evaluate(BATCH)["block2/loss_sum"], plain.evaluate(BATCH)["block2/loss_sum"])


def test_a_look_ahead_layer_is_trained_with_its_block() -> None:
    learner = made(Interlayer(look_ahead=1, transport=1.0))
    heads = [{id(param) for param in learner.head_parameters(block)} for block in range(2)]
    assert all(len(head) == 5 for head in heads), "a matrix, a normalisation's two vectors, the head's two"
    assert heads[0] <= {id(param) for param in learner.parts[0].params}
    learner.step(BATCH)
    assert all(param.grad is not None for part in learner.parts for param in part.params)


def test_factored_blocks_learn_and_the_cut_knows_the_factors() -> None:
    learner = made(Interlayer(factors=2))
    assert [len(params) for params in learner.cut.parameters] == [3, 3, 8]
    learner.fit([(BATCH.inputs, BATCH.targets)], lambda params: torch.optim.SGD(params, 0.1), epochs=5)
    logits = learner.model(BATCH.inputs)
    assert torch.equal(collapse(learner.model)(BATCH.inputs), logits)


def test_a_factored_model_is_not_cut_inside_its_products() -> None:
    learner = made(Interlayer(factors=2), cut=None, blocks=5)
    assert learner.cut.names == ("layers.1", "layers.2", "layers.3", "head")


def test_depth_changes_the_hidden_matrices_gradients_and_nothing_else() -> None:
    plain, deep = gradients(made(Interlayer())), gradients(made(Interlayer(depth=3)))
    hidden = {f"layers.{number}.weight" for number in range(4)}
    for name, gradient in plain.items():
        assert torch.equal(gradient, deep[name]) == (name not in hidden), name
        torch.testing.assert_close(gradient.norm(), deep[name].norm())
    model = made(Interlayer()).model
    weight = model.layers[2].weight.detach().double()
    expected = by_autograd(weight, plain["layers.2.weight"].double(), 3)
    along = torch.nn.functional.cosine_similarity(expected.flatten(), deep["layers.2.weight"].double().flatten(), 0)
    assert along > 0.99, "but for the floor, what three factors would do"


def test_all_steps_work_together() -> None:
    learner = made(Interlayer(look_ahead=1, depth=2, transport=0.3))
    losses = learner.fit([(BATCH.inputs, BATCH.targets)], lambda params: torch.optim.SGD(params, 0.1), epochs=30)
    assert losses[-1] < losses[0] - 0.1
    again = made(Interlayer(look_ahead=1, depth=2, transport=0.3))
    again.load_state_dict(learner.state_dict())
    head = learner.auxiliaries.state_dict()
    assert all(torch.equal(value, again.auxiliaries.state_dict()[name]) for name, value in head.items())
