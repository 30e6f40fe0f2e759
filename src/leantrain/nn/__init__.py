"""What learns: reference models, ordinary `torch.nn.Module`s whose `forward(inputs)` returns logits."""

from __future__ import annotations

from leantrain.nn.factored import FactoredLinear
from leantrain.nn.huggingface import HuggingFaceLM, from_config
from leantrain.nn.int8 import Int8Linear, Int8Weight, int8_weights
from leantrain.nn.llama import PRESETS, Llama, LlamaShape
from leantrain.nn.mlp import MLP
from leantrain.nn.resnet import ResNetCifar
from leantrain.nn.sizes import num_parameters
from leantrain.nn.vit import ViT

__all__ = [
    "MLP",
    "PRESETS",
    "FactoredLinear",
    "HuggingFaceLM",
    "Int8Linear",
    "Int8Weight",
    "Llama",
    "LlamaShape",
    "ResNetCifar",
    "ViT",
    "from_config",
    "int8_weights",
    "num_parameters",
]
