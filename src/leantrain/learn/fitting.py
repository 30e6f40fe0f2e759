"""A training loop for those who have none: a learner, a loader and an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leantrain.errors import UsageError
from leantrain.learn.protocol import Learner


@dataclass(frozen=True)
class Pair:
    """What a DataLoader gives, as a batch."""

    inputs: Tensor
    targets: Tensor
    ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)


def fit(
    learner: Learner, loader: Iterable[Any], optimizer: Callable[[list[nn.Parameter]], Optimizer], *,
    epochs: int = 1, clip: float | None = None,
) -> list[float]:  # fmt: skip
    """Train on all of `loader`, `epochs` times over, at a constant learning rate.

    Args:
        learner: any learner; those with stages share out the epochs among them.
        loader: gives batches: `(inputs, targets)`, `(inputs, targets, ids)` or an object with these names. It has a
            length, as a `DataLoader` of a data set has.
        optimizer: makes an optimizer of a list of parameters, such as `partial(torch.optim.SGD, lr=0.1)`.
        epochs: how often, >= 1.
        clip: largest norm of the gradient of each part that is trained by itself, above 0; None: no clipping.

    Returns:
        The mean loss of every epoch.

    Raises:
        UsageError: `epochs` or `clip` is out of its range, or the loader has no length or no batches.
    """
    if epochs < 1 or (clip is not None and not clip > 0):
        raise UsageError(f"epochs must be >= 1 and clip > 0 or None, got epochs={epochs}, clip={clip}")
    length = _length(loader)
    if not length:
        raise UsageError(f"fit needs a loader with a length, at least one batch long, got {type(loader).__name__}")
    means, total, number = [], epochs * length, 0
    stage, optimizers = None, list[Optimizer]()
    for _ in range(epochs):
        losses = []
        for each in loader:
            learner.enter(number / total)
            if learner.stage != stage:
                stage = learner.stage
                optimizers = [optimizer(list(part.params)) for part in learner.parts]
                for part, own in zip(learner.parts, optimizers, strict=True):
                    for group in own.param_groups:
                        group["lr"] *= part.rate
            losses.append(learner.step(_batch(each)).loss)
            learner.hand_over()
            for part, own in zip(learner.parts, optimizers, strict=True):
                if clip is not None:
                    nn.utils.clip_grad_norm_(part.params, clip)
                own.step()
                own.zero_grad()
            number += 1
        means.append(torch.stack(losses).mean().item())
    return means


def _length(loader: Iterable[Any]) -> int:
    """Batches of a loader; 0 if it does not know."""
    try:
        return len(loader) if isinstance(loader, Sized) else 0
    except TypeError:  # a DataLoader of a stream has the method and yet no length
        return 0


def _batch(given: Any) -> Any:
    if isinstance(given, (tuple, list)):
        if len(given) not in (2, 3):
            raise UsageError(f"a loader must give (inputs, targets) or (inputs, targets, ids), got {len(given)} things")
        return Pair(*given)
    return given
