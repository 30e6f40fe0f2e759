"""The baseline is PyTorch's AdamW, not a relative of it."""

from __future__ import annotations

import pytest
import torch

from leantrain.optim import AdamW


def test_it_is_pytorchs_fused_adamw() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] is True and optimizer.defaults["weight_decay"] == 0.0


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ValueError, match="-1"):
        AdamW([torch.nn.Parameter(torch.ones(3))], lr=-1)
