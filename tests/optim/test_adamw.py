"""The baseline is PyTorch's AdamW, not a relative of it."""

from __future__ import annotations

import pytest
import torch

from leantrain.optim import AdamW


def test_it_is_pytorchs_fused_adamw_to_the_last_bit() -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    method = AdamW([ours], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2, fused=True)
    for step in range(5):
        for weight, optimizer in ((ours, method), (theirs, reference)):
            weight.grad = torch.sin(torch.arange(12.0).view(3, 4) + step)
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_weight_decay_is_off_unless_asked_for() -> None:
    assert AdamW([torch.nn.Parameter(torch.ones(3))]).param_groups[0]["weight_decay"] == 0.0


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ValueError, match="lr=-1"):
        AdamW([torch.nn.Parameter(torch.ones(3))], lr=-1)


def test_a_parameter_with_gaps_in_memory_moves_like_one_without() -> None:
    """PyTorch's fused kernel takes such a parameter's numbers in the order of memory and says nothing."""
    strided = torch.nn.Parameter(torch.ones(6, 4)[:, ::2])
    plain = torch.nn.Parameter(torch.ones(6, 2))
    strided.grad = torch.arange(12.0).view(6, 2)
    plain.grad = strided.grad.clone()
    for weight in (strided, plain):
        AdamW([weight], lr=0.1).step()
    torch.testing.assert_close(strided.detach(), plain.detach())
