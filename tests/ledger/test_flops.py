"""FLOPs against formulas written down independently."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from leantrain.ledger.flops import FlopMeter, is_compiled


def mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def count_step(meter: FlopMeter, model: nn.Module, batch: torch.Tensor) -> None:
    meter.begin_step()
    with meter.counting("forward"):
        loss = model(batch).sum()
    with meter.counting("backward"):
        loss.backward()
    meter.end_step(len(batch), 0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 6))
def test_an_mlp_costs_what_the_formula_says(widths: list[int], batch: int) -> None:
    meter = FlopMeter()
    count_step(meter, mlp(widths), torch.randn(batch, widths[0]))
    products = [2 * batch * a * b for a, b in pairwise(widths)]
    # Backward: a gradient for every weight, and for every layer's input but the first's, which is the batch.
    assert meter.by_phase() == {"forward": sum(products), "backward": sum(products) + sum(products[1:])}
    assert meter.per_step() == 3 * sum(products) - products[0]


def test_convolutions_and_batched_products_count() -> None:
    meter = FlopMeter()
    meter.begin_step()
    with meter.counting("forward"):
        nn.Conv2d(3, 5, kernel_size=3)(torch.randn(2, 3, 8, 8))
        torch.randn(4, 6, 7) @ torch.randn(4, 7, 2)
    meter.end_step(0, 0)
    assert meter.per_step() == 2 * 2 * 5 * 6 * 6 * 3 * 3 * 3 + 2 * 4 * 6 * 7 * 2


def test_products_added_in_place_and_decompositions_count() -> None:
    """PyTorch has no formulas for them, and low-rank optimizers are made of them."""
    meter = FlopMeter()
    meter.begin_step()
    with meter.counting("update"):
        torch.zeros(6, 5).addmm_(torch.randn(6, 2), torch.randn(2, 5))
        torch.zeros(3, 6, 5).baddbmm_(torch.randn(3, 6, 2), torch.randn(3, 2, 5))
        torch.linalg.qr(torch.randn(2, 9, 6))
        torch.linalg.svd(torch.randn(6, 9), full_matrices=False)
    meter.end_step(0, 0)
    products, qr, svd = 2 * 6 * 2 * 5, 4 * 9 * 6**2 - 4 * 6**3 // 3, 6 * 9 * 6**2 + 20 * 6**3
    assert meter.per_step() == 4 * products + 2 * qr + svd


@pytest.mark.parametrize("length", [1, 7])
def test_attention_on_a_cpu_counts_like_its_matrix_products(length: int) -> None:
    batch, heads, width = 2, 3, 8
    q, k, v = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))
    meter = FlopMeter()
    meter.begin_step()
    with meter.counting("forward"):
        output = scaled_dot_product_attention(q, k, v, is_causal=True)
    with meter.counting("backward"):
        output.sum().backward()
    meter.end_step(batch, 0)
    product = 2 * batch * heads * length * length * width
    # Two products forward; backward computes the scores again and has four gradients.
    assert meter.by_phase() == {"forward": 2 * product, "backward": 5 * product}


def test_recomputing_a_checkpoint_counts_as_backward_work() -> None:
    plain, saving = FlopMeter(), FlopMeter()
    model, batch = mlp([4, 6, 6]), torch.randn(3, 4, requires_grad=True)
    count_step(plain, model, batch)

    class Checkpointed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]

    count_step(saving, Checkpointed(), batch)
    before, after = plain.by_phase(), saving.by_phase()
    assert before is not None
    assert after is not None
    assert after["forward"] == before["forward"]
    # PyTorch stops recomputing as soon as it has what it needs, which is before the last layer's product.
    assert after["backward"] == before["backward"] + 2 * 3 * 4 * 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_without_gradients_count_like_any(mode: Callable[[], AbstractContextManager[None]]) -> None:
    meter, square = FlopMeter(), torch.randn(3, 3)
    meter.begin_step()
    with meter.counting("update"), mode():
        square @ square
        nn.functional.linear(square, square)
        torch.einsum("ij,jk->ik", square, square)
    meter.end_step(0, 0)
    assert meter.by_phase() == {"update": 3 * 2 * 27}


def test_the_inner_of_two_nested_phases_has_the_work() -> None:
    meter = FlopMeter()
    a = torch.randn(3, 3)
    meter.begin_step()
    with meter.counting("backward"):
        a @ a
        with meter.counting("exchange"):
            a @ a @ a
        a @ a
    meter.end_step(0, 0)
    assert meter.by_phase() == {"backward": 2 * 54, "exchange": 2 * 54}


def test_steps_that_were_not_counted_cost_what_a_typical_counted_one_does() -> None:
    meter = FlopMeter()
    for products in (5, 1, 1):  # an expensive first step, as when a method prepares its bases
        meter.begin_step()
        with meter.counting("update"):
            for _ in range(products):
                torch.ones(1, 1) @ torch.ones(1, 1)
        meter.end_step(4, 0)
    for _ in range(7):
        meter.begin_step()
        meter.end_step(4, 0)
    assert meter.per_step() == 2
    assert meter.total() == 2 * (5 + 1 + 1 + 7)


def test_a_new_shape_asks_to_be_counted_and_is_scaled_until_it_is() -> None:
    meter, model = FlopMeter(), mlp([4, 6])
    count_step(meter, model, torch.randn(8, 4))
    assert not meter.wants_next
    meter.begin_step()
    meter.end_step(2, 0)  # a last, smaller batch, not counted
    assert meter.wants_next
    forward_and_backward = 2 * (2 * 8 * 4 * 6)
    assert meter.total() == forward_and_backward + forward_and_backward // 4
    count_step(meter, model, torch.randn(2, 4))
    assert not meter.wants_next
    assert meter.total() == forward_and_backward + 2 * forward_and_backward // 4
    assert meter.per_step() == forward_and_backward // 4  # now the most common shape


def test_tokens_tell_the_scale_where_there_are_any_and_the_update_is_not_scaled() -> None:
    meter = FlopMeter()
    one = torch.ones(1, 1)
    meter.begin_step()
    with meter.counting("forward"):
        one @ one
    with meter.counting("update"):
        one @ one
    meter.end_step(4, 100)
    meter.begin_step()
    meter.end_step(4, 300)
    assert meter.total() == 4 + 3 * 2 + 2


def test_an_abandoned_step_is_forgotten() -> None:
    meter = FlopMeter()
    meter.begin_step()
    with pytest.raises(ZeroDivisionError), meter.counting("forward"):
        torch.ones(2, 2) @ torch.ones(2, 2)
        raise ZeroDivisionError
    count_step(meter, mlp([4, 6]), torch.randn(8, 4))
    assert meter.by_phase() == {"forward": 2 * 8 * 24, "backward": 2 * 8 * 24}


def test_a_long_run_keeps_a_bounded_number_of_counts() -> None:
    meter = FlopMeter()
    for _ in range(100):
        meter.begin_step()
        with meter.counting("forward"):
            torch.ones(1, 1) @ torch.ones(1, 1)
        meter.end_step(4, 0)
    assert len(meter.state_dict()["counted"][0][4]) <= 32
    assert meter.total() == 200


def test_nothing_counted_is_unknown_rather_than_zero() -> None:
    meter = FlopMeter()
    meter.begin_step()
    meter.end_step(1, 0)
    assert (meter.per_step(), meter.total(), meter.by_phase()) == (None, None, None)


def test_the_count_goes_on_after_a_round_trip_through_json() -> None:
    first, second = FlopMeter(), FlopMeter()
    count_step(first, mlp([4, 6]), torch.randn(8, 4))
    first.end_step(3, 0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for meter in (first, second):
        meter.begin_step()
        meter.end_step(8, 0)
    assert second.total() == first.total()
    assert second.by_phase() == first.by_phase()


def test_a_compiled_model_or_part_is_recognised() -> None:
    model = mlp([2, 2, 2])
    assert not is_compiled(model)
    assert is_compiled(torch.compile(model))  # type: ignore[arg-type]
    model[0].compile()
    assert is_compiled(model)
