"""What the rest of leantrain knows about data: a `Batch`, and the few questions every data set answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from leantrain.errors import UsageError

Task = Literal["next_token", "classification", "regression"]
Spec = dict[str, int | tuple[int, ...]]


@dataclass(frozen=True)
class Batch:
    """Examples that travel together; the first dimension of every tensor counts examples.

    Args:
        inputs: [B, T] int64 tokens, [B, C, H, W] float32 images, or [B, F] float32 features.
        targets: [B, T] int64, the inputs shifted by one (next token); [B] int64 classes; [B, outputs] float32.
        ids: [B] int64, which examples of the data set these are. An example keeps its id in every epoch.

    Raises:
        UsageError: the three differ in length.
    """

    inputs: Tensor
    targets: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        if not len(self.inputs) == len(self.targets) == len(self.ids):
            raise UsageError(
                "inputs, targets and ids of a batch must count the same examples, "
                f"got {len(self.inputs)}, {len(self.targets)} and {len(self.ids)}"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """Input tokens in the batch; 0 for anything that is not [B, T] int64."""
        is_text = self.inputs.dtype == torch.int64 and self.inputs.ndim == 2
        return self.inputs.numel() if is_text else 0

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; tensors that are there already are not copied."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.ids.to(device))

    def shard(self, rank: int, world: int) -> Batch:
        """The contiguous part of a global batch that worker `rank` of `world` trains on: views, no copy.

        Raises:
            UsageError: `world` does not divide the batch, or `rank` is not in [0, world).
        """
        if not 0 <= rank < world:
            raise UsageError(f"rank must be in [0, world), got rank={rank}, world={world}")
        return self._parts(world, f"world={world} workers")[rank]

    def split(self, n: int) -> tuple[Batch, ...]:
        """`n` equal micro-batches in order: views, no copy.

        Raises:
            UsageError: `n` is below 1 or does not divide the batch.
        """
        return self._parts(n, f"n={n} micro-batches")

    def _parts(self, n: int, wanted: str) -> tuple[Batch, ...]:
        if n < 1 or len(self) % n:
            raise UsageError(f"a batch of {len(self)} examples cannot be cut into {wanted} of equal size")
        if n == 1:
            return (self,)
        size = len(self) // n
        cuts = [slice(part * size, (part + 1) * size) for part in range(n)]
        return tuple(Batch(self.inputs[cut], self.targets[cut], self.ids[cut]) for cut in cuts)


@runtime_checkable
class Data(Protocol):
    """What a recipe's `data` must offer. Any object with these works; nothing needs to be inherited.

    Every worker builds the same data and asks for the same global batch, then keeps its `Batch.shard`. So the
    examples of a step do not depend on the number of workers, and a resumed run needs no data state but its step.
    """

    @property
    def task(self) -> Task:
        """Which loss fits: cross entropy per token, cross entropy per example, or squared error."""
        ...

    @property
    def spec(self) -> Spec:
        """What a model may need to know, under the names of the models' arguments (`vocab_size`, `classes`, ...)."""
        ...

    @property
    def train_size(self) -> int:
        """Number of training examples; for text, of windows of `context` tokens that do not overlap."""
        ...

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        """The global batch of `size` examples of `step` (counted from 0): a pure function of the arguments."""
        ...

    def eval_batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out part in a fixed order, at most `limit` batches; the last one may be smaller than `size`."""
        ...
