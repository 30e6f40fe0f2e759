"""Evaluation adds up the same examples, however many processes share them and however they are cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.evaluation import _share, evaluate
from leantrain.processes import World
from tests.small_runs import Tokens

ALONE = World(0, 1, torch.device("cpu"))


class Counting:
    """A learner whose "loss" is the sum of the tokens."""

    def evaluate(self, batch: Any) -> dict[str, torch.Tensor]:
        size = torch.tensor(batch.inputs.numel())
        return {"loss_sum": batch.inputs.sum(), "count": size, "correct": size // 2}


@settings(max_examples=40, deadline=None)
@given(world=st.integers(1, 5), size=st.integers(1, 9), limit=st.none() | st.integers(1, 8))
def test_processes_see_every_batch_once_in_equally_many_rounds(world: int, size: int, limit: int | None) -> None:
    batches = list(Tokens().eval_batches(size, limit))
    shares = [list(_share(iter(batches), World(r, world, torch.device("cpu")))) for r in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = [batch.inputs.data_ptr() for share in shares for batch, counts in share if counts]
    assert len(counted) == len(batches) == len({*counted})


@pytest.mark.parametrize("size", [1, 5, 22, 50])
def test_the_mean_does_not_depend_on_the_batch_size(size: int) -> None:
    data = Tokens()
    tokens = next(data.eval_batches(22)).inputs.double()
    values = evaluate(Counting(), data, ALONE, size, None)  # type: ignore[arg-type]
    assert values["val_loss"] == pytest.approx(tokens.mean().item())
    assert values["val_perplexity"] == pytest.approx(math.exp(values["val_loss"]))
    assert "val_accuracy" not in values


def test_a_limit_keeps_the_first_batches() -> None:
    data = Tokens()
    first = next(data.eval_batches(5)).inputs.double().mean().item()
    assert evaluate(Counting(), data, ALONE, 5, 1)["val_loss"] == pytest.approx(first)  # type: ignore[arg-type]


def test_classes_have_an_accuracy_and_a_hopeless_loss_has_an_infinite_perplexity() -> None:
    data = Tokens()
    data.task = "classification"
    assert evaluate(Counting(), data, ALONE, 5, None)["val_accuracy"] == 0.5  # type: ignore[arg-type]
    hopeless = Counting()
    hopeless.evaluate = lambda batch: {"loss_sum": torch.tensor(1e6), "count": torch.tensor(1)}  # type: ignore[method-assign]
    assert evaluate(hopeless, Tokens(), ALONE, 22, None)["val_perplexity"] == math.inf  # type: ignore[arg-type]


def test_no_held_out_data_is_not_a_number() -> None:
    data = Tokens()
    data.eval_batches = lambda size, limit=None: iter(())  # type: ignore[method-assign]
    assert math.isnan(evaluate(Counting(), data, ALONE, 5, None)["val_loss"])  # type: ignore[arg-type]
