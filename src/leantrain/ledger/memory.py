"""Peak memory by kind: parameters, gradients, optimizer state, and activations saved for backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain

from torch import Tensor, nn
from torch.optim import Optimizer

from leantrain.ledger.activations import Activations
from leantrain.ledger.storages import plain_parts, reachable_tensors, storage_bytes, storage_keys

KINDS = ("parameters", "gradients", "optimizer_state", "activations")


class MemoryMeter:
    """Looks at a model and its optimizers during a sampled step and keeps the largest value of each kind, in bytes.

    `together` is the largest sum of the four kinds at one moment, which is less than the sum of their peaks:
    activations are gone when the gradients are complete.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], activations: bool = True) -> None:
        self.peaks: dict[str, int | None] = dict.fromkeys(KINDS)
        """Bytes by kind; None for a kind that nothing was seen of."""
        self.together = 0
        self._model, self._optimizers = model, optimizers
        self._activations, self._watches_activations = Activations(), activations
        self._lasting = 0  # parameters and optimizer state, as last measured

    def measure_lasting(self) -> None:
        """Measure parameters and optimizer state, which change only when the optimizer moves."""
        kept = [*self._model.parameters(), *self._model.buffers()]
        state = chain.from_iterable(reachable_tensors(optimizer.state) for optimizer in self._optimizers)
        parameters = storage_bytes(kept)
        states = storage_bytes(state, excluding=storage_keys(kept))
        self._lasting = parameters + states
        self._raise("parameters", parameters)
        self._raise("optimizer_state", states)

    def held(self) -> int:
        """Measure everything now; the bytes of all four kinds together."""
        self.measure_lasting()
        return self.observe()

    def observe(self) -> int:
        """Measure the gradients and activations that exist now; the bytes of all four kinds together."""
        gradients = storage_bytes(p.grad for p in self._model.parameters() if p.grad is not None)
        return self._note(gradients + self._held_by_optimizers())

    def watching(self, phase: str, follow_operations: bool) -> AbstractContextManager[None]:
        """Watch the inside of a forward or backward phase; other phases need no watching, only `observe` after."""
        if phase == "forward" and self._watches_activations:
            kept = storage_keys(chain(self._model.parameters(), self._model.buffers()))
            return self._activations.recording(kept, follow_operations)
        return self._watching_gradients() if phase == "backward" else nullcontext()

    @contextmanager
    def _watching_gradients(self) -> Iterator[None]:
        # A hook on the arriving gradient, before it is accumulated: a hook after accumulation would run behind one
        # that already stepped the parameter and dropped its gradient, and would see nothing.
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        sizes = [0 if p.grad is None else _bytes(p.grad) for p in parameters]  # of each parameter's latest gradient
        handles = [p.register_hook(partial(self._arrived, i, parameters, sizes)) for i, p in enumerate(parameters)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _arrived(self, index: int, parameters: list[nn.Parameter], sizes: list[int], gradient: Tensor) -> None:
        held = self._held_by_optimizers()
        held += sum(size for p, size in zip(parameters, sizes, strict=True) if p.grad is not None)
        if parameters[index].grad is None:
            sizes[index] = _bytes(gradient)
            held += sizes[index]
        self._note(held)

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """Look at these optimizers from now on."""
        self._optimizers = optimizers

    def _held_by_optimizers(self) -> int:
        """Bytes of gradients that are not in `.grad`: one that steps in backward accumulates projected ones itself."""
        holders = (optimizer for optimizer in self._optimizers if hasattr(optimizer, "held_gradients"))
        return storage_bytes(tensor for holder in holders for tensor in holder.held_gradients())

    def _note(self, gradients: int) -> int:
        if gradients:  # none at the moments of looking does not mean that there never were any
            self._raise("gradients", gradients)
        if self._activations.peak is not None:
            self._raise("activations", self._activations.peak)
        held = self._lasting + gradients + self._activations.live
        self.together = max(self.together, held)
        return held

    def _raise(self, kind: str, value: int) -> None:
        self.peaks[kind] = max(self.peaks[kind] or 0, value)


def _bytes(gradient: Tensor) -> int:
    """Bytes of a gradient's own numbers; of those on this process, if it is a DTensor."""
    return sum(part.numel() * part.element_size() for part in plain_parts(gradient))
