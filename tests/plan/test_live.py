"""The accountant of pretended computations, against sums made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leantrain.optim import AdamW
from leantrain.optim.low_bit import LowBit
from leantrain.plan.live import EARNEST, Live, new_pretence, pretending


def test_what_lives_is_counted_and_what_died_is_not():
    live = Live()
    with pretending(new_pretence(), live):
        a = torch.zeros(1000)
        b = a * 2
        view = b[10:20]
        assert live.bytes == 8000
        del a
        assert live.bytes == 4000
        del b
        assert live.bytes == 4000, "a view keeps its whole storage"
        del view
    assert (live.bytes, live.peak) == (0, 8000)


def test_an_operation_in_place_makes_nothing():
    live = Live()
    with pretending(new_pretence(), live):
        a = torch.zeros(1000)
        a.mul_(2).add_(1)
        a.view(10, 100).t()
    assert live.peak == 4000


def test_nothing_is_allocated_however_large():
    live = Live()
    with pretending(new_pretence(), live):
        square = torch.ones(10**6, 10**6)
        product = square @ square
    assert live.bytes == 2 * 4 * 10**12
    del square, product


def test_memory_on_a_gpu_comes_in_blocks():
    live = Live("cuda")
    with pretending(new_pretence(), live):
        a = torch.zeros(1)
        assert live.bytes == 512
        del a


def test_counters_are_real_and_unknown_numbers_are_zero():
    with pretending(new_pretence(), Live(earnest=EARNEST)):
        counter = torch.tensor(3)
        counter += 1
        assert counter == 4
        unknown = torch.ones(10**6) * 5
        assert not unknown.sum() > 0
        assert not (unknown != unknown).any()
        assert torch.isfinite(unknown).all()
        assert torch.isfinite(unknown.view(1000, 1000)).all(dim=-1).sum() == 1000


def test_bytes_moved_are_those_of_inputs_and_outputs():
    live = Live()
    with pretending(new_pretence(), live):
        a = torch.zeros(1000)
        before = live.moved
        _ = a + a
        assert live.moved - before == 3 * 4000


def test_a_decomposition_has_its_cost():
    live = Live()
    with pretending(new_pretence(), live):
        torch.linalg.svd(torch.zeros(64, 32), full_matrices=False)
    assert live.flops == 6 * 64 * 32**2 + 20 * 32**3


def test_a_product_added_in_place_has_its_cost():
    live = Live()
    with pretending(new_pretence(), live):
        torch.zeros(8, 6).addmm_(torch.zeros(8, 5), torch.zeros(5, 6))
    assert live.flops == 2 * 8 * 5 * 6


@pytest.mark.parametrize("bits", [8, 4])
def test_tables_of_pretended_numbers_are_not_left_to_those_who_compute(bits: int):
    class Coded(AdamW):
        def rule_for(self, param, group):
            return LowBit(super().rule_for(param, group), bits)

    def stepped() -> torch.Tensor:
        weight = nn.Parameter(torch.linspace(-1, 1, 512).view(16, 32))
        optimizer = Coded([weight], lr=0.1)
        for _ in range(2):
            weight.grad = weight.detach() ** 2
            optimizer.step()
        return weight.detach()

    before = stepped()
    with pretending(new_pretence(), Live(earnest=EARNEST)):
        stepped()
    assert torch.equal(stepped(), before)
