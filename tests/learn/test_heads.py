"""Auxiliary heads: the logits' shape for whatever a block may give, what they read and do not touch, what they cost."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.cutting import Cut
from leantrain.errors import UsageError
from leantrain.learn import LocalUpdates
from leantrain.learn.fitting import Pair
from leantrain.learn.heads import Head, Unembedding, head_shares, make_head
from leantrain.nn import MLP, Llama, ResNetCifar, ViT

WIDTH, CLASSES = 6, 5


def with_output(layer: nn.Module) -> nn.Module:
    """A model that says which of its layers makes the output."""
    model = nn.Module()
    model.output = layer
    model.get_output_embeddings = lambda: layer  # type: ignore[assignment]
    return model


def norm(features: Tensor) -> Tensor:
    return F.layer_norm(features, features.shape[-1:])


# --- shapes ---

features_and_output = st.one_of(
    st.tuples(st.integers(2, 5), st.integers(1, 9)).map(lambda s: (s, (s[0], CLASSES))),
    st.tuples(st.integers(2, 5), st.integers(1, 7), st.integers(1, 9)).map(lambda s: (s, (s[0], CLASSES))),
    st.tuples(st.integers(2, 5), st.integers(1, 7), st.integers(1, 9)).map(lambda s: (s, (*s[:2], CLASSES))),
    st.tuples(*[st.integers(2, 4), st.integers(1, 5), st.integers(1, 19), st.integers(1, 19)]).map(
        lambda s: (s, (s[0], CLASSES))
    ),
)


@given(shapes=features_and_output, kind=st.sampled_from(["linear", "mlp", "auto"]))
@settings(max_examples=120, deadline=None)
def test_logits_have_the_outputs_shape_and_everything_learns(shapes: Any, kind: Head) -> None:
    shape, wanted = shapes
    features = torch.randn(shape, requires_grad=True)
    head = make_head(kind, features.detach(), torch.zeros(wanted), nn.Linear(3, 3))
    logits = head(features)
    assert logits.shape == wanted
    logits.square().sum().backward()
    assert features.grad is not None and all(param.grad is not None for param in head.parameters())
    assert logits.isfinite().all() and features.grad.isfinite().all()


@pytest.mark.parametrize("kind", get_args(Head))
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: Llama(32, preset="tiny", context=8), lambda n: torch.randint(32, (n, 8))),
        (lambda: ViT(image_size=8, hidden=16, layers=4, heads=2), lambda n: torch.randn(n, 3, 8, 8)),
        (lambda: MLP(20, 4, hidden=[12] * 5), lambda n: torch.randn(n, 20)),
    ],
    ids=["llama", "vit", "mlp"],
)
def test_every_kind_reads_every_block(kind: Head, model: Any, inputs: Any) -> None:
    net = model()
    cut = Cut(net, inputs(2), blocks=3)
    for features in cut.features:
        more = features.repeat(3, *[1] * (features.dim() - 1))
        head = make_head(kind, features, cut.output, net)
        assert head(more).shape == (6, *cut.output.shape[1:])


def test_a_linear_head_on_maps_is_a_matrix_behind_a_mean_over_quarters() -> None:
    features = torch.randn(3, 4, 6, 6)
    head = make_head("linear", features, torch.zeros(3, CLASSES), nn.Identity())
    quarters = torch.stack([features[:, :, y : y + 3, x : x + 3].mean((2, 3)) for y in (0, 3) for x in (0, 3)], 2)
    torch.testing.assert_close(head(features), head[-1](quarters.flatten(1)))


def test_a_linear_head_on_tokens_normalises_each() -> None:
    features = torch.randn(3, 4, WIDTH)
    head = make_head("linear", features, torch.zeros(3, CLASSES), nn.Identity())
    torch.testing.assert_close(head(features), head[-1](norm(features).mean(1)))
    torch.testing.assert_close(head(100 * features), head(features), rtol=1e-3, atol=1e-4)


# --- the model's own matrix ---


def layers() -> dict[str, tuple[nn.Module, Tensor, Tensor | None]]:
    """Output layers with the matrix [outputs, width] and bias that they multiply by."""
    linear, plain, embedding = (
        nn.Linear(WIDTH, CLASSES),
        nn.Linear(WIDTH, CLASSES, bias=False),
        nn.Embedding(CLASSES, WIDTH),
    )
    transposed = pytest.importorskip("transformers.pytorch_utils").Conv1D(CLASSES, WIDTH)
    return {
        "linear": (linear, linear.weight, linear.bias),
        "no bias": (plain, plain.weight, None),
        "embedding": (embedding, embedding.weight, None),
        "transposed": (transposed, transposed.weight.t(), transposed.bias),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["linear", "no bias", "embedding", "transposed"])
def test_the_unembedding_is_the_outputs_matrix_behind_a_norm(name: str) -> None:
    layer, matrix, bias = layers()[name]
    features = torch.randn(2, 3, WIDTH, requires_grad=True)
    head = make_head("unembedding", features.detach(), torch.zeros(2, 3, CLASSES), with_output(layer))
    wanted = norm(features) @ matrix.t() + (0 if bias is None else bias)
    torch.testing.assert_close(head(features), wanted)
    (own,) = torch.autograd.grad(head(features).square().sum(), features)
    (theirs,) = torch.autograd.grad(wanted.square().sum(), features)
    torch.testing.assert_close(own, theirs)


def test_the_unembedding_leaves_the_outputs_matrix_alone_and_follows_it() -> None:
    layer = nn.Linear(WIDTH, CLASSES)
    features = torch.randn(2, 3, WIDTH)
    head = make_head("unembedding", features, torch.zeros(2, 3, CLASSES), with_output(layer))
    head(features).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert sum(param.numel() for param in head.parameters()) == 2 * WIDTH
    assert sum(value.numel() for value in head.state_dict().values()) == 2 * WIDTH
    assert not any(module is layer for module in head.modules())
    before = head(features)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)
    torch.testing.assert_close(head(features), 2 * before)


def test_a_copied_learner_reads_the_copied_matrix() -> None:
    model = Llama(32, preset="tiny", context=8)
    tokens = torch.randint(32, (2, 8))
    learner = copy.deepcopy(LocalUpdates(model, "next_token", sample=tokens, blocks=2, head="unembedding"))
    (unembedding,) = (module for module in learner.auxiliaries.modules() if isinstance(module, Unembedding))
    assert unembedding._layer[0] is learner.model.head  # type: ignore[comparison-overlap]
    assert unembedding._layer[0] is not model.head


def test_a_step_gives_the_outputs_matrix_the_gradient_of_the_last_loss_alone() -> None:
    model, tokens = Llama(32, preset="tiny", context=8), torch.randint(32, (4, 9))
    batch = Pair(tokens[:, :-1], tokens[:, 1:])
    learner = LocalUpdates(model, "next_token", sample=batch.inputs[:2], blocks=3, head="auto")
    assert sum(isinstance(module, Unembedding) for module in learner.auxiliaries.modules()) == 2
    learner.step(batch)
    assert model.head is not None and model.head.weight.grad is not None
    loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(model.head.weight.grad, torch.autograd.grad(loss, model.head.weight)[0])
    assert all(param.grad is not None for param in learner.module.parameters())


def test_auto_takes_the_matrix_only_for_logits_of_every_position() -> None:
    features, model = torch.randn(2, 3, WIDTH), with_output(nn.Linear(WIDTH, CLASSES))

    def reads(features: Tensor, output: Tensor, model: nn.Module) -> bool:
        return any(isinstance(module, Unembedding) for module in make_head("auto", features, output, model).modules())

    assert reads(features, torch.zeros(2, 3, CLASSES), model)
    assert not reads(features, torch.zeros(2, CLASSES), model)
    assert not reads(features[:, 0], torch.zeros(2, CLASSES), model)
    assert not reads(features, torch.zeros(2, 3, CLASSES), with_output(nn.Linear(WIDTH + 1, CLASSES)))
    assert not reads(features, torch.zeros(2, 3, CLASSES), with_output(nn.Linear(WIDTH, CLASSES - 1)))
    assert not reads(features, torch.zeros(2, 3, CLASSES), nn.Identity())


# --- what is refused ---


@pytest.mark.parametrize(
    ("kind", "features", "output", "message"),
    [
        ("linaer", (2, 6), (2, 5), "did you mean 'linear'"),
        ("linear", (2, 6, 4, 4, 4), (2, 5), r"features \[2, 6, 4, 4, 4\]"),
        ("linear", (2, 7, 6), (2, 8, 5), r"outputs \[2, 8, 5\]"),
        ("mlp", (14, 6), (2, 7, 5), "cut elsewhere"),
        ("linear", (4, 3, 6), (2, 5), "cut elsewhere"),
        ("unembedding", (2, 8), (2, 5), "needs features of the width"),
        ("unembedding", (2, 6, 4, 4), (2, 5), "take head 'linear'"),
    ],
)
def test_what_makes_no_logits_is_refused(kind: Any, features: Any, output: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_head(kind, torch.zeros(features), torch.zeros(output), with_output(nn.Linear(WIDTH, CLASSES)))


def test_a_model_without_an_output_layer_has_no_matrix_to_read() -> None:
    with pytest.raises(UsageError, match="no such layer"):
        make_head("unembedding", torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), nn.Identity())


# --- cost ---


def test_shares_are_the_operations_of_head_and_block() -> None:
    model, inputs = MLP(20, 5, hidden=[12] * 4), torch.randn(7, 20)
    cut = Cut(model, inputs, cut=["layers.1", "layers.3"])
    heads = [make_head("linear", features, cut.output, model) for features in cut.features]
    sizes = [sum(param.numel() for param in params if param.dim() == 2) for params in cut.parameters]
    assert head_shares(model, cut, heads, inputs) == pytest.approx([12 * 5 / size for size in sizes[:2]])


def test_a_block_that_only_looks_up_makes_the_share_infinite() -> None:
    model, inputs = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), torch.randint(9, (2, 3))
    cut = Cut(model, inputs, cut=["1"])
    assert head_shares(model, cut, [make_head("linear", cut.features[0], cut.output, model)], inputs) == [math.inf]


def test_heads_of_a_residual_network_cost_a_few_percent_and_measuring_changes_nothing() -> None:
    model, inputs = ResNetCifar(20), torch.randn(2, 3, 32, 32)
    cut = Cut(model, inputs, blocks=4)
    for kind, most in (("linear", 0.01), ("mlp", 0.05)):
        heads = [make_head(kind, features, cut.output, model) for features in cut.features]  # type: ignore[arg-type]
        before = copy.deepcopy([*model.state_dict().values(), *(v for h in heads for v in h.state_dict().values())])
        shares = head_shares(model, cut, heads, inputs)
        assert 0 < max(shares) < most
        after = [*model.state_dict().values(), *(v for h in heads for v in h.state_dict().values())]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert model.training and all(head.training for head in heads)


def test_an_unembedding_keeps_nothing_but_its_norm() -> None:
    model, inputs = Llama(256, preset="tiny", context=16), torch.randint(256, (2, 16))
    cut = Cut(model, inputs, blocks=3)
    own, read = (
        sum(param.numel() for param in make_head(kind, cut.features[0], cut.output, model).parameters())  # type: ignore[arg-type]
        for kind in ("linear", "unembedding")
    )
    assert (own, read) == (2 * 96 + 256 * 96 + 256, 2 * 96)
