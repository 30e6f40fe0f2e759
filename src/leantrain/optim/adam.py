"""Adam's rule: a step of nearly equal size for every coordinate (Kingma & Ba, ICLR 2015, Algorithm 1).

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g * g          t = 1, 2, ...
    update = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Two numbers of state per number of the gradient. Decoupled weight decay and the learning rate belong to the chain that
holds the rule. At the end of a chain the whole step is PyTorch's own fused kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam as torch_adam

from leantrain.errors import UsageError
from leantrain.optim.rules import State, load, store

_FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Adam:
    """Adam's rule.

    Args:
        betas: decay of the averages of g and of g * g, each in [0, 1).
        eps: added to the denominator, >= 0.

    Raises:
        UsageError: a value outside its range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    moments: ClassVar[Mapping[str, int]] = {"exp_avg": 1, "exp_avg_sq": 2}
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas must be two numbers in [0, 1), got betas={self.betas}")
        if not self.eps >= 0:
            raise UsageError(f"eps must be >= 0, got eps={self.eps}")

    def init(self, param: Tensor) -> State:
        return {name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in self.moments}

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        mean = load(state, "exp_avg").lerp_(grad, 1 - beta1)
        square = load(state, "exp_avg_sq").mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        store(state, "exp_avg", mean)
        store(state, "exp_avg_sq", square)
        root = (square / _correction(beta2, step, grad)).sqrt_().add_(self.eps)
        return (mean / _correction(beta1, step, grad)).div_(root)

    def descend(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], lr: float | Tensor, weight_decay: float
    ) -> None:
        """The whole AdamW step on `params` in place, parameters of any shapes, by PyTorch's functional form."""
        fused = all(fused_kernel_applies(param, grad) for param, grad in zip(params, grads, strict=True))
        torch_adam(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=fused,
            foreach=False if fused else None,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
            decoupled_weight_decay=True,
        )


def fused_kernel_applies(param: Tensor, grad: Tensor) -> bool:
    """Whether PyTorch's fused Adam reads these tensors as they are meant.

    On the CPU (PyTorch 2.13) it takes their numbers in the order of memory: where a parameter has gaps, or its gradient
    another layout, it moves the wrong numbers without a word.
    """
    if param.device.type not in _FUSED_DEVICES or isinstance(param, DTensor):
        return False
    dense = param.is_contiguous() or (param.ndim == 4 and param.is_contiguous(memory_format=torch.channels_last))
    return dense and param.stride() == grad.stride()


def _correction(beta: float, step: Tensor, like: Tensor) -> Tensor:
    """1 - beta^t for each parameter of the stack, shaped to divide a tensor like `like`."""
    # In float64 until here: 1 - 0.999 in float32 is wrong in its fifth digit.
    return (1 - beta ** (step + 1)).to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))
