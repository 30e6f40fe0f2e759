"""Every gradient whole, in full precision: the baseline that codecs and aggregators are measured against.

    Dense        every process holds the model; gradients are averaged by all-reduce (DDP)
    FullyShard   every process holds 1/world of the weights, gradients and optimizer state (FSDP2)

Bytes sent by each of W processes per step, for ring collectives over P bytes of parameters:

    Dense        2 P (W - 1) / W                   reduce-scatter and all-gather of the gradient
    FullyShard   (3 P - root) (W - 1) / W          weights gathered forward and again backward, gradients scattered

Sources: Li et al. 2020 (PyTorch Distributed); Zhao et al. 2023 (PyTorch FSDP); torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from leantrain.errors import UsageError
from leantrain.exchange.channel import ring_bytes
from leantrain.exchange.protocol import Share, Splittable

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class Stations:
    """What an exchange does at each station of a step unless it says otherwise; see `leantrain.exchange.Exchange`."""

    replicated: bool = True
    clips: ClassVar[bool] = True
    knows_loss: ClassVar[bool] = False

    def check_optimizer(self, optimizer: type[Optimizer]) -> None:
        """Every optimizer works: it sees ordinary parameters and the same gradient in every process."""

    def join(self, learner: Any) -> None:
        """Nothing to arrange: every process trains all of the model."""

    def connect(self, optimizers: Sequence[Optimizer]) -> None:
        """Nothing to learn: they see ordinary gradients."""

    def shares(self, batch: Splittable, rank: int, world: int, accumulate: int) -> list[Share]:
        """This process's examples in `accumulate` micro-batches."""
        parts = batch.shard(rank, world).split(accumulate)
        return [Share(part, 1 / len(parts), place=rank) for part in parts]

    def tell_loss(self, loss: Tensor) -> None:
        """Kept for `known_loss`."""
        self._loss = loss

    def known_loss(self) -> Tensor:
        """That of this process's own shares: it stands for all."""
        return self._loss

    def finish_gradients(self) -> None:
        """Nothing is left to do: the backward pass has exchanged them."""

    def agree(self, values: Sequence[float], always: bool = False) -> list[float] | None:
        """An all-reduce of a few numbers, in every step."""
        return highest(values)

    def after_step(self, last: bool = False) -> None:
        """Weights are not exchanged: all processes have taken the same step."""

    def consensus(self) -> AbstractContextManager[None]:
        """All processes have the same weights anyway."""
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """Nothing worth a line."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """No state."""

    def resized(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
        """No state, whatever the number of processes."""
        return {}


class Dense(Stations):
    """Average whole gradients over all processes with `DistributedDataParallel`, overlapped with the backward pass.

    Gradients live in the communication buckets (`gradient_as_bucket_view`), so they are not held twice.
    """

    def attach(self, model: nn.Module) -> nn.Module:
        """The model wrapped for several processes; the model itself for one, or if it is wrapped already."""
        if _world_size() == 1 or isinstance(model, DistributedDataParallel):
            return model
        device = next(model.parameters()).device
        indices = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=indices, gradient_as_bucket_view=True)

    def gradient_sync(self, model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Without `enabled`, gradients stay in this process until a later backward pass with it."""
        if enabled or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        """Ring all-reduce of every gradient once, however many micro-batches there are. Buffers are not counted."""
        return self.predicted_bytes([p for p in model.parameters() if p.requires_grad], world)

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """Ring all-reduce of every gradient."""
        return sum(ring_bytes(p.numel(), p.element_size(), world) for p in params)


class FullyShard(Stations):
    """Split weights, gradients and optimizer state over all processes with FSDP2's `fully_shard`.

    Each child of the model's first `ModuleList` (its blocks) is one unit that is gathered when it runs and freed
    after it; everything else belongs to the root, which stays gathered between forward and backward.
    """

    def check_optimizer(self, optimizer: type[Optimizer]) -> None:
        """Refuse optimizers that declare `whole_matrices = True`.

        Raises:
            UsageError: the optimizer looks at whole gradient matrices, and a process would only have some rows.
        """
        if getattr(optimizer, "whole_matrices", False):
            raise _needs_whole_matrices(optimizer)

    def attach(self, model: nn.Module) -> nn.Module:
        """Shard the model in place and return it; unchanged when there is only one process."""
        world = _world_size()
        if world == 1:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(model.parameters()).device.type, (world,))
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def connect(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse low-rank optimizers that know nothing of sharded matrices.

        An optimizer of another package has no `whole_matrices`. If its groups have a `rank`, it decomposes gradients
        as GaLore does, which PyTorch would do by gathering each of them whole in every process.

        Raises:
            UsageError: there is one, and there are several processes.
        """
        for optimizer in optimizers if _world_size() > 1 else ():
            if not hasattr(optimizer, "whole_matrices") and any("rank" in group for group in optimizer.param_groups):
                raise _needs_whole_matrices(type(optimizer))

    def gradient_sync(self, model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Without `enabled`, whole gradients stay in this process until a later backward pass with it: accumulation
        saves communication here and costs the memory of an unsharded gradient."""
        return _scattering(cast("FSDPModule", model), enabled) if _world_size() > 1 else nullcontext()

    def bytes_sent_per_step(self, model: nn.Module, world: int, micro_batches: int = 1) -> int:
        """Ring all-gathers of the weights in every pass and one ring reduce-scatter of the gradients.

        FSDP2 splits along the first axis and pads it to a multiple of `world`. Blocks are gathered twice per
        micro-batch, what belongs to the root once.
        """
        in_blocks = {id(p) for block in _blocks(model) for p in block.parameters()}
        total = 0
        for p in model.parameters():
            rows = p.shape[0] if p.ndim else 1
            piece = -(-rows // world) * (p.numel() // max(1, rows)) * p.element_size()
            gathers = micro_batches * (2 if id(p) in in_blocks else 1)
            total += (world - 1) * piece * (gathers + (1 if p.requires_grad else 0))
        return total

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """As if all parameters belonged to blocks: two all-gathers of the weights and a reduce-scatter of gradients."""
        return sum(3 * (world - 1) * -(-p.numel() // world) * p.element_size() for p in params)


def highest(values: Sequence[float]) -> list[float]:
    """Every value's maximum over all processes."""
    if _world_size() == 1:
        return list(values)
    found = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


@contextmanager
def _scattering(model: FSDPModule, enabled: bool) -> Iterator[None]:
    model.set_requires_gradient_sync(enabled)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _needs_whole_matrices(optimizer: type[Optimizer]) -> UsageError:
    return UsageError(
        f"exchange FullyShard cannot be combined with optimizer {optimizer.__name__}: it works on whole "
        "gradient matrices, and a sharded process holds only some rows of each; use leantrain.exchange.Dense"
    )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The children of the first ModuleList, which is where models of repeated blocks keep them."""
    first = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), None)
    return [] if first is None else list(first)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
