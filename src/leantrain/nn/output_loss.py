"""Losses that leave the output linear, and send the error of each class back unsquashed or boosted.

Softmax and cross entropy send back softmax(z) - t, softmax and squared error that times the softmax's own slope, which
is next to nothing where the network is confident and wrong. These losses have no normaliser that ties the classes
together. z: a logit, t: 1 for the class and 0 for all others, e = z - t:

    kind           d loss / dz                        loss, summed over classes       at rest, t = 1
    linear         e                                  e^2 / 2                         1
    cubic          a z^3 + b - t                      a z^4 / 4 + (b - t) z           ((1 - b) / a)^(1/3)
    exp            a exp(z) + b - t                   a exp(z) + (b - t) z            log((1 - b) / a)
    cubic_error    a e^3                              a e^4 / 4                       1
    exp_error      sign(e) (exp(a |e|) - 1) / a       (exp(a |e|) - a |e| - 1) / a^2  1

Saves: training steps, where the squashing is what holds learning up; autograd keeps the logits and nothing else.
Costs: scores that are no log-probabilities (`leantrain.nn.Calibration` makes them such), and a learning rate to find
anew. Two equalities: `exp` with a = 1, b = 0 is the Poisson loss with log input, and with a = 1 / sum(exp(z)), held
constant, its gradient is cross entropy's.

Source: Øland, Bansal, Dannenberg & Raj 2017, "Be Careful What You Backpropagate", arXiv 1707.04199. Of the readings of
its boosting, the output's (`exp`, `cubic`) follows the independent implementation notwa/optim, whose derivative of the
output function is left out on purpose; the error's (`*_error`) and the closed forms of the losses are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.errors import UsageError, nearest

Kind = Literal["linear", "cubic", "exp", "cubic_error", "exp_error", "cross_entropy", "softmax_squared"]
Reduction = Literal["mean", "sum", "none"]
_ALPHA = {"cubic": 0.1, "exp": 0.1, "cubic_error": 1.0, "exp_error": 1.0}
_WITH_BETA = ("cubic", "exp")


class OutputLoss(nn.Module):
    """A classification loss on unsquashed logits, called as `torch.nn.CrossEntropyLoss` is.

    Logits are [N, C], [N, C, ...] (segmentation) or [C]; targets int64 classes of the same shape without C, or floats
    of the same shape: probabilities of the classes, to which no gradient flows. The prediction is the largest logit,
    as ever. Computed in at least float32, also under autocast.

    Args:
        kind: one of the module's table; or, to compare with, "cross_entropy" (`F.cross_entropy` itself) and
            "softmax_squared", half the squared error of the softmax.
        alpha: strength a of the boost, above 0; None: 0.1 for "cubic" and "exp", 1 for the two of the error.
        beta: shift b of "cubic" and "exp".
        clip: the largest error sent back by a kind that boosts, above 0: beyond it the loss goes on as a straight line.
            None: no bound, and "exp" overflows from logits of 88 on.
        target_weight: factor on the term of the true class, for the many classes among which its error is only one;
            above 0. Not for the two softmax kinds.
        reduction: "mean" over what is not ignored, weighted by class; "sum"; "none", which keeps the targets' shape.
        label_smoothing: part of the target that is spread over all classes, in [0, 1].
        class_weight: [C] factors on an example's loss by its class, 0 or more. (Of "cross_entropy" with smoothing:
            on the classes' terms, as PyTorch has it.)
        ignore_index: int64 target that does not count.

    Raises:
        UsageError: a value out of its range; in use, shapes or targets that do not fit.

    Examples:
        >>> loss = OutputLoss("cubic", alpha=0.1)
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> loss(logits, torch.tensor([0, 2])).backward()
        >>> logits.grad.tolist()
        [[-0.5, 0.0, 0.0], [0.0, 0.0, -0.5]]
    """

    class_weight: Tensor | None

    def __init__(
        self, kind: Kind = "cubic", alpha: float | None = None, beta: float = 0.0, *, clip: float | None = 10.0,
        target_weight: float = 1.0, reduction: Reduction = "mean", label_smoothing: float = 0.0,
        class_weight: Sequence[float] | Tensor | None = None, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, word, allowed in (("kind", kind, get_args(Kind)), ("reduction", reduction, get_args(Reduction))):
            if word not in allowed:
                raise UsageError(f"{name} {word!r} is unknown{nearest(str(word), allowed)}")
        if alpha is not None and kind not in _ALPHA:
            raise UsageError(f"alpha is of the kinds {', '.join(_ALPHA)}; kind={kind!r} takes none, got {alpha!r}")
        if beta and kind not in _WITH_BETA:
            raise UsageError(f"beta is of the kinds {', '.join(_WITH_BETA)}; kind={kind!r} takes none, got {beta!r}")
        if target_weight != 1 and kind not in FORMS:
            raise UsageError(
                f"target_weight is of the kinds {', '.join(FORMS)}, not of {kind!r}, got {target_weight!r}"
            )
        for name, value in (("alpha", alpha), ("clip", clip), ("target_weight", target_weight)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be a number above 0, got {value!r}")
        if not math.isfinite(beta):
            raise UsageError(f"beta must be a finite number, got {beta!r}")
        if not 0 <= label_smoothing <= 1:
            raise UsageError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
        self.kind, self.reduction = kind, reduction
        self.alpha: float = _ALPHA.get(kind, 1.0) if alpha is None else alpha
        self.beta, self.target_weight = beta, target_weight
        self.clip = clip if kind in _ALPHA else None
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.register_buffer("class_weight", _checked_weights(class_weight), persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        rows, labels = self._rows(logits, targets)
        if self.kind == "cross_entropy":
            weight = None if self.class_weight is None else self.class_weight.to(rows.dtype)
            each = F.cross_entropy(
                rows, labels, weight, ignore_index=self.ignore_index, reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )  # fmt: skip
            return each if self.reduction != "none" else self._unflattened(each, logits, targets)
        if self.kind == "softmax_squared":
            each = (rows.softmax(-1) - self._desired(labels, rows)).square().sum(-1) / 2
        else:
            each = _Potential.apply(rows, labels, self)
        counts = self._counts(labels)
        each = each * counts
        if self.reduction == "none":
            return self._unflattened(each, logits, targets)
        if self.reduction == "sum":
            return each.sum()
        # As PyTorch has it: of weighted classes the weighted mean, of probabilities the mean over rows.
        return each.sum() / (len(rows) if labels.is_floating_point() else counts.sum())

    def extra_repr(self) -> str:
        shown = [f"{self.kind!r}"]
        shown += [f"alpha={self.alpha:g}"] if self.kind in _ALPHA else []
        shown += [f"beta={self.beta:g}"] if self.beta else []
        return ", ".join(shown)

    def _rows(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, C] in at least float32, and targets [N] int64 or [N, C] in the logits' type."""
        axis = min(1, logits.dim() - 1)
        if targets.is_floating_point():
            fits = targets.shape == logits.shape
        else:
            fits = targets.dtype == torch.int64 and logits.shape[:axis] + logits.shape[axis + 1 :] == targets.shape
        if logits.dim() == 0 or not fits:
            raise UsageError(
                "a loss takes logits [N, C] or [N, C, ...] and int64 targets without C, or float targets of the same "
                f"shape; got logits {list(logits.shape)} and {str(targets.dtype).removeprefix('torch.')} targets "
                f"{list(targets.shape)}"
            )
        classes = logits.shape[axis]
        if self.class_weight is not None and len(self.class_weight) != classes:
            raise UsageError(f"class_weight has {len(self.class_weight)} entries, the logits {classes} classes")
        rows = logits.movedim(axis, -1).reshape(-1, classes)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if targets.is_floating_point():
            return rows, targets.movedim(axis, -1).reshape(-1, classes).to(rows.dtype)
        return rows, targets.reshape(-1)

    def _unflattened(self, each: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        shape = targets.select(min(1, logits.dim() - 1), 0).shape if targets.is_floating_point() else targets.shape
        return each.view(shape)

    def _counts(self, labels: Tensor) -> Tensor:
        """[N] how much each row counts."""
        weight = self.class_weight
        if labels.is_floating_point():
            return labels.new_ones(len(labels)) if weight is None else labels @ weight.to(labels.dtype)
        counted = labels != self.ignore_index
        if weight is None:
            return counted.to(torch.float32)
        return weight[labels.where(counted, 0)] * counted

    def _desired(self, labels: Tensor, rows: Tensor) -> Tensor:
        """[N, C] the targets t, smoothed."""
        one_hot = labels if labels.is_floating_point() else self._one_hot(labels, rows)
        if not self.label_smoothing:
            return one_hot
        return one_hot * (1 - self.label_smoothing) + self.label_smoothing / rows.shape[-1]

    def _one_hot(self, labels: Tensor, rows: Tensor) -> Tensor:
        index = labels.where(labels != self.ignore_index, 0)
        try:
            return torch.zeros_like(rows).scatter(-1, index[:, None], torch.ones_like(rows[:, :1]))
        except RuntimeError as error:  # found where it is found for nothing: looking beforehand would wait for a device
            raise UsageError(
                f"targets must be classes from 0 to {rows.shape[-1] - 1}, or {self.ignore_index}: {error}"
            ) from error

    def _column_weights(self, labels: Tensor, rows: Tensor) -> Tensor | float:
        """[N, C] factors on the terms of the classes."""
        if self.target_weight == 1:
            return 1.0
        one_hot = labels if labels.is_floating_point() else self._one_hot(labels, rows)
        return 1 + (self.target_weight - 1) * one_hot

    def _clipped(self, z: Tensor, t: Tensor) -> Tensor:
        """The logits, kept where the error is at most `clip`."""
        if self.clip is None:
            return z
        at = FORMS[self.kind].at
        bound = torch.tensor(self.clip, dtype=z.dtype, device=z.device)
        return z.clamp(at(-bound, t, self.alpha, self.beta), at(bound, t, self.alpha, self.beta))

    def _potential(self, z: Tensor, labels: Tensor) -> Tensor:
        """[N] the loss of each row, counted once."""
        t = self._desired(labels, z)
        form, within = FORMS[self.kind], self._clipped(z, t)
        each = form.potential(within, t, self.alpha, self.beta)
        if self.clip is not None:
            each = each + form.delta(within, t, self.alpha, self.beta) * (z - within)
        return (each * self._column_weights(labels, z)).sum(-1)

    def _delta(self, z: Tensor, labels: Tensor) -> Tensor:
        """[N, C] its gradient."""
        t = self._desired(labels, z)
        error = FORMS[self.kind].delta(self._clipped(z, t), t, self.alpha, self.beta)
        return error * self._column_weights(labels, z)


class BoostGrad(OutputLoss):
    """Another loss to tell, this one to learn from: its value is `loss`, its gradient at the logits an `OutputLoss`'s.

    The gradient is that of one mean (or sum) put in the place of another, so whatever the result is multiplied with,
    such as a micro-batch's weight or a `GradScaler`'s factor, arrives in it.

    Args:
        kind, alpha: as for `OutputLoss`, and so are all other arguments.
        loss: function of logits and targets; None: cross entropy, so that values stay comparable, in nats.

    Examples:
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> loss = BoostGrad("linear")(logits, torch.tensor([1]))
        >>> loss.backward()
        >>> round(loss.item(), 4), logits.grad.tolist()
        (0.6931, [[0.0, -1.0]])
    """

    def __init__(
        self, kind: Kind = "exp", alpha: float | None = None, beta: float = 0.0, *,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(kind, alpha, beta, **options)
        self.loss = loss or OutputLoss("cross_entropy", reduction=self.reduction, ignore_index=self.ignore_index)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return self.loss(logits, targets)
        told, learned = self.loss(logits.detach(), targets), super().forward(logits, targets)
        if told.shape != learned.shape:
            raise UsageError(
                f"the loss to tell gives {list(told.shape)}, the one to learn from {list(learned.shape)}; "
                f"give both the same reduction, this one has {self.reduction!r}"
            )
        shown: Tensor = _Shown.apply(told.to(learned.dtype), learned)
        return shown


class _Shown(torch.autograd.Function):
    """The first, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, told: Tensor, learned: Tensor) -> Tensor:
        return told.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


class _Potential(torch.autograd.Function):
    """[N] losses of rows. Keeps the logits alone for the backward pass, where a chain of operations would keep a tensor
    of their size for each of its links; there the gradient is computed by operations that autograd follows once more.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, labels: Tensor, loss: OutputLoss) -> Tensor:
        return loss._potential(rows, labels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, OutputLoss], output: Tensor) -> None:
        rows, labels, ctx.loss = inputs
        ctx.save_for_backward(rows, labels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, labels = ctx.saved_tensors
        return grads[0][:, None] * ctx.loss._delta(rows, labels), None, None


Elementwise = Callable[[Tensor, Tensor, float | Tensor, float], Tensor]
"""Of logits or errors, targets, alpha and beta, all of shapes that fit."""


@dataclass(frozen=True)
class Form:
    """One row of the module's table. `delta` grows with z and is the derivative of `potential`; `at` is its inverse."""

    potential: Elementwise
    delta: Elementwise
    at: Elementwise


def _cube_root(x: Tensor) -> Tensor:
    return x.sign() * x.abs().pow(1 / 3)


def _exp_error(z: Tensor, t: Tensor, a: float | Tensor, b: float) -> Tensor:
    scaled = a * (z - t).abs()
    return (torch.expm1(scaled) - scaled) / a**2


FORMS: dict[str, Form] = {
    "linear": Form(
        potential=lambda z, t, a, b: (z - t).square() / 2,
        delta=lambda z, t, a, b: z - t,
        at=lambda error, t, a, b: error + t,
    ),
    "cubic": Form(
        potential=lambda z, t, a, b: a * z**4 / 4 + (b - t) * z,
        delta=lambda z, t, a, b: a * z**3 + b - t,
        at=lambda error, t, a, b: _cube_root((error + t - b) / a),
    ),
    "exp": Form(
        potential=lambda z, t, a, b: a * z.exp() + (b - t) * z,
        delta=lambda z, t, a, b: a * z.exp() + b - t,
        at=lambda error, t, a, b: ((error + t - b) / a).clamp(min=0).log(),  # -inf: no logit has so low an error
    ),
    "cubic_error": Form(
        potential=lambda z, t, a, b: a * (z - t) ** 4 / 4,
        delta=lambda z, t, a, b: a * (z - t) ** 3,
        at=lambda error, t, a, b: t + _cube_root(error / a),
    ),
    "exp_error": Form(
        potential=_exp_error,
        delta=lambda z, t, a, b: (z - t).sign() * torch.expm1(a * (z - t).abs()) / a,
        at=lambda error, t, a, b: t + error.sign() * torch.log1p(a * error.abs()) / a,
    ),
}
"""Every kind that is a sum over classes."""


def _checked_weights(given: Sequence[float] | Tensor | None) -> Tensor | None:
    if given is None:
        return None
    weights = torch.as_tensor(given, dtype=torch.float32)
    if weights.dim() != 1 or not bool(((weights >= 0) & weights.isfinite()).all()):
        raise UsageError(f"class_weight must be a list of numbers, 0 or more, one per class, got {given!r}")
    return weights
