"""Probabilities from the scores of a trained classifier, fitted on examples that it was not trained on.

    temperature    softmax(z / T)             one number; the prediction stays
    vector         softmax(w * z + b)         2 C numbers; the prediction may change

by the least mean negative log-likelihood. Scores that no softmax was trained on (`leantrain.nn.OutputLoss`) need it
before they are called probabilities. Costs one fit of at most 2 C numbers; nothing in training.

Source: Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.errors import UsageError, nearest

Kind = Literal["temperature", "vector"]
_ITERATIONS = 200


class Calibration(nn.Module):
    """Put behind a trained model: logits in, logits out whose softmax is calibrated. Does nothing before `fit`.

    Args:
        classes: C, at least 2.
        kind: "temperature" or "vector".

    Raises:
        UsageError: an unknown kind, fewer than 2 classes; in use, logits or targets that do not fit.

    Examples:
        >>> scores, targets = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 2, 0] * 3)
        >>> calibrated = Calibration(3).fit(scores, targets)
        >>> calibrated(scores).softmax(-1).shape
        torch.Size([12, 3])
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, classes: int, kind: Kind = "temperature") -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise UsageError(f"kind {kind!r} is unknown{nearest(str(kind), get_args(Kind))}")
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise UsageError(f"classes must be a whole number, at least 2, got {classes!r}")
        self.kind, self.classes = kind, classes
        # Buffers: a fit of its own finds them, no optimizer of the model's.
        self.register_buffer("scale", torch.ones(1 if kind == "temperature" else classes))
        self.register_buffer("bias", torch.zeros(1 if kind == "temperature" else classes))

    @property
    def temperature(self) -> Tensor:
        """T, [1] or [C]."""
        return 1 / self.scale

    def forward(self, logits: Tensor) -> Tensor:
        """[..., C] calibrated logits of [..., C] logits."""
        self._check(logits)
        return logits * self.scale + self.bias

    def fit(self, logits: Tensor, targets: Tensor) -> Calibration:
        """Fit on held-out [N, C] logits and [N] int64 targets, in float64; the same inputs give the same fit.

        Returns:
            Itself.
        """
        self._check(logits)
        if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or not len(targets):
            raise UsageError(
                f"calibration is fitted on logits [N, {self.classes}] and int64 targets [N], got {list(logits.shape)} "
                f"and {str(targets.dtype).removeprefix('torch.')} {list(targets.shape)}"
            )
        if not bool(logits.isfinite().all()):
            raise UsageError("calibration needs finite logits")
        scores = logits.detach().double()
        # In units of the scores' spread, so that the solver sees numbers near 1 whatever the loss made of them. Of a
        # temperature the logarithm, which keeps it above 0.
        spread = float(scores.std()) or 1.0
        scores = scores / spread
        numbers = torch.zeros(1 if self.kind == "temperature" else 2 * self.classes, dtype=torch.float64)
        if self.kind == "vector":
            numbers[: self.classes] = 1.0
        numbers = numbers.to(scores.device).requires_grad_()

        def likelihood() -> Tensor:
            solver.zero_grad()
            scale, bias = self._parts(numbers)
            loss = F.cross_entropy(scores * scale + bias, targets)
            loss.backward()
            return loss

        solver = torch.optim.LBFGS(
            [numbers], max_iter=_ITERATIONS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )
        with torch.enable_grad():
            solver.step(likelihood)
        scale, bias = self._parts(numbers.detach())
        self.scale.copy_(scale / spread)
        self.bias.copy_(bias)
        return self

    def extra_repr(self) -> str:
        return f"classes={self.classes}, kind={self.kind!r}"

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "temperature":
            return numbers.exp(), torch.zeros_like(numbers)
        return numbers[: self.classes], numbers[self.classes :]

    def _check(self, logits: Tensor) -> None:
        if logits.dim() == 0 or logits.shape[-1] != self.classes:
            raise UsageError(f"calibration of {self.classes} classes got logits {list(logits.shape)}")


def calibration_error(logits: Tensor, targets: Tensor, bins: int = 15) -> float:
    """The expected calibration error, in [0, 1]: how far accuracy is from confidence, on average over examples.

    Args:
        logits: [N, C]; their softmax's largest entry is the confidence.
        targets: [N] int64.
        bins: equal intervals of confidence in which accuracy is averaged, at least 1.

    Source: Naeini, Cooper & Hauskrecht 2015, AAAI.
    """
    if bins < 1:
        raise UsageError(f"bins must be at least 1, got {bins}")
    confidence, predicted = logits.double().softmax(-1).max(-1)
    gap = (predicted == targets).double() - confidence
    place = (confidence * bins).long().clamp(max=bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add_(0, place, gap)
    return float(sums.abs().sum() / len(gap))
