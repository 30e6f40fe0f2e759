"""The loop for those who have none: against one written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from leantrain.errors import UsageError
from leantrain.learn import Backprop, Batch, LocalUpdates, Part, StepResult, Whole
from tests.learn.small_networks import Examples, equal, network, points


def loader(examples: int = 20, batch_size: int = 8, ids: bool = False) -> DataLoader[Any]:
    batch = points(examples)
    extra = (torch.arange(examples),) if ids else ()
    return DataLoader(TensorDataset(batch.inputs, batch.targets, *extra), batch_size=batch_size)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_it_is_the_usual_loop_bit_for_bit(clip: float | None) -> None:
    ours, theirs = network(), network()
    means = Backprop(ours, "classification").fit(
        loader(), partial(torch.optim.SGD, lr=0.1, momentum=0.9), epochs=3, clip=clip
    )
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    expected = []
    for _ in range(3):
        losses = []
        for inputs, targets in loader():
            loss = F.cross_entropy(theirs(inputs), targets)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(theirs.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        expected.append(torch.stack(losses).mean().item())
    assert means == expected
    assert equal(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_without_an_optimizer_it_is_adamw_and_it_learns() -> None:
    model = network()
    means = Backprop(model, "classification").fit(loader(64), epochs=30)
    assert len(means) == 30
    assert means[-1] < means[0]


def test_blocks_are_clipped_each_by_itself() -> None:
    taken: list[list[float]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            norms = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
            taken.append([torch.stack(norms).norm().item()])
            super().step(closure)

    learner = LocalUpdates(network(), "classification", sample=points().inputs, cut=["2", "4"])
    learner.fit(loader(8), partial(Watched, lr=0.1), clip=0.05)
    assert len(taken) == 3  # an optimizer for every block
    for (norm,) in taken:
        assert norm == pytest.approx(0.05, rel=1e-4)


class Halves(Whole):
    """First the first half of a network is trained, then the second, at twice the rate."""

    positions: list[float]

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__(model, "classification")
        self.positions, self.seen = [], []
        self.stage = 0

    @property
    def parts(self) -> list[Part]:
        half = len(self.module) // 2  # type: ignore[arg-type]
        chosen = self.module[half:] if self.stage else self.module[:half]  # type: ignore[index]
        return [Part(tuple(chosen.parameters()), rate=2.0 if self.stage else 1.0)]

    def enter(self, spent: float) -> float:
        self.positions.append(spent)
        self.stage = int(spent >= 0.5)
        return spent

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        self.seen.append(getattr(batch, "ids", None))
        loss = self.objective.mean(self._logits(batch.inputs), batch.targets)
        trained = list(self.parts[0].params)
        for param, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            param.grad = weight * gradient
        return StepResult(loss=loss.detach(), examples_used=len(batch))


def test_stages_get_optimizers_of_their_own_at_their_parts_rates() -> None:
    made: list[torch.optim.SGD] = []

    def make(params: list[nn.Parameter]) -> torch.optim.SGD:
        made.append(torch.optim.SGD(params, lr=0.1))
        return made[-1]

    model = network()
    learner = Halves(model)
    learner.fit(loader(ids=True), make, epochs=2)
    assert learner.positions == [pytest.approx(number / 6) for number in range(6)]
    assert [optimizer.param_groups[0]["lr"] for optimizer in made] == [0.1, 0.2]
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in made] == [6, 6]
    assert all(param.grad is None for param in model.parameters())
    assert [ids.tolist() for ids in learner.seen[:3]] == [list(range(8)), list(range(8, 16)), list(range(16, 20))]


def test_batches_may_be_objects() -> None:
    class Loader:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[Examples]:
            return iter([points(seed=0), points(seed=1)])

    assert len(Backprop(network(), "classification").fit(Loader(), epochs=2)) == 2


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(points().inputs, points().targets, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, r"epochs must be >= 1 and clip > 0 or None, got epochs=0, clip=None"),
        ({"clip": 0.0}, r"got epochs=1, clip=0\.0"),
        ({"clip": float("nan")}, r"got epochs=1, clip=nan"),
        ({"loader": iter([points()])}, r"needs a loader with a length, at least one batch long, got list_iterator"),
        ({"loader": []}, r"needs a loader with a length, at least one batch long, got list"),
        ({"loader": DataLoader(Stream())}, r"needs a loader with a length, at least one batch long, got DataLoader"),
        ({"loader": [(torch.zeros(2, 5),)]}, r"a loader must give \(inputs, targets\) or .*, got 1 things"),
    ],
)
def test_what_cannot_work_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Backprop(network(), "classification").fit(**{"loader": loader(), **arguments})
