"""Noticing a loss or a gradient that is no longer a number, without making a GPU wait."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class FiniteGuard:
    """Looks at every step's loss and gradient norm.

    On the CPU the numbers are there, so a bad one is told before the weights move. On CUDA looking at once would let
    the GPU run dry at every step; the numbers are copied in the background and looked at one step later. The weights
    have then taken one bad step, so ask `settle` before saving them.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, Tensor, torch.cuda.Event] | None = None

    def watch(self, step: int, loss: Tensor, norm: Tensor) -> str | None:
        """What is wrong at `step` (on CUDA: at the one before), or None. Both tensors have 0 dimensions."""
        if not loss.is_cuda:
            return _problem(step, loss.item(), norm.item())
        problem = self.settle()
        both = torch.stack([loss.float(), norm.float()])
        copy = torch.empty(2, pin_memory=True)
        copy.copy_(both, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending = (step, copy, arrived)
        return problem

    def settle(self) -> str | None:
        """What is wrong at the last step watched, or None; waits for the GPU."""
        if self._pending is None:
            return None
        step, copy, arrived = self._pending
        self._pending = None
        arrived.synchronize()
        return _problem(step, *copy.tolist())


def _problem(step: int, loss: float, norm: float) -> str | None:
    if math.isfinite(loss) and math.isfinite(norm):
        return None
    return f"at step {step} the loss is {loss:g} and the gradient norm {norm:g}"
