"""What learns: reference models, ordinary `torch.nn.Module`s whose `forward(inputs)` returns logits."""

from __future__ import annotations

from leantrain.nn.huggingface import HuggingFaceLM, from_config
from leantrain.nn.llama import PRESETS, Llama, LlamaShape
from leantrain.nn.mlp import MLP
from leantrain.nn.resnet import ResNetCifar
from leantrain.nn.sizes import num_parameters
from leantrain.nn.vit import ViT

__all__ = [
    "MLP",
    "PRESETS",
    "HuggingFaceLM",
    "Llama",
    "LlamaShape",
    "ResNetCifar",
    "ViT",
    "from_config",
    "num_parameters",
]
