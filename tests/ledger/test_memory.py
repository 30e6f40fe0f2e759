"""Memory by kind against brute force and against sizes worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from leantrain.ledger.memory import MemoryMeter

FLOAT = 4
BATCH, WIDE, OUT = 8, 16, 4


def mlp(inputs: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, WIDE), nn.ReLU(), nn.Linear(WIDE, OUT))


def meter(model: nn.Module, *optimizers: torch.optim.Optimizer) -> MemoryMeter:
    result = MemoryMeter(model, optimizers)
    result.measure_lasting()
    return result


@contextmanager
def forward(memory: MemoryMeter) -> Iterator[None]:
    with memory.watching("forward", follow_operations=True):
        yield
    memory.observe()


@contextmanager
def backward(memory: MemoryMeter) -> Iterator[None]:
    with memory.watching("backward", follow_operations=True):
        yield
    memory.observe()


def test_linear_relu_linear_saves_exactly_the_hidden_layer() -> None:
    # Linear keeps its input: the batch (not counted) and the ReLU's output; ReLU keeps its output, the same storage.
    model = mlp()
    data = torch.randn(BATCH, 12)
    memory = meter(model)
    with forward(memory):
        model(data).sum().backward()
    assert memory.peaks["activations"] == BATCH * WIDE * FLOAT


def test_cross_entropy_saves_the_log_probabilities_and_not_the_targets() -> None:
    model = mlp()
    data = torch.randn(BATCH, 12)
    targets = torch.zeros(BATCH, dtype=torch.int64)
    memory = meter(model)
    with forward(memory):
        loss = cross_entropy(model(data), targets)
    total_weight = FLOAT  # a scalar that nll_loss keeps
    assert memory.peaks["activations"] == BATCH * WIDE * FLOAT + BATCH * OUT * FLOAT + total_weight
    loss.backward()


def test_saved_activations_match_a_walk_over_the_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.LayerNorm(10), nn.Dropout(0.3), nn.Linear(10, 3), nn.Tanh())
    batch = torch.randn(5, 6)
    memory = meter(model)
    with forward(memory):
        model(batch).square().mean()
    outside = {p.untyped_storage().data_ptr() for p in (*model.parameters(), batch)}
    saved = saved_by_graph(model(batch).square().mean())
    expected = sum(size for pointer, size in saved.items() if pointer not in outside)
    assert expected > 0
    assert memory.peaks["activations"] == expected


def saved_by_graph(output: Tensor) -> dict[int, int]:
    """{address: bytes} of every tensor that the nodes behind `output` keep, read off the nodes themselves."""
    found: dict[int, int] = {}
    pending = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None:
            continue
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        pending.extend(parent for parent, _ in node.next_functions)
    return found


def test_activations_are_let_go_of_when_backward_has_used_them() -> None:
    model = mlp()
    data = torch.randn(BATCH, 12)
    memory = meter(model)
    for _ in range(3):  # three micro-batches: the peak is that of one
        with forward(memory):
            loss = model(data).sum()
        with backward(memory):
            loss.backward()
    assert memory.peaks["activations"] == BATCH * WIDE * FLOAT
    assert memory.observe() == sum(2 * p.numel() * FLOAT for p in model.parameters())


def test_graphs_alive_together_add_up() -> None:
    model = mlp()
    data = torch.randn(BATCH, 12)
    memory = meter(model)
    with forward(memory):
        losses = [model(data).sum() for _ in range(3)]
    assert memory.peaks["activations"] == 3 * BATCH * WIDE * FLOAT
    del losses
    assert memory.observe() == sum(p.numel() * FLOAT for p in model.parameters())


def test_second_derivatives_pass_through_what_was_watched() -> None:
    x = torch.tensor([0.5, 2.0], requires_grad=True)
    with forward(meter(nn.Linear(1, 1))):
        y = (x.exp() * x * x).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, x.exp() * (x * x + 4 * x + 2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_leaves_only_the_checkpoints_inputs(reentrant: bool) -> None:
    torch.manual_seed(0)
    first, middle, last = nn.Linear(12, 10), mlp(10), nn.Linear(OUT, 2)
    model = nn.ModuleList([first, middle, last])
    data = torch.randn(BATCH, 12)
    memory = meter(model)
    with forward(memory):
        hidden = first(data)
        output = last(checkpoint(middle, hidden, use_reentrant=reentrant, preserve_rng_state=False)).sum()
    assert memory.peaks["activations"] == BATCH * 10 * FLOAT + BATCH * OUT * FLOAT  # middle's input and last's input
    with backward(memory):
        output.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("operation", [torch.square, torch.exp])  # square keeps its input, exp its output
def test_an_inplace_change_of_a_saved_tensor_is_still_an_error(operation: Callable[[Tensor], Tensor]) -> None:
    memory = meter(nn.Linear(1, 1))
    with forward(memory):
        x = torch.ones(3, requires_grad=True) * 2
        y = operation(x)
    x.detach().add_(1)
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tied_weights_and_buffers_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("table", torch.zeros(7))
            self.register_buffer("part_of_table", self.table[2:4])

    memory = meter(Tied())
    assert memory.peaks["parameters"] == 10 * 6 * FLOAT + 7 * FLOAT


def test_gradients_count_their_peak_also_when_set_to_none_at_once() -> None:
    model = mlp()
    memory = meter(model)
    with backward(memory):
        model(torch.randn(BATCH, 12)).sum().backward()
    model.zero_grad(set_to_none=True)
    memory.observe()
    assert memory.peaks["gradients"] == sum(p.numel() for p in model.parameters()) * FLOAT


def test_gradients_dropped_during_backward_never_pile_up() -> None:
    model = mlp()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    memory = meter(model)
    with backward(memory):
        model(torch.randn(BATCH, 12)).sum().backward()
    assert memory.peaks["gradients"] == max(p.numel() for p in model.parameters()) * FLOAT


def test_gradients_in_one_bucket_count_the_bucket_once() -> None:
    model = nn.Linear(3, 2)
    bucket = torch.zeros(100)
    model.weight.grad, model.bias.grad = bucket[:6].view(2, 3), bucket[6:8]
    memory = meter(model)
    memory.observe()
    assert memory.peaks["gradients"] == 100 * FLOAT


def test_sparse_gradients_count_what_they_hold() -> None:
    model = nn.Embedding(1000, 4, sparse=True)
    memory = meter(model)
    with backward(memory):
        model(torch.tensor([1, 5])).sum().backward()
    assert memory.peaks["gradients"] == 2 * 8 + 2 * 4 * FLOAT


def test_adamw_keeps_two_moments_and_a_counter_per_parameter() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(BATCH, 12)).sum().backward()
    optimizer.step()
    memory = meter(model, optimizer)
    assert memory.peaks["optimizer_state"] == sum(2 * p.numel() + 1 for p in model.parameters()) * FLOAT


def test_a_state_that_is_the_parameter_itself_costs_nothing() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"weights": parameter.data, "view": parameter.detach()[:1]}
    assert meter(model, optimizer).peaks["optimizer_state"] == 0


def test_the_kinds_together_are_less_than_their_peaks_apart() -> None:
    model = mlp()
    data = torch.randn(64, 12)
    memory = meter(model)
    with forward(memory):
        loss = model(data).sum()
    with backward(memory):
        loss.backward()
    apart = sum(value or 0 for value in memory.peaks.values())
    parameters = sum(p.numel() for p in model.parameters()) * FLOAT
    assert parameters + 64 * WIDE * FLOAT <= memory.together < apart


def test_kinds_that_nothing_was_seen_of_are_not_known() -> None:
    memory = meter(mlp())
    memory.observe()
    assert memory.peaks["activations"] is None
    assert memory.peaks["gradients"] is None


def test_in_a_compiled_model_the_batch_counts_but_parameters_do_not() -> None:
    # follow_operations=False is how a compiled model is watched; what is counted does not depend on compilation.
    model = mlp()
    model.register_buffer("scale", torch.ones(1000, OUT))
    data = torch.randn(BATCH, 12)
    memory = meter(model)
    with memory.watching("forward", follow_operations=False):
        (model(data) * model.scale[:BATCH]).sum()  # a product keeps both factors; the buffer is one
    memory.observe()
    assert memory.peaks["activations"] == BATCH * WIDE * FLOAT + BATCH * 12 * FLOAT
