"""Every model can be described in a recipe: its arguments are read from its signature."""

from __future__ import annotations

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from leantrain import nn as models
from leantrain.nn import MLP, Llama, ResNetCifar, ViT


@pytest.mark.parametrize(
    ("model_class", "arguments", "inputs"),
    [
        (Llama, {"vocab_size": 9, "preset": "tiny", "layers": 1}, torch.zeros(2, 5, dtype=torch.int64)),
        (MLP, {"features": 4, "classes": 9, "hidden": [8, 8], "activation": "gelu"}, torch.zeros(2, 4)),
        (ResNetCifar, {"depth": 20, "classes": 9, "channels": 1}, torch.zeros(2, 1, 8, 8)),
        (ViT, {"image_size": 8, "classes": 9, "channels": 1, "layers": 1}, torch.zeros(2, 1, 8, 8)),
    ],
)
def test_a_model_is_built_from_plain_values_and_says_one_logit_per_class(
    model_class: type[nn.Module], arguments: dict[str, object], inputs: torch.Tensor
) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(model_class, "model")
    model = parser.instantiate(parser.parse_object({"model": arguments})).model
    assert isinstance(model, model_class)
    assert model(inputs).shape[-1] == 9


@pytest.mark.parametrize(
    "build",
    [
        lambda: Llama(vocab_size=9, preset="tiny"),
        lambda: MLP(4, classes=9),
        lambda: ResNetCifar(20),
        lambda: ViT(28),
    ],
)
def test_the_same_seed_builds_the_same_model_and_another_seed_another(build: object) -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([parameter.flatten() for parameter in build().parameters()])  # type: ignore[operator]

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_every_name_that_is_exported_exists() -> None:
    assert all(hasattr(models, name) for name in models.__all__)
