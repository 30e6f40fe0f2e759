"""What learns: reference models, ordinary `torch.nn.Module`s whose `forward(inputs)` returns logits."""

from __future__ import annotations

from leantrain.nn.calibration import Calibration, calibration_error
from leantrain.nn.factored import FactoredLinear
from leantrain.nn.huggingface import HuggingFaceLM, from_config
from leantrain.nn.int8 import Int8Linear, Int8Weight, int8_weights
from leantrain.nn.llama import PRESETS, Llama, LlamaShape
from leantrain.nn.mlp import MLP
from leantrain.nn.output_loss import BoostGrad, OutputLoss
from leantrain.nn.resnet import ResNetCifar
from leantrain.nn.sizes import num_parameters
from leantrain.nn.vit import ViT

__all__ = [
    "MLP",
    "PRESETS",
    "BoostGrad",
    "Calibration",
    "FactoredLinear",
    "HuggingFaceLM",
    "Int8Linear",
    "Int8Weight",
    "Llama",
    "LlamaShape",
    "OutputLoss",
    "ResNetCifar",
    "ViT",
    "calibration_error",
    "from_config",
    "int8_weights",
    "num_parameters",
]
