"""Hidden matrices are found in models of every kind, and every parameter is in exactly one group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leantrain.optim import hidden_matrices, parameter_groups


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 10, bias=False)


@pytest.mark.parametrize("model", [Tied(), Untied()])
def test_embedding_and_head_are_not_hidden(model: nn.Module) -> None:
    assert hidden_matrices(model) == ["layers.0.weight", "layers.1.weight"]


def test_convolutions_are_hidden_and_the_last_linear_layer_is_the_output() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 2))
    assert hidden_matrices(model) == ["0.weight", "3.weight"]


class HeadFirst(nn.Module):
    """The output layer is made before the blocks, which hold a linear layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 10)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layers[1].weight = self.embedding.weight


class NamesItsOutput(HeadFirst):
    def get_output_embeddings(self) -> nn.Module:
        return self.layers[0]


def test_the_output_layer_is_the_one_outside_the_blocks_wherever_it_stands() -> None:
    assert hidden_matrices(HeadFirst()) == ["layers.0.weight"]


def test_a_model_that_names_its_output_layer_is_believed() -> None:
    assert hidden_matrices(NamesItsOutput()) == ["head.weight"]


def test_a_model_that_is_one_layer_has_a_weight_without_a_prefix() -> None:
    assert hidden_matrices(nn.Conv2d(1, 2, 3)) == ["weight"]
    assert hidden_matrices(nn.Linear(2, 2)) == []


def test_hidden_takes_the_hidden_matrices_and_no_other_parameter() -> None:
    hidden, rest = parameter_groups(Untied(), [{"params": "hidden"}])
    assert [name for name, _ in hidden["params"]] == ["layers.0.weight", "layers.1.weight"]
    assert {name for name, _ in rest["params"]} == {"embedding.weight", "layers.0.bias", "layers.1.bias", "head.weight"}


def test_frozen_matrices_are_not_named() -> None:
    model = Untied()
    model.layers[0].requires_grad_(False)
    assert hidden_matrices(model) == ["layers.1.weight"]


def test_a_hugging_face_model_names_its_own_output_layer() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    names = hidden_matrices(transformers.GPT2LMHeadModel(config))
    assert names == [f"transformer.h.0.{m}.weight" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = Untied()
    groups = parameter_groups(model, [{"params": "bias", "weight_decay": 0.0}, {"params": "hidden", "rank": 2}])
    named = [name for group in groups for name, _ in group["params"]]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert [sorted(set(group) - {"params"}) for group in groups] == [["weight_decay"], ["rank"], []]
    torch.optim.SGD(groups, lr=0.1)  # PyTorch takes them as they are


def test_the_first_matching_group_wins() -> None:
    groups = parameter_groups(Untied(), [{"params": r"layers\.0"}, {"params": "layers"}])
    assert [len(group["params"]) for group in groups] == [2, 2, 2]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": "layer$"}, "layer\\$.*matches no"),
        ({"params": "("}, "regular expression"),
        ({"rank": 1}, "needs params"),
    ],
)
def test_a_group_that_takes_nothing_is_an_error(group: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(Untied(), [group])
