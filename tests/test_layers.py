"""Which layers of a model a method touches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leantrain.errors import UsageError
from leantrain.layers import chosen_linears, hidden_layers, output_layer, replace_layer
from leantrain.nn import MLP, Llama, ResNetCifar, ViT
from leantrain.optim import hidden_matrices


class Looped(nn.Module):
    """One layer under two names, and once in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.blocks = nn.ModuleList([self.first, nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)


MODELS = {
    "Llama": lambda: Llama(256, preset="tiny"),
    "tied Llama": lambda: Llama(256, preset="tiny", tied=True),
    "MLP": lambda: MLP(4, classes=2, hidden=(8, 8)),
    "ResNet": lambda: ResNetCifar(classes=4),
    "ViT": lambda: ViT(channels=3, image_size=16, classes=4),
    "Sequential": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_hidden_layers_are_those_of_the_hidden_matrices(make):
    model = make()
    assert [f"{name}.weight" for name in hidden_layers(model)] == hidden_matrices(model)
    chosen = chosen_linears(model) if any(isinstance(m, nn.Linear) for m in hidden_layers(model).values()) else {}
    assert list(chosen) == [name for name, m in hidden_layers(model).items() if isinstance(m, nn.Linear)]


def test_a_tied_weight_belongs_to_no_hidden_layer():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    model[3].weight = model[0].weight
    assert list(hidden_layers(model)) == ["1", "2"]
    model[2].weight = model[1].weight
    assert list(hidden_layers(model)) == []


def test_a_shared_layer_is_named_once_and_replaced_everywhere():
    model, new = Looped(), nn.Linear(4, 4)
    assert list(hidden_layers(model)) == ["first", "blocks.1"]
    replace_layer(model, model.first, new)
    assert model.first is model.again is model.blocks[0] is new
    assert list(hidden_layers(model)) == ["first", "blocks.1"]


def test_hugging_faces_transposed_layers_count():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
        classifier = transformers.GPT2ForSequenceClassification(config)
    assert len(chosen_linears(model)) == len(chosen_linears(classifier)) == 8
    assert output_layer(classifier) is classifier.score
    assert list(chosen_linears(model, r"h\.1\.mlp")) == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]


def test_what_chooses_nothing_is_refused_with_what_there_is():
    model = MODELS["Sequential"]()
    assert list(chosen_linears(model, lambda name, layer: layer.out_features == 8)) == ["0", "2"]
    for layers in ("^1$", lambda name, layer: False):
        with pytest.raises(UsageError, match="chooses no linear layer; the model has 0, 2, 3"):
            chosen_linears(model, layers)
    with pytest.raises(UsageError, match="the model has none"):
        chosen_linears(nn.Linear(3, 3), ".")
    with pytest.raises(UsageError, match=r"layers='\[' is not a regular expression"):
        chosen_linears(model, "[")
