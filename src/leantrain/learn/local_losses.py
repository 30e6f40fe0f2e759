"""What a block is trained on when no gradient comes from above: a head on its output, and a loss.

    loss = (1 - share) * mean loss of head(h) against y  +  share * other(h)        h: the block's output

    prediction        share 0
    similarity        other = mean over i, j of (S(G h)_ij - S(y)_ij)^2, share 1; the head learns to read h, which does
                      not follow it
    both              the same, share 0.99
    reconstruction    other = squared error of a small decoder that makes the input of h, beside the input's variance;
                      for tokens its cross entropy; share 0.5

S_ij is the cosine of rows i and j, each less its own mean; the rows of y are one-hot classes; G is one linear layer, of
feature maps a 3 x 3 convolution, and of maps a row is each channel's standard deviation over the positions. Where there
is a target per token, rows are tokens: at most 512 of a batch, always the same places.

A local loss is a module, because its head has weights that are trained with the block and thrown away afterwards.
"prediction" costs the head alone; "similarity" and "both" cost G, about as much as one more layer of the block, and the
square of the number of rows; "reconstruction" costs two narrow layers. "similarity" and "both" compare the examples of
a micro-batch with one another: micro-batches do not add up to the whole batch.

Sources: Nøkland & Eidnes 2019 (ICML, arXiv 1901.06656) for "similarity" and "both"; Wang et al. 2021 (InfoPro, ICLR,
arXiv 2101.10832) for reconstructing the input beside predicting, of whose decoder and weighting ours is no copy.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.errors import UsageError, nearest
from leantrain.learn.heads import Head, make_head
from leantrain.learn.losses import IGNORED, Objective

Kind = Literal["prediction", "similarity", "both", "reconstruction"]
_SHARES = {"prediction": 0.0, "similarity": 1.0, "both": 0.99, "reconstruction": 0.5}
_ROWS = 512
"""Most tokens of a batch that are compared with one another."""
_HIDDEN = 32
"""Widest hidden layer of a decoder."""


class LocalLoss(nn.Module):
    """The loss of a block that is not the last.

    Args:
        head: makes logits of the block's features.
        objective: what the logits are judged by.
        other: a second loss, called with features, targets and inputs as `forward` is; 0-dim.
        share: its part of the sum, from 0 to 1. With 1 the block follows it alone, and the head, which is then trained
            on features without history, only tells what they would be good for.
    """

    def __init__(self, head: nn.Module, objective: Objective, other: nn.Module | None = None, share: float = 0) -> None:
        super().__init__()
        self.head = head
        self.other = other
        self.share = share
        self._objective = objective

    def forward(self, features: Tensor, targets: Tensor, inputs: Tensor, before: Tensor | None = None) -> Tensor:
        """The batch's mean loss, 0-dim.

        Args:
            features: [B, ...] the block's output.
            targets: [B, ...] the batch's.
            inputs: [B, ...] what the model was given.
            before: [B, ...] the block's input; None for the first block.
        """
        if self.other is None:
            return self._objective.mean(self.head(features), targets)
        other: Tensor = self.other(features, targets, inputs)
        if self.share == 1:
            return self._objective.mean(self.head(features.detach()), targets) + other
        return (1 - self.share) * self._objective.mean(self.head(features), targets) + self.share * other

    def sums(self, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """How well the head predicts: as `leantrain.learn.losses.sums`."""
        return self._objective.sums(self.head(features), targets)


def make_local_loss(
    kind: Kind, head: Head, features: Tensor, output: Tensor, model: nn.Module, objective: Objective,
    inputs: Tensor | None = None, share: float | None = None,
) -> LocalLoss:  # fmt: skip
    """The local loss of a block with such `features`, in a model that makes such an `output` (logits) of them.

    Args:
        kind: "prediction", "similarity", "both" or "reconstruction".
        head: see `leantrain.learn.heads.make_head`.
        features, output: [n, ...] what the block and the model make of `inputs`.
        model: the model.
        objective: what logits are judged by.
        inputs: [n, ...] what the model was given; "reconstruction" needs it.
        share: what part of the loss is not prediction, from 0 to 1; None: 0.99 for "both", 0.5 for "reconstruction".

    Raises:
        UsageError: an unknown kind, or one that does not fit the features; a `share` out of its range, or for a kind
            that has none to choose.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"local {kind!r} is unknown{nearest(str(kind), get_args(Kind))}")
    if share is not None and (kind in ("prediction", "similarity") or not 0 <= share <= 1):
        raise UsageError(f"share must be from 0 to 1, for 'both' and 'reconstruction' only; got {share} for {kind!r}")
    other: nn.Module | None = None
    with torch.device(features.device):
        if kind in ("similarity", "both"):
            other = Similarity(features, output.shape[-1])
        elif kind == "reconstruction":
            other = Reconstruction(features, inputs, output)
        made = make_head(head, features, output, model)
    return LocalLoss(made, objective, other, _SHARES[kind] if share is None else share).to(features)


class Similarity(nn.Module):
    """How far the features of a batch are from being alike where the classes are the same, and only there.

    Args:
        features: [n, C], tokens [n, T, C] or feature maps [n, C, H, W] of some examples.
        classes: how many there are.

    Raises:
        UsageError: fewer than two classes, other features; in `forward`, targets that are not classes.
    """

    def __init__(self, features: Tensor, classes: int) -> None:
        super().__init__()
        if classes < 2 or features.dim() not in (2, 3, 4):
            raise UsageError(
                "a similarity loss needs classes, at least 2, and features [n, C], [n, T, C] or [n, C, H, W]; got "
                f"outputs of {classes} and features {list(features.shape)}"
            )
        self.unlike = -1 / (classes - 1)
        """The cosine of two one-hot rows, each less its mean."""
        if features.dim() == 4:
            self.project: nn.Module = nn.Conv2d(features.shape[1], features.shape[1], 3, padding=1, bias=False)
        else:
            self.project = nn.Linear(features.shape[-1], features.shape[-1], bias=False)

    def forward(self, features: Tensor, targets: Tensor, inputs: Tensor | None = None) -> Tensor:
        """The mean squared difference of the two matrices of cosines; pairs with an ignored target do not count."""
        if targets.dtype != torch.int64:
            raise UsageError(f"a similarity loss needs classes, int64 targets, got {targets.dtype}; see local")
        if features.dim() == 3 and targets.dim() == 2:
            # Odd, so that in the course of a batch of many sequences every position has its turn.
            every = math.ceil(targets.numel() / _ROWS) | 1
            features, targets = features.flatten(0, 1)[::every], targets.flatten()[::every]
        projected = self.project(features)
        with torch.autocast(features.device.type, enabled=False):
            rows = _rows(projected.to(torch.promote_types(projected.dtype, torch.float32)))
            found = F.normalize(rows - rows.mean(1, keepdim=True), dim=1, eps=1e-8)
            same = (targets[:, None] == targets).to(found.dtype)
            wanted = self.unlike + (1 - self.unlike) * same
            counted = (targets != IGNORED)[:, None] & (targets != IGNORED)
            errors = (found @ found.t() - wanted).square() * counted
            return errors.sum() / counted.sum().clamp(min=1)


def _rows(features: Tensor) -> Tensor:
    """One row per example: where there are positions, every channel's standard deviation over them."""
    if features.dim() == 4:
        features = features.flatten(2).transpose(1, 2)
    if features.dim() == 2:
        return features
    return features.std(1) if features.shape[1] > 1 else features.flatten(1)


class Reconstruction(nn.Module):
    """How much of the input is lost in the features: the error of a small decoder.

    Numbers are decoded with an error of 1 where nothing is known but their mean. Feature maps make the pixels under
    each of their positions, or the input averaged to their resolution if the sizes do not divide. Tokens of an image
    are taken for a square grid of patches, behind a class token where one more is there.

    Args:
        features: [n, C], tokens [n, T, C] or feature maps [n, C, H, W] of some examples.
        inputs: [n, ...] what they were made of.
        output: [n, ...] the model's output: where inputs are tokens, one row of logits per token.

    Raises:
        UsageError: features or inputs of another kind, or no inputs.
    """

    def __init__(self, features: Tensor, inputs: Tensor | None, output: Tensor) -> None:
        super().__init__()
        if inputs is None or not _decodable(features, inputs, output):
            raise UsageError(
                "local 'reconstruction' makes images of feature maps or square grids of tokens, numbers of [n, C], and "
                f"tokens where there are logits for each; got features {list(features.shape)} of "
                f"{'no inputs' if inputs is None else f'{inputs.dtype} inputs {list(inputs.shape)}'}"
            )
        maps = inputs.dim() == 4 and features.dim() != 2
        width = features.shape[1 if features.dim() == 4 else -1]
        hidden = min(width, _HIDDEN)
        self.norm = nn.LayerNorm(width) if features.dim() == 3 else nn.Identity()
        if maps:
            height, across = _as_maps(features).shape[2:]
            by = inputs.shape[2] // height
            by = by if (height * by, across * by) == tuple(inputs.shape[2:]) else 1
            last = nn.Conv2d(hidden, inputs.shape[1] * by**2, 1)
            self.decoder = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.ReLU(), last, nn.PixelShuffle(by))
        else:
            made = inputs[0].numel() if inputs.is_floating_point() else output.shape[-1]
            self.decoder = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, made))
        self._maps = maps

    def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        """The mean error, 0-dim."""
        features = self.norm(features)
        made = self.decoder(_as_maps(features) if self._maps else features)
        made = made.to(torch.promote_types(made.dtype, torch.float32))
        if not inputs.is_floating_point():
            return F.cross_entropy(made.flatten(0, 1), inputs.flatten())
        wanted = F.adaptive_avg_pool2d(inputs, made.shape[2:]) if self._maps else inputs.flatten(1)
        wanted = wanted.to(made.dtype)
        return F.mse_loss(made, wanted) / wanted.var(correction=0).clamp(min=1e-8)


def _decodable(features: Tensor, inputs: Tensor, output: Tensor) -> bool:
    if not inputs.is_floating_point():
        return features.dim() == 3 and features.shape[:2] == inputs.shape == output.shape[:-1]
    if features.dim() == 3:
        return inputs.dim() == 4 and _grid(features.shape[1]) is not None
    return features.dim() == 2 or (features.dim() == 4 and inputs.dim() == 4)


def _grid(tokens: int) -> int | None:
    """The side of a square of so many patches, or of one fewer behind a class token."""
    side = math.isqrt(tokens)
    return side if side >= 1 and tokens - side**2 in (0, 1) else None


def _as_maps(features: Tensor) -> Tensor:
    """Feature maps [B, C, H, W], if need be of a grid of tokens [B, T, C]."""
    if features.dim() == 4:
        return features
    side = _grid(features.shape[1])
    assert side is not None
    return features[:, -(side**2) :].transpose(1, 2).reshape(len(features), -1, side, side)
