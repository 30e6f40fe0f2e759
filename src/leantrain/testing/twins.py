"""Slow float64 twins: each method once more, as a loop over parameters that can be read beside the paper.

A twin shares no code with the method it checks. Weights and gradients are lists of float64 tensors in one fixed order;
the twin keeps what it remembers in a list of the same length. Nothing here is meant to be quick.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SlowAdamW", "SlowGaLoreAdamW", "SlowSGD"]


class SlowSGD:
    """Stochastic gradient descent with momentum, as torch.optim.SGD defines it (decay is added to the gradient)."""

    def __init__(
        self, lr: float, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False, maximize: bool = False,
    ) -> None:  # fmt: skip
        self.lr, self.momentum, self.dampening, self.weight_decay = lr, momentum, dampening, weight_decay
        self.nesterov, self.sign = nesterov, -1.0 if maximize else 1.0
        self.buffers: list[Tensor] = []

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """b = momentum b + (1 - dampening) g (at first b = g);  w = w - lr b, or w - lr (g + momentum b)."""
        first = not self.buffers
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            g = self.sign * g + self.weight_decay * w
            if first:
                self.buffers.append(g.clone())
            else:
                self.buffers[i] = self.momentum * self.buffers[i] + (1 - self.dampening) * g
            b = self.buffers[i]
            w -= self.lr * (g + self.momentum * b if self.nesterov else b if self.momentum else g)


class SlowAdamW:
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2), with the decay first and eps after the corrected root."""

    def __init__(
        self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, maximize: bool = False,
    ) -> None:  # fmt: skip
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.amsgrad, self.sign = amsgrad, -1.0 if maximize else 1.0
        self.t = 0
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []
        self.largest: list[Tensor] = []

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g*g;  w = w - lr decay w - lr m^ / (sqrt(v^) + eps)."""
        b1, b2 = self.betas
        if self.t == 0:
            self.first = [torch.zeros_like(w) for w in weights]
            self.second = [torch.zeros_like(w) for w in weights]
            self.largest = [torch.zeros_like(w) for w in weights]
        self.t += 1
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            g = self.sign * g
            self.first[i] = b1 * self.first[i] + (1 - b1) * g
            self.second[i] = b2 * self.second[i] + (1 - b2) * g * g
            self.largest[i] = torch.maximum(self.largest[i], self.second[i])
            m_hat = self.first[i] / (1 - b1**self.t)
            v_hat = (self.largest[i] if self.amsgrad else self.second[i]) / (1 - b2**self.t)
            w -= self.lr * self.weight_decay * w
            w -= self.lr * m_hat / (v_hat.sqrt() + self.eps)


class SlowGaLoreAdamW:
    """GaLore with AdamW (Zhao et al. 2024, arXiv:2403.03507, Algorithm 2).

    A tensor of two or more dimensions is seen as a matrix (its first dimension by all the others). A matrix whose
    smaller side is above `rank` is projected: on the right when it is square or tall, else on the left. Everything
    else takes the step of plain AdamW.

    The basis is computed from the float32 gradient: singular vectors have no sign of their own, and with
    on_refresh="keep" the sign that the decomposition happens to return stays visible in the weights.
    """

    def __init__(
        self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, rank: int | None = None, refresh: int = 200, scale: float = 0.25,
        basis: str = "svd", on_refresh: str = "keep", stagger: bool = True,
    ) -> None:  # fmt: skip
        if basis != "svd":
            raise NotImplementedError(f"the twin knows the paper's basis='svd' only, got basis={basis!r}")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.rank, self.refresh, self.scale = rank, refresh, scale
        self.on_refresh, self.stagger = on_refresh, stagger
        self.t = 0
        self.memory: list[dict[str, Tensor]] = []

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """One step of every parameter; t counts from 0, as in the paper."""
        self.memory = self.memory or [{} for _ in weights]
        low_rank = [i for i, w in enumerate(weights) if self._is_projected(w)]
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            if i in low_rank:
                due = self._is_due(low_rank.index(i), len(low_rank))
                update = self._projected_update(self.memory[i], g.reshape(g.shape[0], -1), due).reshape(w.shape)
            else:
                update = self._adam(self.memory[i], g)
            w -= self.lr * self.weight_decay * w
            w -= self.lr * update
        self.t += 1

    def _is_projected(self, w: Tensor) -> bool:
        if self.rank is None or w.ndim < 2:
            return False
        rows, columns = w.shape[0], w.numel() // w.shape[0]
        return min(rows, columns) > self.rank

    def _is_due(self, i: int, n: int) -> bool:
        if self.t == 0:
            return True
        if not self.stagger:
            return self.t % self.refresh == 0
        first_again = math.ceil((i + 1) * self.refresh / n)
        return self.t >= first_again and (self.t - first_again) % self.refresh == 0

    def _projected_update(self, memory: dict[str, Tensor], G: Tensor, due: bool) -> Tensor:
        """scale * back(adam(project(G))). Everything is written for right projection; a wide matrix is turned."""
        wide = G.shape[0] < G.shape[1]
        if due:
            U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
            P_new = (U[:, : self.rank] if wide else Vh[: self.rank].T).double()
            self._carry_moments(memory, P_new)
            memory["P"] = P_new
        R = (G.T if wide else G) @ memory["P"]
        update = self.scale * self._adam(memory, R) @ memory["P"].T
        return update.T if wide else update

    def _carry_moments(self, memory: dict[str, Tensor], P_new: Tensor) -> None:
        if "M" not in memory or self.on_refresh == "keep":
            return
        if self.on_refresh == "reset":  # as at the very first step: the bias correction starts again, too
            for name in ("M", "V", "t"):
                del memory[name]
            return
        overlap = memory["P"].T @ P_new
        memory["M"] = memory["M"] @ overlap
        memory["V"] = memory["V"] @ (overlap * overlap)

    def _adam(self, memory: dict[str, Tensor], R: Tensor) -> Tensor:
        b1, b2 = self.betas
        zero = torch.zeros_like(R)
        memory["M"] = b1 * memory.get("M", zero) + (1 - b1) * R
        memory["V"] = b2 * memory.get("V", zero) + (1 - b2) * R * R
        t = memory["t"] = memory.get("t", torch.zeros(())) + 1
        m_hat = memory["M"] / (1 - b1 ** int(t))
        v_hat = memory["V"] / (1 - b2 ** int(t))
        return m_hat / (v_hat.sqrt() + self.eps)
