"""Leaving a network early: the same numbers as by hand, nothing behind is computed, and the right place is chosen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from leantrain.analysis.early_exit import OUTPUT, EarlyExit, early_exit
from leantrain.analysis.hidden import look
from leantrain.analysis.probe import probe
from leantrain.errors import UsageError
from leantrain.learn import LocalUpdates
from leantrain.learn.fitting import Pair
from leantrain.nn import MLP, Llama, ResNetCifar

Batches = list[tuple[Tensor, Tensor]]


def classed(examples: int = 400, seed: int = 0) -> Batches:
    """Points of a plane, in a ring or inside it, in more coordinates than they need."""
    generator = torch.Generator().manual_seed(seed)
    angle, far = torch.rand(2, examples, generator=generator)
    labels = (far > 0.5).long()
    radius = 0.2 + 0.5 * far + 0.3 * labels
    points = torch.stack([radius * (6.2832 * angle).cos(), radius * (6.2832 * angle).sin()], 1)
    inputs = points @ torch.randn(2, 10, generator=torch.Generator().manual_seed(9))
    return list(zip(inputs.split(100), labels.split(100), strict=True))


def mlp(hidden: int = 4) -> MLP:
    torch.manual_seed(0)
    return MLP(features=10, classes=2, hidden=[32] * hidden)


def trained_in_blocks(hidden: int = 4) -> LocalUpdates:
    model = mlp(hidden)
    learner = LocalUpdates(model, "classification", sample=classed()[0][0][:4], cut=[f"layers.{i}" for i in (1, 2, 3)])
    optimizer = torch.optim.Adam(learner.module.parameters(), 3e-3)
    for _ in range(20):
        for inputs, targets in classed():
            learner.step(Pair(inputs, targets))
            optimizer.step()
            optimizer.zero_grad()
    return learner


def test_an_exit_is_its_head_on_the_features_that_arrive_there() -> None:
    model, head, x = mlp(), nn.Linear(32, 2), classed()[0][0]
    leaves = EarlyExit(model, "layers.2", head)
    h = x
    for layer in model.layers[:2]:
        h = layer(h).relu()
    assert torch.equal(leaves(x), head(h))


def test_what_lies_behind_is_not_computed() -> None:
    model, called = mlp(), list[str]()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: called.append(name))
    EarlyExit(model, "layers.2", nn.Linear(32, 2))(classed()[0][0])
    assert called == ["layers.0", "layers.1"]


def test_the_share_of_flops_is_that_of_the_products_that_are_left() -> None:
    leaves = EarlyExit(mlp(), "layers.2", nn.Linear(32, 2))
    left, all_of_it = 10 * 32 + 32 * 32 + 32 * 2, 10 * 32 + 3 * 32 * 32 + 32 * 2
    assert leaves.flops_share(torch.zeros(5, 10)) == pytest.approx(left / all_of_it)
    assert EarlyExit(mlp(), OUTPUT, None).flops_share(torch.zeros(5, 10)) == 1


def test_gradients_reach_what_was_run_and_nothing_else() -> None:
    model = mlp()
    leaves = EarlyExit(model, "layers.2", nn.Linear(32, 2))
    leaves(classed()[0][0]).sum().backward()
    assert [layer.weight.grad is not None for layer in model.layers] == [True, True, False, False]
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(classed()[0][0])  # and the model still runs to its end


def test_the_heads_of_a_learner_are_judged_as_it_judges_them() -> None:
    learner = trained_in_blocks()
    found = early_exit(learner.model, learner, classed(seed=1))
    inputs, targets = (torch.cat(each) for each in zip(*classed(seed=1), strict=True))
    sums = learner.evaluate(Pair(inputs, targets))
    by_learner = [float(sums[f"block{block}/correct"]) / 400 for block in (1, 2, 3)] + [float(sums["correct"]) / 400]
    assert list(found.accuracies) == ["layers.1", "layers.2", "layers.3", OUTPUT]
    assert list(found.accuracies.values()) == pytest.approx(by_learner)
    assert found.accuracies[found.name] == max(by_learner) > 0.8
    correct = float((found.eval()(inputs).argmax(1) == targets).float().mean())
    assert correct == pytest.approx(found.accuracies[found.name])


def constant(value: int) -> nn.Module:
    """A head that always says the same class, of one of 2."""
    head = nn.Linear(32, 2)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.eye(2)[value])
    return head


@pytest.mark.parametrize(
    ("tolerance", "name"), [(0.0, "layers.2"), (0.19, "layers.2"), (0.21, "layers.1"), (1.0, "layers.1")]
)
def test_the_first_exit_within_the_tolerance_is_taken(tolerance: float, name: str) -> None:
    """40 % of labels are 0; heads that say 1 are right in 60 %."""
    inputs, targets = torch.randn(10, 10), torch.tensor([0] * 4 + [1] * 6)
    model = mlp()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 0.0]))
    heads = {"layers.3": constant(1), "layers.1": constant(0), "layers.2": constant(1)}  # given in another order
    found = early_exit(model, heads, [(inputs, targets)], tolerance=tolerance)
    assert found.accuracies == pytest.approx({"layers.1": 0.4, "layers.2": 0.6, "layers.3": 0.6, OUTPUT: 0.4})
    assert found.name == name and found.head is heads[name]


def test_the_whole_model_is_taken_where_it_is_best() -> None:
    learner = trained_in_blocks()
    wrong = {"layers.2": constant(0)}
    found = early_exit(learner.model, wrong, classed())
    x = classed()[0][0]
    assert found.name == OUTPUT and torch.equal(found(x), learner.model(x))


def test_read_outs_that_are_fitted_are_the_probes() -> None:
    learner, batches = trained_in_blocks(), classed(seed=1)
    found, seen = early_exit(learner.model, None, batches), probe(learner.model, batches)
    assert found.accuracies == {place.name: place.linear_probe for place in seen.places[1:]} | {OUTPUT: seen.accuracy}
    named = early_exit(learner.model, ["layers.3"], batches, tolerance=1.0)
    assert list(named.accuracies) == ["layers.3", OUTPUT] and named.name == "layers.3"
    inputs, targets = (torch.cat(each) for each in zip(*batches, strict=True))
    judging = ~look(learner.model, batches, None, 2048).fitting
    correct = (named(inputs).argmax(1) == targets)[judging].float().mean()
    assert float(correct) == pytest.approx(named.accuracies["layers.3"])


def images() -> tuple[nn.Module, Tensor, Tensor]:
    return ResNetCifar(20), torch.randn(40, 3, 32, 32), torch.arange(40) // 2 % 10


def text() -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.randint(30, (40, 16))
    return Llama(50, 16, hidden=16, mlp_hidden=32, layers=2, heads=2), tokens, tokens


@pytest.mark.parametrize("kind", [images, text])
def test_read_outs_of_maps_and_tokens_score_all_classes_of_the_model(
    kind: Callable[[], tuple[nn.Module, Tensor, Tensor]],
) -> None:
    torch.manual_seed(0)
    model, inputs, targets = kind()
    found = early_exit(model, ["layers.1"], [(inputs, targets)], tolerance=1.0)
    assert found.name == "layers.1"
    model.eval()
    with torch.no_grad():
        scores, logits = found(inputs), model(inputs)
    assert scores.shape == logits.shape
    unseen = torch.ones(logits.shape[-1], dtype=torch.bool)
    unseen[targets.unique()] = False
    assert bool((scores[..., unseen] == 0).all())
    judging = ~look(model, [(inputs, targets)], ["layers.1"], 2048).fitting
    judged = (scores.argmax(-1) == targets).flatten()[judging].float().mean()
    assert float(judged) == pytest.approx(found.accuracies["layers.1"], abs=1e-6)
    assert 0 < found.flops_share(inputs[:2]) < 0.6


def test_it_can_be_saved_and_loaded() -> None:
    leaves, other = EarlyExit(mlp(), "layers.2", nn.Linear(32, 2)), EarlyExit(mlp(), "layers.2", nn.Linear(32, 2))
    other.load_state_dict(leaves.state_dict())
    x = classed()[0][0]
    assert torch.equal(leaves(x), other(x))


def test_bad_input_is_named() -> None:
    model, batches = mlp(), classed()
    for call, message in [
        (lambda: early_exit(model, None, batches, tolerance=-0.1), "tolerance=-0.1"),
        (lambda: early_exit(model, "layers.1", batches), "where must be a learner in blocks, .* got 'layers.1'"),
        (lambda: early_exit(model, {"layers.1": nn.Linear(32, 2)}, []), "at least one example"),
        (lambda: EarlyExit(model, "layers.7", nn.Linear(32, 2)), r"no module 'layers\.7'"),
        (lambda: EarlyExit(model, "layers.1", None), "an exit needs a head"),
        (lambda: EarlyExit(model, "layers", nn.Linear(1, 1))(batches[0][0]), "the forward pass does not call it"),
    ]:
        with pytest.raises(UsageError, match=message):
            call()
