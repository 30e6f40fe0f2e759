"""Slow float64 twins: each method once more, as a loop over parameters that can be read beside the paper.

A twin shares no code with the method it checks. Weights and gradients are lists of float64 tensors in one fixed order;
the twin keeps what it remembers in a list of the same length. Nothing here is meant to be quick.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "SlowAPOLLO",
    "SlowAdafactor",
    "SlowAdamW",
    "SlowGaLoreAdafactor",
    "SlowGaLoreAdamW",
    "SlowLion",
    "SlowMomentum",
    "SlowSGD",
]


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
    smaller side is above `rank` is projected: on the right when it is square or tall, else on the left; `side` says
    otherwise. Everything else takes the step of plain AdamW.

    The basis is computed from the float32 gradient: singular vectors have no sign of their own, and with
    on_refresh="keep" the sign that the decomposition happens to return stays visible in the weights.
    """

    def __init__(
        self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, rank: int | None = None, refresh: int = 200, scale: float = 0.25,
        basis: str = "svd", on_refresh: str = "keep", stagger: bool = True, side: str = "std", state_bits: int = 32,
        basis_bits: int = 32, settled: float | None = None,
    ) -> None:  # fmt: skip
        if basis != "svd":
            raise NotImplementedError(f"the twin knows the paper's basis='svd' only, got basis={basis!r}")
        if (state_bits, basis_bits, settled) != (32, 32, None):
            raise NotImplementedError("the twin keeps every number whole and every period as it is")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.rank, self.refresh, self.scale = rank, refresh, scale
        self.on_refresh, self.stagger, self.side = on_refresh, stagger, side
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
        """scale * back(adam(project(G))). Everything is written for right projection; for left ones G is turned."""
        wide = {
            "std": G.shape[0] < G.shape[1], "reverse_std": G.shape[0] >= G.shape[1], "left": True, "right": False,
        }[self.side]  # fmt: skip
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


class SlowMomentum(SlowSGD):
    """As SlowSGD, with decoupled decay: the weights shrink first, and the gradient is left alone."""

    def __init__(
        self, lr: float, momentum: float = 0.9, dampening: float = 0.0, nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(lr, momentum, dampening, 0.0, nesterov)
        self.decoupled = weight_decay

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """w = w - lr decay w, then the step of SlowSGD."""
        for w in weights:
            w -= self.lr * self.decoupled * w
        super().step(weights, gradients)


class SlowLion:
    """Lion (Chen et al. 2023, arXiv:2302.06675, Program 1), with the decay first."""

    def __init__(
        self, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:  # fmt: skip
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.mean: list[Tensor] = []

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """w = w - lr decay w - lr sign(b1 m + (1-b1) g);  m = b2 m + (1-b2) g."""
        b1, b2 = self.betas
        self.mean = self.mean or [torch.zeros_like(w) for w in weights]
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            w -= self.lr * self.weight_decay * w
            w -= self.lr * torch.sign(b1 * self.mean[i] + (1 - b1) * g)
            self.mean[i] = b2 * self.mean[i] + (1 - b2) * g


class SlowAdafactor:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235, Algorithms 4 and 5), with a given learning rate.

    A tensor of more than two dimensions is seen as a matrix (its first dimension by all the others); vectors keep
    every number of their second moment. With beta1, the update is averaged before the learning rate is applied.
    """

    def __init__(
        self, lr: float = 1e-3, decay_exponent: float = -0.8, eps: float = 1e-30, clip_threshold: float = 1.0,
        beta1: float | None = None, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        self.lr, self.decay_exponent, self.eps = lr, decay_exponent, eps
        self.clip_threshold, self.beta1, self.weight_decay = clip_threshold, beta1, weight_decay
        self.memory: list[dict[str, Tensor]] = []

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """w = w - lr decay w - lr u, with u as `_adafactor` has it."""
        self.memory = self.memory or [{} for _ in weights]
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            matrix = g.reshape(g.shape[0], -1) if g.ndim > 2 else g
            update = _adafactor(
                self.memory[i], matrix, self.decay_exponent, self.eps, self.clip_threshold, self.beta1
            ).reshape(w.shape)
            w -= self.lr * self.weight_decay * w
            w -= self.lr * update


class SlowGaLoreAdafactor(SlowGaLoreAdamW):
    """GaLore (see SlowGaLoreAdamW) with Adafactor on the projected gradient and on everything that is not projected.

    At a new basis with on_refresh="rotate", the means over directions stay: they belong to no direction.
    """

    def __init__(
        self, lr: float = 1e-3, decay_exponent: float = -0.8, eps: float = 1e-30, clip_threshold: float = 1.0,
        beta1: float | None = None, weight_decay: float = 0.0, rank: int | None = None, refresh: int = 200,
        scale: float = 0.25, basis: str = "svd", on_refresh: str = "keep", stagger: bool = True, side: str = "std",
        basis_bits: int = 32, settled: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            lr=lr, weight_decay=weight_decay, rank=rank, refresh=refresh, scale=scale, basis=basis,
            on_refresh=on_refresh, stagger=stagger, side=side, basis_bits=basis_bits, settled=settled,
        )  # fmt: skip
        self.decay_exponent, self.adafactor_eps = decay_exponent, eps
        self.clip_threshold, self.beta1 = clip_threshold, beta1

    def _carry_moments(self, memory: dict[str, Tensor], P_new: Tensor) -> None:
        if "t" not in memory or self.on_refresh == "keep":
            return
        if self.on_refresh == "reset":
            memory.clear()
            return
        overlap = memory["P"].T @ P_new
        memory["columns"] = memory["columns"] @ (overlap * overlap)
        if "M" in memory:
            memory["M"] = memory["M"] @ overlap

    def _adam(self, memory: dict[str, Tensor], R: Tensor) -> Tensor:
        matrix = R.reshape(R.shape[0], -1) if R.ndim > 2 else R
        return _adafactor(
            memory, matrix, self.decay_exponent, self.adafactor_eps, self.clip_threshold, self.beta1
        ).reshape(R.shape)


def _adafactor(
    memory: dict[str, Tensor], G: Tensor, decay_exponent: float, eps: float, clip_threshold: float,
    beta1: float | None,
) -> Tensor:  # fmt: skip
    t = memory["t"] = memory.get("t", torch.zeros((), dtype=torch.float64)) + 1
    old = 1 - float(t) ** decay_exponent
    S = G * G + eps
    if G.ndim < 2:
        V = memory["V"] = old * memory.get("V", 0) + (1 - old) * S
    else:
        rows = memory["rows"] = old * memory.get("rows", 0) + (1 - old) * S.mean(dim=1)
        columns = memory["columns"] = old * memory.get("columns", 0) + (1 - old) * S.mean(dim=0)
        V = torch.outer(rows, columns) / rows.mean()
    U = G / V.sqrt()
    U = U / max(1.0, float((U * U).mean().sqrt()) / clip_threshold)
    if beta1 is None:
        return U
    memory["M"] = beta1 * memory.get("M", torch.zeros_like(U)) + (1 - beta1) * U
    return memory["M"]


class SlowAPOLLO:
    """APOLLO (Zhu et al. 2025, arXiv:2412.05270), its matrices and its plain AdamW chosen as SlowGaLoreAdamW's are.

    The limiter sees Adam's update without bias corrections, as in the authors' code. The random matrices are drawn as
    the method draws them, in float32: the one thing both share.
    """

    def __init__(
        self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, rank: int | None = None, refresh: int = 200, scale: float = 1.0,
        scale_per: str = "channel", growth_limit: float = 1.01, seed: int = 0, state_bits: int = 32,
    ) -> None:  # fmt: skip
        if state_bits != 32:
            raise NotImplementedError(f"the twin stores every moment in full, got state_bits={state_bits}")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.rank, self.refresh, self.scale = rank, refresh, scale
        self.scale_per, self.growth_limit, self.seed = scale_per, growth_limit, seed
        self.t = 0
        self.memory: list[dict[str, Tensor]] = []

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """w = w - lr decay w - lr u; t counts from 1 in the corrections and from 0 in the refreshes."""
        self.memory = self.memory or [{"M": torch.zeros(()), "V": torch.zeros(())} for _ in weights]
        b1, b2 = self.betas
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            matrix = g.reshape(g.shape[0], -1) if g.ndim > 1 else g
            if self.rank is not None and g.ndim > 1 and min(matrix.shape) > self.rank:
                update = self._scaled(i, matrix, 1 - b1 ** (self.t + 1), 1 - b2 ** (self.t + 1)).reshape(w.shape)
            else:
                update = self._adam(i, g, 1 - b1 ** (self.t + 1), 1 - b2 ** (self.t + 1))
            w -= self.lr * self.weight_decay * w
            w -= self.lr * update
        self.t += 1

    def _scaled(self, i: int, G: Tensor, correction1: float, correction2: float) -> Tensor:
        """sqrt(scale) s G, limited. Everything is written for a tall matrix; a wide one is turned."""
        if G.shape[0] < G.shape[1]:
            return self._scaled_tall(i, G.T, correction1, correction2).T
        return self._scaled_tall(i, G, correction1, correction2)

    def _scaled_tall(self, i: int, G: Tensor, correction1: float, correction2: float) -> Tensor:
        R = G @ self._random(G.shape[1])
        N = self._adam(i, R, correction1, correction2)
        if self.scale_per == "channel":
            U = G * (N.norm(dim=1) / (R.norm(dim=1) + 1e-8))[:, None]
        else:
            U = G * (N.norm() / (R.norm() + 1e-8))
        correction = math.sqrt(correction2) / correction1
        size = float(U.norm()) / correction
        limit = self.growth_limit * float(self.memory[i]["size"]) if "size" in self.memory[i] else math.inf
        if size > limit:
            U, size = U * (limit / size), limit
        if size > 0:
            self.memory[i]["size"] = torch.tensor(size, dtype=torch.float64)
        return math.sqrt(self.scale) * U

    def _random(self, side: int) -> Tensor:
        from leantrain.optim.bases import Random

        draw = torch.tensor([self.t // self.refresh])
        assert self.rank is not None
        return Random(self.seed, orthonormal=False).directions({"draw": draw}, side, self.rank)[0].double()

    def _adam(self, i: int, R: Tensor, correction1: float, correction2: float) -> Tensor:
        b1, b2 = self.betas
        memory = self.memory[i]
        memory["M"] = b1 * memory["M"] + (1 - b1) * R
        memory["V"] = b2 * memory["V"] + (1 - b2) * R * R
        return (memory["M"] / correction1) / ((memory["V"] / correction2).sqrt() + self.eps)


class SlowAdamWLowBit:
    """AdamW whose averages are stored as codes of 8 or 4 bits, nearest by brute force (Dettmers et al. 2022).

    Written from the papers' description of the maps, in float64 but for what is stored.
    """

    def __init__(
        self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, block: int | None = None, full_precision_below: int = 4096, bits: int = 8,
    ) -> None:  # fmt: skip
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.bits, self.block, self.below = bits, block or {8: 256, 4: 128}[bits], full_precision_below
        self.t = 0
        self.memory: list[list[Tensor]] = []

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g*g;  w = w - lr decay w - lr m^ / (sqrt(v^) + eps); round m, v."""
        self.memory = self.memory or [[torch.zeros_like(w), torch.zeros_like(w)] for w in weights]
        self.t += 1
        b1, b2 = self.betas
        for w, g, moments in zip(weights, gradients, self.memory, strict=True):
            m, v = b1 * moments[0] + (1 - b1) * g, b2 * moments[1] + (1 - b2) * g * g
            w -= self.lr * self.weight_decay * w
            w -= self.lr * (m / (1 - b1**self.t)) / ((v / (1 - b2**self.t)).sqrt() + self.eps)
            if w.numel() >= self.below:
                m, v = self._stored(m, signed=True), self._stored(v, signed=False)
            moments[:] = m, v

    def _stored(self, moment: Tensor, signed: bool) -> Tensor:
        flat, values = moment.flatten().clone(), torch.tensor(self._values(signed), dtype=torch.float64)
        for start in range(0, len(flat), self.block):
            part = flat[start : start + self.block]
            scale = part.abs().max()
            if scale > 0:
                part.copy_(scale * values[((part / scale)[:, None] - values).abs().argmin(1)])
        return flat.view(moment.shape)

    def _values(self, signed: bool) -> list[float]:
        if self.bits == 4 and not signed:
            return [i / 16 for i in range(1, 17)]
        values, decades = [0.0 if signed else 1e-7, 1.0], self.bits - 1
        for decade in range(decades):
            parts = 2**decade if signed else 2 ** (decade + 1)
            for i in range(parts):
                middle = (0.1 + 0.9 * (i + 0.5) / parts) * 10.0 ** (decade + 1 - decades)
                values += [middle, -middle] if signed else [middle]
        return values
