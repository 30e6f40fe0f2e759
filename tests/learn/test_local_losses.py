"""Local losses: against their formulas written out, and what of a block and its head follows which part of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.learn import LocalUpdates
from leantrain.learn.fitting import Pair
from leantrain.learn.local_losses import LocalLoss, Reconstruction, Similarity, make_local_loss
from leantrain.learn.local_losses import _as_maps as as_maps
from leantrain.learn.losses import objective
from leantrain.nn import MLP, Llama, ResNetCifar, ViT

CLASSES = 4


def targets(count: int, seed: int = 0) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def cosines(rows: Tensor) -> Tensor:
    """S_ij, one pair after another."""
    return torch.stack([
        torch.stack([torch.corrcoef(torch.stack([one, other]))[0, 1] for other in rows]) for one in rows
    ])  # fmt: skip


def local(kind: Any, features: Tensor, inputs: Tensor | None = None, **how: Any) -> LocalLoss:
    output = torch.zeros(len(features), CLASSES)
    return make_local_loss(
        kind, "linear", features.detach(), output, nn.Identity(), objective("classification"), inputs, **how
    )


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


# --- similarity ---


@given(examples=st.integers(2, 7), width=st.integers(3, 6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_similarity_is_that_of_correlations(examples: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    features, classes = torch.randn(examples, width).double(), targets(examples, seed)
    loss = Similarity(features, CLASSES).double()
    wanted = cosines(F.one_hot(classes, CLASSES).double())
    found = cosines(features @ loss.project.weight.t())  # type: ignore[union-attr, operator]
    torch.testing.assert_close(loss(features, classes), (found - wanted).square().mean())


def test_of_feature_maps_it_is_that_of_each_channels_deviation() -> None:
    features, classes = torch.randn(5, 6, 4, 3).double(), targets(5)
    loss = Similarity(features, CLASSES).double()
    rows = F.conv2d(features, loss.project.weight, padding=1).flatten(2).std(2)  # type: ignore[arg-type]
    wanted = (cosines(rows) - cosines(F.one_hot(classes, CLASSES).double())).square().mean()
    torch.testing.assert_close(loss(features, classes), wanted)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 2, 2), (5, 6, 1, 1), (5, 3, 4)])
def test_its_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    loss = Similarity(features.detach(), CLASSES).double()
    assert torch.autograd.gradcheck(lambda h: loss(h, targets(5)), (features,))


def test_features_that_are_nothing_but_the_class_have_none() -> None:
    classes = targets(12)
    loss = Similarity(torch.zeros(1, CLASSES), CLASSES)
    nn.init.eye_(loss.project.weight)  # type: ignore[arg-type]
    assert loss(3 * F.one_hot(classes, CLASSES).float(), classes) < 1e-12


def test_dead_features_have_a_finite_gradient() -> None:
    for shape in [(5, 4), (5, 3, 2, 2)]:
        features = torch.zeros(shape, requires_grad=True)
        loss = Similarity(features.detach(), CLASSES)(features, targets(5))
        assert loss.isfinite() and gradient(loss, features).isfinite().all()


def test_ignored_targets_do_not_count() -> None:
    features, classes = torch.randn(6, 5), targets(6)
    loss = Similarity(features, CLASSES)
    kept = torch.tensor([True, False, True, True, False, True])
    torch.testing.assert_close(
        loss(features, torch.where(kept, classes, -100)), loss(features[kept], classes[kept])
    )  # fmt: skip
    assert loss(features, torch.full((6,), -100)) == 0


def test_tokens_with_targets_of_their_own_are_rows() -> None:
    features, classes = torch.randn(3, 4, 5), targets(12).view(3, 4)
    loss = Similarity(features, CLASSES)
    torch.testing.assert_close(loss(features, classes), loss(features.flatten(0, 1), classes.flatten()))


@pytest.mark.parametrize(("batch", "time"), [(64, 64), (64, 50), (16, 256)])
def test_of_many_tokens_a_few_are_compared_at_every_position(batch: int, time: int) -> None:
    features = torch.randn(batch, time, 3, requires_grad=True)
    loss = Similarity(features.detach(), CLASSES)
    classes = targets(batch * time).view(batch, time)
    used = gradient(loss(features, classes), features).abs().sum(2) > 0
    assert 256 <= used.sum() <= 512
    # As many positions as there can be, and the same whenever it is asked.
    assert used.any(0).sum() == min(time, int(used.sum()))
    assert torch.equal(used, gradient(loss(features, classes), features).abs().sum(2) > 0)


def test_under_autocast_cosines_are_of_full_precision() -> None:
    features, classes = torch.randn(20, 30), targets(20)
    loss = Similarity(features, CLASSES)
    exact = loss(features, classes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = loss(features, classes)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)


# --- what follows what ---


def test_both_is_a_sum_of_two_by_their_shares() -> None:
    features, classes = torch.randn(6, 5, requires_grad=True), targets(6)
    loss = local("both", features)
    assert loss.other is not None
    one, other = F.cross_entropy(loss.head(features), classes), loss.other(features, classes, None)
    torch.testing.assert_close(loss(features, classes, features), 0.01 * one + 0.99 * other)
    half = local("both", features, share=0.5)
    assert half.share == 0.5


def test_a_block_that_follows_similarity_is_not_moved_by_its_head() -> None:
    features, classes = torch.randn(6, 5, requires_grad=True), targets(6)
    loss = local("similarity", features)
    assert loss.other is not None
    found = loss(features, classes, features)
    assert torch.equal(gradient(found, features), gradient(loss.other(features, classes), features))
    matrix = loss.head[-1].weight  # type: ignore[index, union-attr]
    alone = F.cross_entropy(loss.head(features), classes)
    assert torch.equal(gradient(found, matrix), gradient(alone, matrix))  # type: ignore[arg-type]


def test_prediction_is_the_heads_loss_and_nothing_else() -> None:
    features, classes = torch.randn(6, 5), targets(6)
    loss = local("prediction", features)
    assert torch.equal(loss(features, classes, features), F.cross_entropy(loss.head(features), classes))
    assert loss.sums(features, classes)["count"] == 6


# --- reconstruction ---

MADE = {
    "maps": ((3, 5, 4, 4), (3, 2, 8, 8)),
    "maps that do not divide": ((3, 5, 3, 3), (3, 2, 8, 8)),
    "one position": ((3, 5, 1, 1), (3, 2, 8, 6)),
    "numbers": ((3, 5), (3, 7)),
    "images of numbers": ((3, 5), (3, 1, 4, 4)),
    "patches": ((3, 4, 5), (3, 1, 8, 8)),
    "patches behind a class token": ((3, 5, 6), (3, 1, 8, 8)),
}


@pytest.mark.parametrize("name", MADE)
def test_a_decoder_that_says_nothing_has_an_error_of_one(name: str) -> None:
    shape, given_shape = MADE[name]
    features, inputs = torch.randn(shape), torch.randn(given_shape)
    if name == "maps that do not divide":
        inputs = F.interpolate(torch.randn(3, 2, 1, 1), given_shape[2:])  # averaging keeps what is constant
    inputs = 40 * (inputs - inputs.mean())
    loss = Reconstruction(features, inputs, torch.zeros(3, CLASSES))
    for param in loss.decoder.parameters():
        nn.init.zeros_(param)
    torch.testing.assert_close(loss(features, targets(3), inputs), torch.tensor(1.0))


def test_a_map_makes_the_pixels_under_each_of_its_positions() -> None:
    inputs = torch.randn(2, 1, 4, 4)
    features = torch.rand(2, 3, 2, 2, requires_grad=True)
    loss = Reconstruction(features.detach(), inputs, torch.zeros(2, CLASSES))
    for param in loss.decoder.parameters():
        param.data.abs_()  # so that no ReLU is shut
    made = loss.decoder(features)
    assert made.shape == inputs.shape
    reached = gradient(made[0, 0, 2:, :2].sum(), features).abs().sum((0, 1)) > 0
    assert reached.tolist() == [[False, False], [True, False]]


def test_patches_are_put_where_they_were() -> None:
    torch.manual_seed(0)
    inputs, features = torch.randn(1, 1, 4, 4), torch.randn(1, 5, 16, requires_grad=True)
    loss = Reconstruction(features.detach(), inputs, torch.zeros(1, CLASSES))
    made = loss.decoder(as_maps(features))
    corners = [made[..., :2, :2], made[..., :2, 2:], made[..., 2:, :2], made[..., 2:, 2:]]
    for number, corner in enumerate(corners, start=1):  # the first token is of the class
        reached = gradient(corner.sum(), features).abs().sum((0, 2)) > 0
        assert reached.nonzero().flatten().tolist() == [number]


@pytest.mark.parametrize(("kept", "least", "most"), [(6, 0, 0.1), (3, 0.45, 0.65), (0, 0.95, 1.05)])
def test_what_the_features_have_lost_cannot_be_made(kept: int, least: float, most: float) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    loss = Reconstruction(torch.zeros(1, 24), torch.zeros(1, 6), torch.zeros(1, CLASSES))
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(200):
        inputs = torch.randn(256, 6, generator=generator)
        features = torch.cat([inputs[:, :kept], torch.zeros(256, 24 - kept)], 1)
        error = loss(features, targets(256), inputs)
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert least <= error.item() <= most


def test_tokens_are_told_by_cross_entropy() -> None:
    inputs, features = torch.randint(CLASSES, (3, 5)), torch.randn(3, 5, 6)
    loss = Reconstruction(features, inputs, torch.zeros(3, 5, CLASSES))
    logits = loss.decoder(F.layer_norm(features, (6,)))
    wanted = F.cross_entropy(logits.reshape(15, CLASSES), inputs.reshape(15))
    torch.testing.assert_close(loss(features, inputs, inputs), wanted)


# --- what is refused ---


@pytest.mark.parametrize(
    ("kind", "share", "message"),
    [
        ("predict", None, "did you mean 'prediction'"),
        ("both", 1.5, "from 0 to 1"),
        ("prediction", 0.5, "only"),
        ("reconstruction", None, "no inputs"),
    ],
)
def test_a_kind_or_share_that_is_not_there(kind: Any, share: float | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        local(kind, torch.zeros(2, 3), share=share)


@pytest.mark.parametrize(
    ("features", "inputs"),
    [
        (torch.zeros(2, 7, 3), torch.zeros(2, 1, 8, 8)),  # no square
        (torch.zeros(2, 7, 3), torch.zeros(2, 7, dtype=torch.int64)),  # logits per example
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 9)),
    ],
)
def test_an_input_that_cannot_be_made_is_refused(features: Tensor, inputs: Tensor) -> None:
    with pytest.raises(UsageError, match="reconstruction"):
        local("reconstruction", features, inputs)


def test_numbers_are_not_alike_as_classes_are() -> None:
    with pytest.raises(UsageError, match="float32"):
        Similarity(torch.zeros(2, 3), 2)(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(UsageError, match="at least 2"):
        Similarity(torch.zeros(2, 3), 1)


# --- in a learner ---


@pytest.mark.parametrize("kind", ["prediction", "similarity", "both"])
@pytest.mark.parametrize("task", ["text", "maps", "patches", "numbers"])
def test_no_gradient_crosses_and_everything_has_one(kind: Any, task: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 3, 8, 8)
    tokens = torch.randint(CLASSES, (6, 9))
    model, batch = {
        "text": lambda: (Llama(CLASSES, preset="tiny", context=8), Pair(tokens[:, :-1], tokens[:, 1:])),
        "maps": lambda: (ResNetCifar(20, classes=CLASSES), Pair(images, targets(6))),
        "patches": lambda: (ViT(8, CLASSES, hidden=16, layers=4, heads=2), Pair(images, targets(6))),
        "numbers": lambda: (MLP(192, CLASSES, hidden=[12] * 5), Pair(images, targets(6))),
    }[task]()
    name: Any = "next_token" if task == "text" else "classification"
    learner = LocalUpdates(model, name, sample=batch.inputs[:2], blocks=3, local=kind)
    learner.step(batch)
    assert all(param.grad is not None and param.grad.isfinite().all() for param in learner.module.parameters())
    for block, part in enumerate(learner.parts[:-1]):
        before = features = None
        for each in range(block + 1):
            before, features = features, learner.cut.run(each, batch.inputs, features)
        assert features is not None
        loss = learner.local_loss(block)(features, batch.targets, batch.inputs, before)
        found = torch.autograd.grad(loss, part.params)
        for param, wanted in zip(part.params, found, strict=True):
            torch.testing.assert_close(param.grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["prediction", "similarity", "both", "reconstruction"])
def test_a_block_learns_digits_by_every_loss(kind: Any) -> None:
    images, digits = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    inputs, classes = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
    block = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
    with torch.no_grad():
        features = block(inputs[:2])
    loss = make_local_loss(
        kind, "linear", features, torch.zeros(2, 10), block, objective("classification"), inputs[:2]
    )  # fmt: skip
    optimizer = torch.optim.Adam([*block.parameters(), *loss.parameters()], lr=3e-3)
    for step in range(200):
        rows = slice(step * 128 % 1408, step * 128 % 1408 + 128)
        loss(block(inputs[rows]), classes[rows], inputs[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        sums = loss.sums(block(inputs[1437:]), classes[1437:])
    assert sums["correct"] / sums["count"] > 0.93
