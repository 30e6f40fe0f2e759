"""PyTorch's own hooks that average gradients in 16 bits: half the bytes of float32, and what others are measured by.

Source: Li et al. 2020 (PyTorch Distributed, VLDB); torch.distributed.algorithms.ddp_comm_hooks.default_hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import UsageError
from leantrain.exchange.channel import ring_bytes
from leantrain.exchange.dense import Dense


class HalfPrecision(Dense):
    """DDP whose gradients travel, and are added up, in 16 bits.

    Args:
        dtype: "bfloat16", with the range of float32 and 8 bits of precision, or "float16", with 11 bits and up to
            65,504. Gradients are divided by the number of processes before they are sent.

    Raises:
        UsageError: another dtype.
    """

    def __init__(self, dtype: Literal["bfloat16", "float16"] = "bfloat16") -> None:
        if dtype not in ("bfloat16", "float16"):
            raise UsageError(f"dtype must be 'bfloat16' or 'float16', got {dtype!r}")
        self.dtype = dtype

    def attach(self, model: nn.Module) -> nn.Module:
        """The model wrapped for several processes, with the hook; the model itself for one."""
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        attached = super().attach(model)
        hook = default_hooks.bf16_compress_hook if self.dtype == "bfloat16" else default_hooks.fp16_compress_hook
        if isinstance(attached, DistributedDataParallel):
            # Within a lambda: DDP refuses bf16_compress_hook by its name where there is no NCCL, and gloo can do it.
            attached.register_comm_hook(attached.process_group, lambda group, bucket: hook(group, bucket))
        return attached

    def predicted_bytes(self, params: Sequence[Tensor], world: int) -> int:
        """Ring all-reduce of 2 bytes a number."""
        return sum(ring_bytes(param.numel(), 2, world) for param in params)
