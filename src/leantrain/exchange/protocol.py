"""What the loop asks of an exchange: the stations of a step, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer


class Splittable(Protocol):
    """What an exchange does with a batch; `leantrain.data.Batch` can."""

    def __len__(self) -> int: ...
    def shard(self, rank: int, world: int) -> Any:
        """The examples of process `rank` of `world`."""
        ...

    def split(self, parts: int) -> Any:
        """As many micro-batches of equal size."""
        ...


@dataclass(frozen=True)
class Share:
    """A micro-batch that a process computes gradients of."""

    batch: Any
    weight: float
    """What d(mean loss of the micro-batch) is multiplied with before it is added to `.grad`."""
    place: int
    """Where in the global batch it is: decides the random numbers of dropout and the like, whoever computes it."""


class Exchange(Protocol):
    """How the gradients of several processes become one. With a single process it does nothing at all.

    `leantrain.exchange.Dense` has a default for everything: write a subclass.
    """

    replicated: bool
    """Whether weights and optimizer state are the same in all processes after every step. If not, all are saved."""
    clips: ClassVar[bool]
    """Whether it makes sense to clip what `finish_gradients` leaves in `.grad` by its norm."""
    knows_loss: ClassVar[bool]
    """Whether `known_loss` is that of the whole batch in every process, so that nobody need be asked."""

    def check_optimizer(self, optimizer: type[Optimizer]) -> None:
        """Raise UsageError if this class of optimizer cannot work with what the exchange makes of the parameters."""
        ...

    def attach(self, model: nn.Module) -> nn.Module:
        """The model to run from now on. Its parameters must be handed to optimizers after this call, not before."""
        ...

    def join(self, learner: Any) -> None:
        """Arrange with the learner what each process trains. Called once, after `attach`.

        Raises:
            UsageError: it is a learner that cannot be shared out so.
        """
        ...

    def connect(self, optimizers: Sequence[Optimizer]) -> None:
        """Get to know the optimizers that step the attached model. Called once, before the first backward pass.

        Raises:
            UsageError: they cannot work with this exchange, for a reason that only their groups show.
        """
        ...

    def shares(self, batch: Splittable, rank: int, world: int, accumulate: int) -> list[Share]:
        """What this process computes of the global batch of a step, in micro-batches; none if it is not needed."""
        ...

    def gradient_sync(self, model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """In the block, a backward pass of the attached model exchanges gradients (True) or only adds them up."""
        ...

    def tell_loss(self, loss: Tensor) -> None:
        """Before `finish_gradients`: the sum of weight times mean loss over this process's shares, 0 dimensions."""
        ...

    def known_loss(self) -> Tensor:
        """After `finish_gradients`: the loss to log, 0 dimensions."""
        ...

    def finish_gradients(self) -> None:
        """After a step's last backward pass: make `.grad` what the optimizers are to see, and raise what failed."""
        ...

    def agree(self, values: Sequence[float], always: bool = False) -> list[float] | None:
        """Every value's maximum over the processes, the same list in all of them.

        Returns:
            None if processes do not meet in this step; never with `always`.
        """
        ...

    def after_step(self, last: bool = False) -> None:
        """After the optimizers have stepped: exchange weights, where that is what is exchanged.

        Args:
            last: no step will follow, so what is still to be exchanged must be now.
        """
        ...

    def consensus(self) -> AbstractContextManager[None]:
        """In the block the model has the weights that all processes agree on: to evaluate and to save."""
        ...

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        """Bytes each process sends per optimizer step, for the attached model and `world` processes.

        Where steps differ, those of the step whose gradients were exchanged last; the loop asks after every step.
        """
        ...

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """By formula, for parameters that may be on the meta device: bytes a process sends per step, in the mean."""
        ...

    def metrics(self) -> dict[str, float]:
        """A few numbers about the last step, for the log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """This process's state: nested dicts and lists of tensors and plain values. Every process may have another."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave in the process of the same rank."""
        ...

    def resized(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
        """The state for process `rank` of `world`, from those of another number of processes, in rank order.

        Raises:
            UsageError: it cannot be made.
        """
        ...
