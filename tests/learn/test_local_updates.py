"""Local updates: every block's gradient is that of its own losses, against autograd on a model taken apart by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.learn import Backprop, LocalUpdates
from leantrain.ledger import record
from leantrain.ledger.ledger import Ledger
from leantrain.nn import MLP, ResNetCifar
from tests.learn.small_networks import Examples, equal, gradients, language_model, network, points, sentences

SCHEMES: list[dict[str, Any]] = [
    {"scheme": "greedy"},
    {"scheme": "chunked"},
    {"scheme": "overlapping"},
    {"scheme": "overlapping", "reach": 3, "follows": "farthest"},
]
DEPTH = 5


def local(model: nn.Module, cuts: Sequence[int], batch: Examples, **how: Any) -> LocalUpdates:
    return LocalUpdates(model, "classification", sample=batch.inputs[:2], cut=[str(each) for each in cuts], **how)


# --- the gradients ---


def by_hand(learner: LocalUpdates, model: nn.Sequential, cuts: Sequence[int], batch: Examples) -> dict[str, Tensor]:
    """What every parameter of the model follows, from one graph per loss that begins where the loss no longer reaches.

    Heads follow the loss that is theirs.
    """
    bounds = [0, *cuts, DEPTH + 1]
    blocks = [list(model)[start:end] for start, end in pairwise(bounds)]
    with torch.no_grad():
        inputs = [batch.inputs]
        for block in blocks[:-1]:
            inputs.append(nn.Sequential(*block)(inputs[-1]))
    names = {id(param): name for name, param in learner.module.named_parameters()}
    found = {name: torch.zeros_like(param) for name, param in learner.module.named_parameters()}
    last = len(blocks) - 1
    for number in range(len(blocks)):
        first = max(0, number - learner.reach)
        features = inputs[first]
        for block in blocks[first : number + 1]:
            features = nn.Sequential(*block)(features)
        if number == last:
            loss, head = F.cross_entropy(features, batch.targets), []
        else:
            loss = learner.local_loss(number)(features, batch.targets, batch.inputs, inputs[number])
            head = learner.head_parameters(number)
        for each in range(first, number + 1):
            if learner.follows == "sum" or number == min(each + learner.reach, last):
                params = list(nn.Sequential(*blocks[each]).parameters())
                for param, gradient in zip(params, torch.autograd.grad(loss, params, retain_graph=True), strict=True):
                    found[names[id(param)]] += gradient
        if head:
            for param, gradient in zip(head, torch.autograd.grad(loss, head), strict=True):
                found[names[id(param)]] += gradient
    return found


cuts = st.lists(st.integers(1, DEPTH), unique=True, max_size=DEPTH).map(sorted)


@given(
    cuts=cuts, scheme=st.sampled_from(["greedy", "chunked", "overlapping"]), reach=st.integers(1, DEPTH + 1),
    follows=st.sampled_from(["sum", "farthest"]), weight=st.sampled_from([1.0, 0.25]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_parameter_follows_the_losses_that_reach_its_block(
    cuts: list[int], scheme: Any, reach: int, follows: Any, weight: float, seed: int
) -> None:
    model, batch = network(DEPTH, seed, torch.float64), points(6, seed, torch.float64)
    learner = local(model, cuts, batch, scheme=scheme, reach=reach, follows=follows)
    expected = by_hand(learner, model, cuts, batch)
    result = learner.step(batch, weight=weight)
    for name, gradient in gradients(learner.module).items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, weight * expected[name], rtol=1e-9, atol=1e-12)
    assert torch.equal(result.loss, F.cross_entropy(model(batch.inputs), batch.targets))


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_a_loss_that_is_changed_changes_only_the_blocks_it_reaches(reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loss in turn is counted a thousandfold."""
    batch = points()
    how: dict[str, Any] = {"scheme": "overlapping", "reach": reach} if reach else {"scheme": "greedy"}
    learner = local(network(), [1, 2, 3, 4, 5], batch, **how)
    learner.step(batch)
    before = [[param.grad for param in block] for block in learner.cut.parameters]
    for number in range(5):
        learner.module.zero_grad()
        original = learner.local_loss(number).forward
        with monkeypatch.context() as patched:
            patched.setattr(learner.local_loss(number), "forward", lambda *args, f=original: 1000 * f(*args))
            learner.step(batch)
        changed = [
            any(not torch.equal(param.grad, old) for param, old in zip(block, olds, strict=True))
            for block, olds in zip(learner.cut.parameters, before, strict=True)
        ]
        assert changed == [number - reach <= block <= number for block in range(6)]


@pytest.mark.parametrize("how", SCHEMES)
def test_the_last_block_follows_the_gradient_of_backpropagation_bit_for_bit(how: dict[str, Any]) -> None:
    batch = points()
    ours, theirs = network(), network()
    learner = local(ours, [1, 2, 3, 4], batch, **how)
    result = learner.step(batch)
    reference = Backprop(theirs, "classification").step(batch)
    assert torch.equal(result.loss, reference.loss)
    for number in (4, 5):
        assert equal(gradients(ours[number]), gradients(theirs[number]))
    assert not equal(gradients(ours[0]), gradients(theirs[0]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", SCHEMES)
def test_one_block_is_backpropagation_bit_for_bit(how: dict[str, Any], precision: Any) -> None:
    def trained(learner: Any) -> nn.Module:
        optimizer = torch.optim.AdamW(learner.module.parameters(), lr=0.01)
        torch.manual_seed(1)  # for dropout
        for number in range(20):
            learner.step(points(seed=number))
            learner.hand_over()
            optimizer.step()
            optimizer.zero_grad()
        return learner.module

    def dropping() -> nn.Module:
        return nn.Sequential(network(), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 4))

    torch.manual_seed(2)
    ours = dropping()
    theirs = dropping()
    theirs.load_state_dict(ours.state_dict())
    learner = LocalUpdates(ours, "classification", sample=points().inputs, blocks=1, precision=precision, **how)
    assert learner.module is ours
    left, right = trained(learner), trained(Backprop(theirs, "classification", precision=precision))
    assert equal(dict(left.state_dict()), dict(right.state_dict()))


@pytest.mark.parametrize("cuts", [[3], [2, 4], [1, 2, 3, 4, 5]])
def test_a_reach_of_all_blocks_and_the_farthest_loss_is_backpropagation(cuts: list[int]) -> None:
    batch = points(dtype=torch.float64)
    ours, theirs = network(dtype=torch.float64), network(dtype=torch.float64)
    local(ours, cuts, batch, scheme="overlapping", reach=len(cuts), follows="farthest").step(batch)
    Backprop(theirs, "classification").step(batch)
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("how", SCHEMES)
@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_add_up_to_the_whole_batch(how: dict[str, Any], parts: int) -> None:
    batch = points(6, dtype=torch.float64)
    whole = local(network(dtype=torch.float64), [2, 4], batch, **how)
    pieces = local(network(dtype=torch.float64), [2, 4], batch, **how)
    pieces.auxiliaries.load_state_dict(whole.auxiliaries.state_dict())
    whole.step(batch)
    for inputs, targets in zip(batch.inputs.chunk(parts), batch.targets.chunk(parts), strict=True):
        pieces.step(Examples(inputs, targets), weight=1 / parts)
    for name, gradient in gradients(whole.module).items():
        torch.testing.assert_close(gradients(pieces.module)[name], gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("how", SCHEMES)
def test_language_models_train_and_report_every_blocks_loss(how: dict[str, Any]) -> None:
    batch, model = sentences(), language_model()
    learner = LocalUpdates(model, "next_token", sample=batch.inputs[:2], blocks=4, **how)
    optimizer = torch.optim.AdamW(learner.module.parameters(), lr=0.02)
    first = learner.step(batch)
    assert list(first.metrics) == ["block1/loss", "block2/loss", "block3/loss", "block4/loss"]
    assert torch.equal(first.metrics["block4/loss"], first.loss)
    assert not any(value.requires_grad or value.dim() for value in first.metrics.values())
    assert all(gradient is not None for gradient in gradients(learner.module).values())
    for _ in range(30):
        optimizer.step()
        optimizer.zero_grad()
        last = learner.step(batch)
    assert all(last.metrics[name] < 0.8 * first.metrics[name] for name in first.metrics)


@pytest.mark.parametrize("how", SCHEMES)
def test_in_bf16_gradients_and_losses_are_float32_and_near(how: dict[str, Any]) -> None:
    batch = points(32)
    exact, rounded = local(network(), [2, 4], batch, **how), local(network(), [2, 4], batch, precision="bf16", **how)
    rounded.auxiliaries.load_state_dict(exact.auxiliaries.state_dict())
    seen: list[torch.dtype] = []
    rounded.module.get_submodule("3.0").register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    losses = [learner.step(batch).loss for learner in (exact, rounded)]
    assert seen == [torch.bfloat16]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    for name, gradient in gradients(exact.module).items():
        ours = gradients(rounded.module)[name]
        assert gradient is not None and ours is not None and ours.dtype == torch.float32
        assert (ours - gradient).norm() < 0.06 * gradient.norm() + 1e-6


def test_changes_in_place_at_the_cut_do_no_harm() -> None:
    def with_relus(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Linear(5, 7), nn.ReLU(inplace), nn.Linear(7, 7), nn.ReLU(inplace), nn.Linear(7, 4)]
        return nn.Sequential(*layers)

    batch = points()
    learners = [local(with_relus(inplace), [1, 3], batch) for inplace in (False, True)]
    learners[1].auxiliaries.load_state_dict(learners[0].auxiliaries.state_dict())
    for learner in learners:
        learner.step(batch)
    assert equal(gradients(learners[0].module), gradients(learners[1].module))


@pytest.mark.parametrize("how", SCHEMES)
def test_what_the_pass_does_not_touch_gets_no_gradient(how: dict[str, Any]) -> None:
    batch, model = points(), network()
    model.idle = nn.Linear(2, 2)
    model.forward = nn.Sequential(*list(model)[:-1]).forward  # type: ignore[method-assign]
    learner = local(model, [2, 4], batch, **how)
    learner.step(batch)
    assert all(param.grad is None for param in model.idle.parameters())
    assert all(param.grad is not None for block in learner.cut.parameters[:2] for param in block)


# --- what it saves ---


def peak(model: nn.Module, learner: Any, batch: Examples) -> int:
    """Most bytes kept for the backward pass at once."""
    with Ledger(model, memory_every=1) as ledger:
        learner.step(batch)
        ledger.step_done(examples=len(batch))
    found = ledger.summary()["peak_bytes"]["activations"]
    assert isinstance(found, int)
    return found


WIDTH, BATCH, LAYERS = 256, 128, 8


def deep() -> tuple[nn.Module, Examples]:
    batch = Examples(torch.randn(BATCH, WIDTH), torch.randint(10, (BATCH,)))
    return MLP(WIDTH, classes=10, hidden=(WIDTH,) * LAYERS), batch


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_no_more_is_kept_than_one_block_and_its_input(blocks: int) -> None:
    model, batch = deep()
    learner = LocalUpdates(model, "classification", sample=batch.inputs[:2], blocks=blocks)
    assert peak(model, learner, batch) == pytest.approx((LAYERS / blocks + 1) * BATCH * WIDTH * 4, rel=0.05)
    model, batch = deep()
    assert peak(model, Backprop(model, "classification"), batch) == pytest.approx(LAYERS * BATCH * WIDTH * 4, rel=0.05)


@pytest.mark.parametrize("reach", [1, 3])
def test_overlapping_keeps_as_many_blocks_as_a_loss_goes_through(reach: int) -> None:
    model, batch = deep()
    learner = LocalUpdates(
        model, "classification", sample=batch.inputs[:2], blocks=LAYERS, scheme="overlapping", reach=reach
    )
    assert peak(model, learner, batch) == pytest.approx((reach + 2) * BATCH * WIDTH * 4, rel=0.05)


def test_sixteen_layers_keep_less_than_a_quarter() -> None:
    batch = Examples(torch.randn(BATCH, WIDTH), torch.randint(10, (BATCH,)))
    model = MLP(WIDTH, classes=10, hidden=(WIDTH,) * 16)
    whole = peak(model, Backprop(model, "classification"), batch)
    learner = LocalUpdates(model, "classification", sample=batch.inputs[:2], blocks=16)
    assert peak(model, learner, batch) < 0.25 * whole


# --- around a step ---


def test_phases_are_recorded_block_by_block() -> None:
    seen: list[str] = []

    class Recorder:
        @contextmanager
        def phase(self, name: str, block: int | None = None) -> Iterator[None]:
            seen.append(f"({name}{block or ''}")
            yield
            seen.append(")")

        def add(self, name: str, amount: float) -> None: ...

    learner = local(network(), [2, 4], points())
    previous = record.activate(Recorder())
    try:
        learner.step(points())
    finally:
        record.activate(previous)
    assert "".join(seen) == "(forward(forward1(backward1))(forward2(backward2))(forward3(backward3)))"


def test_chunked_makes_two_blocks_unless_told_otherwise() -> None:
    batch = points()
    learner = LocalUpdates(network(), "classification", sample=batch.inputs, scheme="chunked")
    assert len(learner.cut) == 2
    learner = LocalUpdates(network(), "classification", sample=batch.inputs, scheme="chunked", blocks=3)
    assert len(learner.cut) == 3


def test_batch_normalisation_refuses_a_batch_of_one() -> None:
    model = ResNetCifar(classes=4)
    one = Examples(torch.randn(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64))
    learner = LocalUpdates(model, "classification", sample=torch.randn(2, 3, 16, 16), blocks=2)
    with pytest.raises(UsageError, match=r"batches of at least 2 examples to train on, got 1"):
        learner.step(one)
    assert learner.evaluate(one)["count"] == 1
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    learner.auxiliaries.eval()
    learner.step(one)  # frozen normalisation takes no means


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "gready"}, r"scheme 'gready' is unknown; did you mean 'greedy'\?"),
        ({"scheme": "overlapping", "follows": "next"}, r"follows 'next' is unknown.*allowed: farthest, sum"),
        ({"scheme": "overlapping", "reach": 0}, r"reach must be >= 1, got reach=0"),
        ({"scheme": "greedy", "blocks": None}, r"give cut=\[names of modules\] or blocks=number"),
        ({"blocks": 9}, r"blocks must be 1 to 6, as many as Sequential can be cut into; got 9"),
        ({"precision": "fp16"}, r"precision 'fp16' is unknown"),
        ({"loss": "ranking"}, r"task 'ranking' is unknown"),
    ],
)
def test_what_cannot_work_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LocalUpdates(**{  # type: ignore[arg-type]
            "model": network(), "loss": "classification", "sample": points().inputs, "blocks": 2, **arguments
        })  # fmt: skip
