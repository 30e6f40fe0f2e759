"""Matrices are found in models of every kind, and every trainable parameter is in exactly one group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leantrain.optim.groups import all_linear, hidden_matrices, parameter_groups


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


def test_a_parameter_that_two_groups_match_is_named_with_both() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.weight is in two groups, params='0.*weight' and params='hidden'"):
        parameter_groups(Untied(), [{"params": r"0\.weight", "lr": 0.1}, {"params": "hidden", "rank": 2}])


def test_a_rule_sees_name_owner_and_parameter() -> None:
    model = Untied()
    seen = []

    def wide(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
        seen.append((name, type(module), parameter))
        return parameter.ndim == 2 and parameter.shape[0] > 4

    chosen, _ = parameter_groups(model, [{"params": wide}])
    assert [name for name, _ in chosen["params"]] == ["embedding.weight", "head.weight"]
    assert ("layers.1.bias", nn.Linear, model.layers[1].bias) in seen
    with pytest.raises(ValueError, match=r"params=.*nobody matches no trainable"):
        parameter_groups(model, [{"params": nobody}])


def nobody(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    return False


def test_all_linear_is_hidden_without_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 2))
    assert hidden_matrices(model) == ["0.weight", "2.weight"]
    assert all_linear(model) == ["2.weight"]


def test_a_weight_that_two_layers_share_is_named_once_and_as_the_model_names_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert hidden_matrices(model) == all_linear(model) == ["0.weight"]


SMALL = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
HUGGING_FACE = [
    ("LlamaConfig", SMALL, "CausalLM"),
    ("LlamaConfig", SMALL, "SequenceClassification"),
    ("Qwen3Config", {**SMALL, "head_dim": 4, "num_key_value_heads": 1}, "CausalLM"),  # norms inside attention
    ("GPT2Config", {"vocab_size": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}, "CausalLM"),
    ("GPTNeoXConfig", SMALL, "CausalLM"),
    ("BertConfig", SMALL, "SequenceClassification"),
    ("BertConfig", SMALL, "MaskedLM"),
    ("RobertaConfig", SMALL, "SequenceClassification"),  # its classifier is a module of two layers
    ("T5Config", {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}, "Seq2SeqLM"),
    ("ViTConfig", {**SMALL, "image_size": 8, "patch_size": 4}, "ImageClassification"),
    ("MixtralConfig", {**SMALL, "num_key_value_heads": 1, "num_local_experts": 2}, "CausalLM"),
]
each_hugging_face_model = pytest.mark.parametrize(
    ("config", "sizes", "task"), HUGGING_FACE, ids=[f"{config[:-6]}-{task}" for config, _, task in HUGGING_FACE]
)


def hugging_face(config: str, sizes: dict[str, int], task: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {name: size for name, size in sizes.items() if not (config == "ViTConfig" and name == "vocab_size")}
    known = getattr(transformers, config)(**sizes)
    with torch.device("meta"):
        return getattr(transformers, f"AutoModelFor{task}").from_config(known)


@each_hugging_face_model
def test_all_linear_means_what_peft_means(config: str, sizes: dict[str, int], task: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    model = hugging_face(config, sizes, task)
    kind = peft.TaskType.SEQ_CLS if "Classification" in task else peft.TaskType.CAUSAL_LM
    theirs = _maybe_include_all_linear_layers(peft.LoraConfig(target_modules="all-linear", task_type=kind), model)
    assert sorted(all_linear(model)) == sorted(f"{name}.weight" for name in theirs.target_modules)


@each_hugging_face_model
def test_what_is_spared_from_decay_is_what_the_hugging_face_trainer_spares(
    config: str, sizes: dict[str, int], task: str
) -> None:
    model = hugging_face(config, sizes, task)
    from transformers import Trainer

    decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]  # it reads nothing of the trainer
    groups = parameter_groups(model, [{"params": "all-linear", "rank": 2}], no_decay=True)
    spared = {name for group in groups if "weight_decay" in group for name, _ in group["params"]}
    assert spared == {name for name, _ in model.named_parameters()} - set(decayed)


def test_what_is_spared_from_decay_keeps_the_options_of_its_group() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    groups = parameter_groups(model, [{"params": "^0", "lr": 0.1, "weight_decay": 0.3}], no_decay=True)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight"],
        ["0.bias"],
        ["2.weight"],
        ["1.weight", "1.bias", "2.bias"],
    ]
    assert [(group.get("lr"), group.get("weight_decay")) for group in groups] == [
        (0.1, 0.3),
        (0.1, 0.0),
        (None, None),
        (None, 0.0),
    ]


def test_what_is_spared_from_decay_may_be_chosen() -> None:
    (rest, spared) = parameter_groups(Untied(), [], no_decay="embedding")
    assert [name for name, _ in spared["params"]] == ["embedding.weight"]
    assert "weight_decay" not in rest


def test_frozen_parameters_are_in_no_group_and_cannot_be_chosen() -> None:
    model = Untied()
    model.layers.requires_grad_(False)
    (rest,) = parameter_groups(model, [])
    assert {name for name, _ in rest["params"]} == {"embedding.weight", "head.weight"}
    with pytest.raises(ValueError, match=r"params='layers' matches no trainable parameter; there are embedding"):
        parameter_groups(model, [{"params": "layers"}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": "layer$"}, "layer\\$.*matches no"),
        ({"params": "("}, "regular expression"),
        ({"params": ["layers.0.weight"]}, "needs params"),
        ({"rank": 1}, "needs params"),
    ],
)
def test_a_group_that_takes_nothing_is_an_error(group: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(Untied(), [group])
