"""What the loop asks of an exchange."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn
from torch.optim import Optimizer


class Exchange(Protocol):
    """How the gradients of several processes become one. With a single process it does nothing at all."""

    def check_optimizer(self, optimizer: type[Optimizer]) -> None:
        """Raise UsageError if this class of optimizer cannot work with what the exchange makes of the parameters."""
        ...

    def attach(self, model: nn.Module) -> nn.Module:
        """The model to run from now on. Its parameters must be handed to optimizers after this call, not before."""
        ...

    def connect(self, optimizers: Sequence[Optimizer]) -> None:
        """Get to know the optimizers that step the attached model. Called once, before the first backward pass.

        Raises:
            UsageError: they cannot work with this exchange, for a reason that only their groups show.
        """
        ...

    def gradient_sync(self, model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """In the block, a backward pass of the attached model exchanges gradients (True) or only adds them up."""
        ...

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        """Bytes each process sends per optimizer step, for the attached model and `world` processes.

        Where steps differ, those of the step whose gradients were exchanged last; the loop asks after every step.
        """
        ...
