"""State is counted as the memory it keeps alive."""

from __future__ import annotations

import torch
from torch import nn

from leantrain.optim import Factored, state_bytes


def test_a_slice_counts_as_the_whole_it_keeps_alive_and_once() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    whole = torch.zeros(100)
    optimizer.state[weight] = {"a": whole[:3], "b": whole[5:7], "step": torch.tensor(1.0)}
    assert state_bytes(optimizer) == 400


def test_tensors_inside_other_packages_objects_count() -> None:
    class Projector:
        def __init__(self) -> None:
            self.matrix = torch.zeros(10)

    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"projector": Projector(), "pair": [torch.zeros(1), (torch.zeros(2),)]}
    assert state_bytes(optimizer) == 40 + 4 + 8


def test_a_factored_update_multiplies_out() -> None:
    left, right = torch.randn(2, 4, 3), torch.randn(2, 3, 5)
    torch.testing.assert_close(Factored(left, right, 0.5).dense(), 0.5 * left @ right)
