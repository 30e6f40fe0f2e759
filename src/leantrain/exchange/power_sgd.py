"""PyTorch's own PowerSGD hook: every gradient matrix travels as two thin ones. What others are measured by.

    M = G + E                      E: what was not sent before, of this process
    P = orthogonal(mean of M Q)    [n, r]
    Q = mean of M^T P              [m, r]
    G = P Q^T,  E = M - G

PyTorch's hook stands still on gloo when several buckets are on their way, divides by zero where a gradient matrix is
zero, keeps its state by the number of a bucket, which means another one after a restart, and saves it as a pickle. It
is run here one bucket at a time in the thread of `GradientHook`, with parameters in the order of their names and its
state in plain tensors, so none of this happens.

Source: Vogels, Karimireddy & Jaggi 2019 (PowerSGD, NeurIPS); torch.distributed.algorithms.ddp_comm_hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import UsageError
from leantrain.exchange.channel import ring_bytes
from leantrain.exchange.hook import Bucket, GradientHook

_STATE = ("error_dict", "p_memory_dict", "q_memory_dict")
_NO_ZERO_DIVISION = 1e-8


class PowerSGD(GradientHook):
    """DDP with PyTorch's PowerSGD.

    Args:
        rank: columns of the thin matrices, >= 1.
        start: steps that average whole gradients before, >= 2.
        min_compression_rate: a matrix is sent whole where this would not save so many times its numbers.
        seed: decides the first Q.
        timeout_s: seconds that a peer may take, above 0; None: what LEANTRAIN_TIMEOUT_S says, else 600.

    Raises:
        UsageError: an argument is out of its range.
    """

    def __init__(
        self, rank: int = 1, start: int = 10, min_compression_rate: float = 2.0, seed: int = 0,
        timeout_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(timeout_s)
        if rank < 1:
            raise UsageError(f"rank must be a whole number from 1 up, got {rank!r}")
        if start < 2:
            raise UsageError(f"start must be a number of steps from 2 up: DDP arranges its buckets anew, got {start!r}")
        self.columns, self.start, self.min_compression_rate = rank, start, min_compression_rate
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        self._hook_module = powerSGD_hook
        self._power = powerSGD_hook.PowerSGDState(
            None, rank, start, min_compression_rate=min_compression_rate, random_seed=seed,
            orthogonalization_epsilon=_NO_ZERO_DIVISION,
        )  # fmt: skip

    def attach(self, model: nn.Module, grad_scaler: torch.amp.GradScaler | None = None) -> nn.Module:
        """See `GradientHook.attach`. A plain model gets one bucket for all, so that a restart finds the same."""
        if torch.distributed.is_initialized() and not isinstance(model, DistributedDataParallel):
            megabytes = sum(p.numel() * p.element_size() for p in model.parameters()) // 2**20 + 1
            device = next(model.parameters()).device
            indices = [device.index] if device.type == "cuda" else None
            model = DistributedDataParallel(
                model, device_ids=indices, gradient_as_bucket_view=True, bucket_cap_mb=megabytes
            )
        attached = super().attach(model, grad_scaler)
        if isinstance(attached, DistributedDataParallel):
            cuda = next(attached.parameters()).is_cuda
            self._power.process_group = attached.process_group if cuda else getattr(self.channel, "group", None)
        return attached

    def reduce(self, bucket: Bucket) -> list[Tensor]:
        """Run PyTorch's hook to its end."""
        if self.channel.all_reduce(torch.tensor([0.0 if bucket.finite else 1.0]), "max").item():
            return bucket.nan()
        if self.world == 1:
            return bucket.grads
        ordered = _Ordered(bucket)
        self._power.iter = self.steps  # PyTorch's hook would count buckets
        before, compressed = self._power.total_numel_after_compression, self.steps >= self.start
        self._hook_module.powerSGD_hook(self._power, ordered).wait()
        thin = [self._power.p_memory_dict[ordered.key], self._power.q_memory_dict[ordered.key]] if compressed else []
        whole = self._power.total_numel_after_compression - before if compressed else bucket.numel
        for numbers in (whole - sum(each.numel() for each in thin), *(each.numel() for each in thin)):
            self.channel.sent += ring_bytes(numbers, bucket.grads[0].element_size(), self.world)
        return ordered.results()

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """Ring all-reduces of P, Q and what is sent whole, as after the start."""
        total = 0
        for param in params:
            rows = param.shape[0] if param.dim() else 1
            columns = param.numel() // max(1, rows)
            thin = (rows + columns) * min(rows, columns, self.columns)
            numbers = thin if thin * self.min_compression_rate < param.numel() else param.numel()
            total += ring_bytes(numbers, 4, world)
        return total

    def state_dict(self) -> dict[str, Any]:
        kind, keys, *position = self._power.rng.get_state(legacy=True)
        tensors = {name: {str(key): each for key, each in getattr(self._power, name).items()} for name in _STATE}
        return {
            **super().state_dict(), **tensors,
            "rng": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *position],
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name in _STATE:
            setattr(self._power, name, {int(key): each.clone() for key, each in state_dict[name].items()})
        kind, keys, *position = state_dict["rng"]
        self._power.rng.set_state((kind, keys.numpy().astype(np.uint32), *position))

    def resized(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
        """The mean of what the old processes had not sent; P and Q are the same in all."""
        errors = {
            key: torch.stack([each["error_dict"][key] for each in states]).mean(0) for key in states[0]["error_dict"]
        }
        return {**super().resized(states, rank, world), "error_dict": errors}


class _Ordered:
    """A bucket as PyTorch's hook wants to see it, its parameters in the order of their names."""

    def __init__(self, bucket: Bucket) -> None:
        self.order = sorted(range(len(bucket.names)), key=bucket.names.__getitem__)
        self.shapes = [bucket.grads[i].shape for i in self.order]
        self.flat = torch.cat([bucket.grads[i].flatten() for i in self.order])
        self.key = int.from_bytes("/".join(sorted(bucket.names)).encode(), "big") % (2**31 - 1)

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        pieces = self.flat.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def index(self) -> int:
        return self.key

    def is_last(self) -> bool:
        return False

    def results(self) -> list[Tensor]:
        by_place = dict(zip(self.order, self.gradients(), strict=True))
        return [by_place[i] for i in range(len(self.order))]
