from __future__ import annotations

import pytest
import torch
from torch import nn

from leantrain.learn.activation_checkpointing import checkpointed, repeated_blocks
from leantrain.nn import Llama, ResNetCifar, ViT


def test_the_blocks_are_those_that_repeat():
    llama = Llama(64, preset="tiny")
    assert repeated_blocks(llama) == list(llama.layers)
    assert len(repeated_blocks(ViT(8, 3, layers=4))) == 4
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


def test_blocks_inside_holders_are_found_once():
    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16)

    stages = nn.ModuleList([nn.Sequential(block(), block()), nn.Sequential(block(), block(), block())])
    assert len(repeated_blocks(stages)) == 5


def test_batch_statistics_are_not_taken_twice():
    assert repeated_blocks(ResNetCifar(20)) == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_same_and_forward_is_put_back(dropout: float):
    model = Llama(64, preset="tiny")
    model.layers[0].attn.drop = nn.Dropout(dropout)  # what decides whether random states are kept
    inputs = torch.randint(64, (2, 8))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(inputs).logsumexp(-1).sum().backward()
        return [param.grad for param in model.parameters()]

    plain = gradients()
    calls: list[int] = []
    model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with checkpointed(model):
        names = list(model.state_dict())
        again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(calls) == 2, "once in forward and once in backward"
    assert names == list(model.state_dict())
    assert "forward" not in vars(model.layers[0])
