"""The losses of the three tasks, against their formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.errors import UsageError
from leantrain.learn.losses import Task, mean_loss, sums
from leantrain.outputs import logits_of


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


@given(batch=st.integers(1, 5), length=st.integers(1, 6), vocab=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_next_token_is_the_mean_negative_log_probability_of_the_targets(
    batch: int, length: int, vocab: int, seed: int
) -> None:
    outputs, targets = drawn(batch, length, vocab, seed=seed), classes(batch, length, below=vocab, seed=seed)
    log_p = outputs - outputs.exp().sum(-1, keepdim=True).log()
    each = -torch.stack([log_p[b, t, targets[b, t]] for b in range(batch) for t in range(length)])
    torch.testing.assert_close(mean_loss("next_token", outputs, targets), each.mean())
    result = sums("next_token", outputs, targets)
    torch.testing.assert_close(result["loss_sum"], each.sum())
    assert result["count"] == batch * length
    assert result["correct"] == sum(
        int(outputs[b, t].argmax() == targets[b, t]) for b in range(batch) for t in range(length)
    )


def test_classification_is_the_same_per_example() -> None:
    outputs, targets = drawn(6, 4), classes(6, below=4)
    as_tokens = mean_loss("next_token", outputs[None], targets[None])
    assert torch.equal(mean_loss("classification", outputs, targets), as_tokens)
    assert sums("classification", outputs, targets)["count"] == 6


@pytest.mark.parametrize(
    ("outputs_shape", "targets_shape"), [((5, 1), (5,)), ((5, 1), (5, 1)), ((5, 3), (5, 3)), ((5,), (5,))]
)
def test_regression_is_the_mean_square_over_elements(
    outputs_shape: tuple[int, ...], targets_shape: tuple[int, ...]
) -> None:
    outputs, targets = drawn(*outputs_shape), drawn(*targets_shape, seed=1)
    square = (outputs.flatten() - targets.flatten()) ** 2
    torch.testing.assert_close(mean_loss("regression", outputs, targets), square.mean())
    result = sums("regression", outputs, targets)
    assert set(result) == {"loss_sum", "count"}
    torch.testing.assert_close(result["loss_sum"], square.sum())
    assert result["count"] == targets.numel()


def test_float64_targets_train_a_float32_model() -> None:
    outputs = drawn(5, 1).float().requires_grad_()
    loss = mean_loss("regression", outputs, drawn(5, seed=1))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mean_loss("regression", outputs, drawn(5, seed=1).float()))


def test_ignored_targets_count_nowhere() -> None:
    outputs, targets = drawn(2, 3, 5), classes(2, 3, below=5)
    targets[0, 1] = targets[1, 2] = -100
    kept = [(0, 0), (0, 2), (1, 0), (1, 1)]
    rows = torch.stack([outputs[place] for place in kept])
    wanted = torch.stack([targets[place] for place in kept])
    torch.testing.assert_close(mean_loss("next_token", outputs, targets), mean_loss("classification", rows, wanted))
    torch.testing.assert_close(sums("next_token", outputs, targets), sums("classification", rows, wanted))


def test_the_loss_of_bfloat16_outputs_is_computed_in_float32() -> None:
    outputs, targets = drawn(4, 9).bfloat16(), classes(4, below=9)
    loss = mean_loss("classification", outputs, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mean_loss("classification", outputs.float(), targets))


def test_logits_are_found_in_a_tensor_or_an_output_that_has_them() -> None:
    tensor = drawn(2, 3)
    assert logits_of(tensor) is tensor
    assert logits_of(SimpleNamespace(logits=tensor, loss=None)) is tensor
    with pytest.raises(UsageError, match=r"must return a tensor of logits .*got tuple"):
        logits_of((tensor,))


@pytest.mark.parametrize(
    ("task", "outputs", "targets"),
    [
        ("regression", drawn(5, 1), drawn(4)),
        ("regression", drawn(5, 3), drawn(5)),
        ("regression", drawn(5), drawn(5, 1)),
        ("regression", drawn(5, 1), classes(5, below=3)),
        ("classification", drawn(5, 3), classes(4, below=3)),
        ("classification", drawn(5, 3), classes(5, 1, below=3)),
        ("classification", drawn(5, 3), drawn(5)),
        ("next_token", drawn(2, 4, 9), classes(2, 3, below=9)),
        ("next_token", drawn(8, 9), classes(2, 4, below=9)),
    ],
)
def test_shapes_that_only_broadcasting_could_join_are_refused(
    task: Task, outputs: torch.Tensor, targets: torch.Tensor
) -> None:
    for function in (mean_loss, sums):
        with pytest.raises(UsageError, match=rf"{task} takes outputs .*; got outputs \["):
            function(task, outputs, targets)
