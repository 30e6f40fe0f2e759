"""Auxiliary heads: logits from the output h of a block that is not the last.

    linear         W h
    mlp            two hidden layers, a quarter as wide as what they read; for feature maps [n, C, H, W], before them,
                   three 1 x 1 convolutions at a quarter of the resolution
    unembedding    W norm(h), where W is the model's own output matrix, only read: its gradient comes from the model's
                   own output alone
    auto           unembedding where the model makes logits of every position by such a matrix, else linear

All read what is brought to the output's positions: feature maps averaged to 2 x 2; tokens [n, T, C] normalised and,
where the output is one per example, averaged. `head_shares` tells what a head costs beside its block: a linear one
little on images, but V C multiplications per token for a vocabulary of V; "unembedding" computes the same and saves the
weights, gradients and optimizer states of V C numbers per block. It needs a last layer that is trained meanwhile: where
blocks are trained one after another, W stays as it was drawn until the end, and "linear" is the choice.

Sources: Belilovsky, Eickenberg & Oyallon 2020 (ICML, arXiv 1901.08164) for linear heads and for the kind of "mlp" on
feature maps, of which this is our reading; Belrose et al. 2023 (arXiv 2303.08112) and work before them read hidden
layers of a trained model through its output matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leantrain.cutting import Cut
from leantrain.errors import UsageError, nearest
from leantrain.layers import is_linear, is_transposed, output_layer
from leantrain.modes import evaluation_mode

Head = Literal["linear", "mlp", "unembedding", "auto"]
_POOLED = 2
"""Height and width of the feature maps that a head reads."""
_NARROWER = 4
"""By what "mlp" divides the resolution of feature maps, and the width of its hidden layers."""


def make_head(kind: Head, features: Tensor, output: Tensor, model: nn.Module) -> nn.Module:
    """A head that makes logits shaped as `output` of features shaped as `features`, both [n, ...].

    Weights start as PyTorch draws them, not at zero: the block's first gradient would be zero then, and optimizers that
    look for a subspace take their first one from it.

    Args:
        kind: "linear", "mlp", "unembedding" or "auto".
        features: [n, C], tokens [n, T, C] or feature maps [n, C, H, W]: the block's output for some inputs.
        output: [n, outputs] or [n, T, outputs]: the model's for the same.
        model: whose output matrix "unembedding" reads.

    Raises:
        UsageError: an unknown kind, or features of which it cannot make such logits.
    """
    if kind not in get_args(Head):
        raise UsageError(f"head {kind!r} is unknown{nearest(str(kind), get_args(Head))}")
    front, width = _front(features, output)
    last = output_layer(model) if features.dim() == 3 or kind == "unembedding" else None
    readable = last is not None and _fits(last, width, output.shape[-1])
    if kind == "auto":
        kind = "unembedding" if readable and output.dim() == 3 else "linear"
    if kind == "unembedding":
        if last is None or not readable:
            raise UsageError(
                "head 'unembedding' needs features of the width that the model's output layer reads, got "
                f"{list(features.shape)} and {'no such layer' if last is None else last}; take head 'linear'"
            )
        norm = [] if features.dim() == 3 else [nn.LayerNorm(width)]
        return nn.Sequential(*front, *norm, Unembedding(last))
    if kind == "mlp":
        if features.dim() == 4:
            front = [*_convolutions(features), *front]
        hidden = max(1, width // _NARROWER)
        for inputs in (width, hidden):
            front += [nn.Linear(inputs, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*front, nn.Linear(width, output.shape[-1]))


@torch.no_grad()
def head_shares(model: nn.Module, cut: Cut, heads: Iterable[nn.Module], inputs: Tensor) -> list[float]:
    """What each head computes, as a part of what its block does: floating-point operations of the forward pass.

    Args:
        model, cut: the model in blocks.
        heads: of the first blocks, one each.
        inputs: [B, ...] what the model is given.

    Returns:
        One number per head, such as 0.05; infinite where a block does nothing that counts, such as look up embeddings.
    """
    shares: list[float] = []
    features: Tensor | None = None
    with evaluation_mode(model):
        for block, head in enumerate(heads):
            with evaluation_mode(head):
                with FlopCounterMode(display=False) as of_block:
                    features = cut.run(block, inputs, features)
                with FlopCounterMode(display=False) as of_head:
                    head(features)
            whole = of_block.get_total_flops()
            shares.append(of_head.get_total_flops() / whole if whole else math.inf)
    return shares


class Mean(nn.Module):
    """The mean over tokens: [B, T, C] to [B, C]."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(1)


class Unembedding(nn.Module):
    """Logits by another layer's matrix, and bias if it has one: [..., C] to [..., outputs].

    No gradient goes into that layer, and it is no part of this module: neither its parameters nor its state are.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # a tuple, which hides it from nn.Module

    def forward(self, features: Tensor) -> Tensor:
        (layer,) = self._layer
        weight, bias = getattr(layer, "weight"), getattr(layer, "bias", None)  # noqa: B009
        weight = weight.detach().t() if is_transposed(layer) else weight.detach()
        return F.linear(features, weight, None if bias is None else bias.detach())


def _front(features: Tensor, output: Tensor) -> tuple[list[nn.Module], int]:
    """What brings features to the output's positions, and how many numbers there are then for each."""
    if features.dim() == 4 and output.dim() == 2 and len(features) == len(output):
        sides = [min(_POOLED, side) for side in features.shape[2:]]
        pool = [nn.AdaptiveAvgPool2d((sides[0], sides[1])), nn.Flatten()]
        return pool, features.shape[1] * math.prod(sides)
    width = features.shape[-1]
    if features.dim() == 3 and output.dim() == 2 and len(features) == len(output):
        return [nn.LayerNorm(width), Mean()], width
    if features.dim() in (2, 3) and features.shape[:-1] == output.shape[:-1]:
        return [nn.LayerNorm(width)] if features.dim() == 3 else [], width
    raise UsageError(f"no head makes outputs {list(output.shape)} of features {list(features.shape)}; cut elsewhere")


def _convolutions(features: Tensor) -> list[nn.Module]:
    """Of what lies under each position of a coarser map, something better than its mean."""
    channels, *sides = features.shape[1:]
    height, width = (min(side, max(_POOLED, math.ceil(side / _NARROWER))) for side in sides)
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d((height, width))]
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return layers


def _fits(layer: nn.Module, width: int, outputs: int) -> bool:
    """Whether a layer is one matrix from so many numbers to so many logits."""
    if not (is_linear(layer) or isinstance(layer, nn.Embedding)):
        return False
    shape = (width, outputs) if is_transposed(layer) else (outputs, width)
    return tuple(getattr(layer, "weight").shape) == shape  # noqa: B009
