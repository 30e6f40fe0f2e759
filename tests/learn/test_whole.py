"""The default stations of a learner, as a subclass of a few lines gets them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.learn import Batch, Learner, StepResult, Whole
from tests.learn.small_networks import equal, gradients, network, points


class Sign(Whole):
    """Follows the signs of the gradient."""

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        loss = self.objective.mean(self._logits(batch.inputs), batch.targets)
        loss.backward()
        for param in self.module.parameters():
            if param.grad is not None:
                param.grad = weight * param.grad.sign()
        return StepResult(loss=loss.detach(), examples_used=len(batch))


def test_a_subclass_needs_a_step_and_nothing_else() -> None:
    model, batch = network(), points(32)
    learner: Learner = Sign(model, "classification")
    assert learner.module is model
    assert learner.stage == 0
    assert not learner.completes_late
    assert [learner.enter(spent) for spent in (0.0, 0.3, 0.9)] == [0.0, 0.3, 0.9]
    assert learner.state_dict() == {}
    learner.load_state_dict({})
    learner.step(batch, weight=0.5)
    found = gradients(model)
    learner.hand_over()
    assert equal(gradients(model), found)
    assert {value.item() for gradient in found.values() if gradient is not None for value in gradient.flatten()} <= {
        -0.5, 0.0, 0.5,
    }  # fmt: skip
    before = learner.evaluate(batch)["loss_sum"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        learner.step(batch)
    assert learner.evaluate(batch)["loss_sum"] < 0.9 * before


def test_without_a_step_there_is_none() -> None:
    with pytest.raises(NotImplementedError):
        Whole(network(), "classification").step(points())


def test_the_part_is_what_requires_gradients_now() -> None:
    model = network()
    learner = Whole(model, "classification")
    (part,) = learner.parts
    assert [id(p) for p in part.params] == [id(p) for p in model.parameters()]
    model[0].requires_grad_(False)
    (part,) = learner.parts
    assert len(part.params) == len(list(model.parameters())) - 2


def test_what_is_run_may_be_wrapped_while_what_is_trained_stays() -> None:
    model = network()
    learner = Whole(model, "classification")
    wrapped = nn.Sequential(model)
    learner.attach(wrapped)
    assert learner.model is wrapped
    assert learner.module is model


def test_a_function_may_be_the_loss() -> None:
    def hinge(logits: Tensor, targets: Tensor) -> Tensor:
        return F.multi_margin_loss(logits, targets)

    model, batch = network(), points(10)
    learner = Whole(model, hinge)
    found = learner.evaluate(batch)
    logits = model(batch.inputs)
    torch.testing.assert_close(found["loss_sum"] / found["count"], hinge(logits, batch.targets), check_dtype=False)
    assert found["correct"] == (logits.argmax(1) == batch.targets).sum()
    pieces = [learner.evaluate(SimpleNamespace(inputs=x, targets=y)) for x, y in zip(  # type: ignore[arg-type]
        batch.inputs.split(4), batch.targets.split(4), strict=True)]  # fmt: skip
    torch.testing.assert_close(sum(piece["loss_sum"] for piece in pieces), found["loss_sum"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "ranking"}, r"task 'ranking' is unknown"),
        ({"precision": "half"}, r"precision 'half' is unknown.*allowed: bf16, fp32"),
        ({"model": nn.Tanh()}, r"the model Tanh has no parameters to train"),
    ],
)
def test_what_cannot_work_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Whole(**{"model": network(), "loss": "classification", **arguments})  # type: ignore[arg-type]
