"""Only what a low-rank optimizer will use of a gradient travels: R numbers of each row instead of all S.

With one basis P in all W processes, the mean of the projected gradients is the projected mean:

    mean_i(G_i) P  =  mean_i(G_i P)               G_i: [L, S] of process i,  P: [S, R],  G_i P: [L, R]
    sent           G_i P                          whole G_i where a basis is due, and of all other parameters
    left in .grad  the smallest G with G P = mean_i(G_i P); it is mean_i(G_i) P P^T where P^T P = I

Saves: (S - R) / S of the gradient traffic of each projected matrix, between refreshes. Costs: one more projection and
its reverse, 4 L S R operations per matrix and step in every process, and the memory of one packed bucket.
All processes compute a new basis from the same averaged gradient with the same instructions, so they get the same bits;
that takes the same kind of processor in all of them.

Source: Zhao et al. 2024 (GaLore, ICML) for the projection; the exchange follows from its linearity, as in the
communication hooks of Li et al. 2020 (PyTorch Distributed) and of Vogels et al. 2019 (PowerSGD, NeurIPS).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from leantrain.errors import UsageError
from leantrain.exchange.channel import ring_bytes
from leantrain.exchange.dense import Dense

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

_NEEDED = ("projects", "basis_due", "project", "lift")


class Projecting(Protocol):
    """What an optimizer has to say about its parameters. Every `leantrain.optim.chain.Chain` does."""

    param_groups: list[dict[str, Any]]

    def projects(self, param: Tensor) -> bool:
        """Whether the parameter is stepped from a projected gradient."""
        ...

    def basis_due(self, param: Tensor) -> bool:
        """Whether its next step computes a basis, for which it needs the whole gradient."""
        ...

    def project(self, param: Tensor, grad: Tensor) -> Tensor:
        """The gradient in the current basis."""
        ...

    def lift(self, param: Tensor, projected: Tensor) -> Tensor:
        """A gradient that `project` makes `projected` of."""
        ...


class Projected(Dense):
    """DDP that exchanges the projected gradient of every matrix that the optimizer projects anyway.

    Weights take the way they take with `Dense`, to rounding. What changes is the `.grad` of projected matrices: between
    refreshes it holds the projected part alone, and so does its norm, which is what is then logged and clipped.

    Examples:
        >>> from leantrain.optim import GaLoreAdamW
        >>> exchange = Projected()
        >>> model = exchange.attach(nn.Linear(64, 32))
        >>> optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, rank=8)
        >>> exchange.connect([optimizer])
    """

    def __init__(self) -> None:
        self._optimizer_of: dict[Tensor, Projecting] = {}
        self._packets: list[tuple[int, int]] = []  # numbers, and bytes of each, of what the last step sent

    def check_optimizer(self, optimizer: type[Optimizer]) -> None:
        """Refuse optimizers that cannot say what they project.

        Raises:
            UsageError: the class has no `projects`, `basis_due`, `project` and `lift`.
        """
        if not _projecting(optimizer):
            raise UsageError(
                f"exchange Projected cannot be combined with optimizer {optimizer.__name__}: it does not say what it "
                "projects; use leantrain.exchange.Dense, or an optimizer of leantrain.optim such as GaLoreAdamW"
            )

    def attach(self, model: nn.Module) -> nn.Module:
        """The model wrapped for several processes; the model itself for one. `connect` must follow."""
        attached = super().attach(model)
        if isinstance(attached, DistributedDataParallel):
            # DDP compares annotations with types and would not take the method's, which are text.
            attached.register_comm_hook(attached.process_group, lambda group, bucket: self._average(group, bucket))
        return attached

    def connect(self, optimizers: Sequence[Optimizer]) -> None:
        """Learn from the optimizers what they project.

        Raises:
            UsageError: an optimizer cannot say it, or none of them projects anything.
        """
        for optimizer in optimizers:
            self.check_optimizer(type(optimizer))
        projecting = cast("Sequence[Projecting]", optimizers)
        self._optimizer_of = {p: each for each in projecting for group in each.param_groups for p in group["params"]}
        if not any(optimizer.projects(param) for param, optimizer in self._optimizer_of.items()):
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            raise UsageError(
                f"exchange Projected has nothing to project: {names} projects no parameter (is rank set, and below the "
                "matrices' sizes?); use leantrain.exchange.Dense"
            )

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        """Ring all-reduce of every packet of the last exchange, however many micro-batches there were."""
        return sum(ring_bytes(numbers, each, world) for numbers, each in self._packets)

    def _average(self, group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's hook: one bucket of this process's gradients becomes that of the means."""
        if not self._optimizer_of:
            raise UsageError("exchange Projected does not know the optimizer: call connect([optimizer]) first")
        buffer, params, grads = bucket.buffer(), bucket.parameters(), bucket.gradients()
        optimizers = [self._projecting_now(param) for param in params]
        if any(optimizers):
            pieces = [
                grad if optimizer is None else optimizer.project(param, grad)
                for optimizer, param, grad in zip(optimizers, params, grads, strict=True)
            ]
            shapes = [piece.shape for piece in pieces]
            packet = torch.cat([piece.reshape(-1).to(buffer.dtype) for piece in pieces])
            del pieces
        else:
            shapes, packet = [], buffer
        if bucket.index() == 0:  # DDP reduces its buckets in their order
            self._packets.clear()
        self._packets.append((packet.numel(), packet.element_size()))

        @torch.no_grad()
        def unpacked(_: object) -> Tensor:
            means = packet.split([shape.numel() for shape in shapes]) if shapes else ()
            for optimizer, param, grad, mean, shape in zip(optimizers, params, grads, means, shapes, strict=False):
                mean = mean.view(shape)
                grad.copy_(mean if optimizer is None else optimizer.lift(param, mean).view(grad.shape))
            return buffer

        # Divided first, as DDP does: a sum might leave the range of float16.
        return dist.all_reduce(packet.div_(group.size()), group=group, async_op=True).get_future().then(unpacked)

    def _projecting_now(self, param: Tensor) -> Projecting | None:
        """The optimizer, where this parameter's gradient travels projected in this step."""
        optimizer = self._optimizer_of.get(param)
        return optimizer if optimizer and optimizer.projects(param) and not optimizer.basis_due(param) else None


def _projecting(optimizer: type[Optimizer]) -> TypeGuard[type[Projecting]]:
    return all(callable(getattr(optimizer, name, None)) for name in _NEEDED)
