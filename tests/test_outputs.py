"""The tensor in what a model returned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from leantrain.errors import UsageError
from leantrain.outputs import logits_of


def test_a_tensor_is_itself_and_an_output_has_logits() -> None:
    tensor = torch.zeros(2, 3)
    assert logits_of(tensor) is tensor
    assert logits_of(SimpleNamespace(logits=tensor, loss=torch.zeros(()))) is tensor


@pytest.mark.parametrize("output", [(torch.zeros(2),), None, SimpleNamespace(logits=None), {"logits": torch.zeros(2)}])
def test_anything_else_is_refused_by_its_type(output: object) -> None:
    with pytest.raises(UsageError, match=r"must return a tensor of logits or an output with \.logits, got \w+"):
        logits_of(output)
