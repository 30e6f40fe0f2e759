"""A linear layer whose matrix is kept as a product of two thin ones.

    y = B (A x) + b            W_MN = B_MR A_RN          A: `down.weight`, B and b: `up`

Saves: R (M + N) numbers and as many multiplications per row of x, instead of M N; less only below R = M N / (M + N).
Costs: whatever of W lies outside R directions, and a second kernel call.

Shape suffixes: M = out_features, N = in_features, R = rank. Both factors are ordinary `nn.Linear` layers, so that what
works on those (low-rank optimizers, adapters, int8 weights, sharding) works on them too.

Source of the balanced split: Jaiswal et al. 2024 (WeLore), arXiv 2407.11239; the best rank-R product is the truncated
SVD (Eckart & Young 1936).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.layers import is_linear, is_transposed
from leantrain.nn.sizes import require_sizes


class FactoredLinear(nn.Module):
    """`nn.Linear` of rank `rank`.

    Weights start such that the product has the variance of a fresh `nn.Linear`'s weight, and the bias as one's.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        rank: 1 <= rank <= min(in_features, out_features).

    Raises:
        UsageError: a size that is no integer >= 1, or a rank above both sides.

    Examples:
        >>> layer = FactoredLinear(64, 32, rank=4)
        >>> layer.down.weight.shape, layer.up.weight.shape
        (torch.Size([4, 64]), torch.Size([32, 4]))
        >>> layer.merge()
        Linear(in_features=64, out_features=32, bias=True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(in_features=in_features, out_features=out_features, rank=rank)
        _require_rank(rank, out_features, in_features)
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int, device: torch.device | str | None = None) -> FactoredLinear:
        """The best layer of this rank: the truncated SVD U S V^T of the weight as (U sqrt(S)) (sqrt(S) V^T).

        Half-precision weights are decomposed in float32. Dtype, place, mode and `requires_grad` are the layer's; the
        bias is the very same parameter.

        Args:
            linear: an `nn.Linear`, or Hugging Face's transposed Conv1D. It is left as it is.
            rank: directions kept.
            device: where to decompose, the weight's own place by default.

        Raises:
            UsageError: another kind of layer, a rank above both sides, or a weight that is not finite.
        """
        weight = matrix_of(linear)
        _require_rank(rank, *weight.shape)
        made = cls.shaped_like(linear, rank)
        with torch.no_grad():
            left, values, right = torch.linalg.svd(to_decompose(weight, device), full_matrices=False)
            roots = values[:rank].sqrt()
            made.up.weight.copy_(left[:, :rank] * roots)
            made.down.weight.copy_(roots[:, None] * right[:rank])
        return made

    @classmethod
    def shaped_like(cls, linear: nn.Module, rank: int) -> FactoredLinear:
        """As `from_linear`, but with factors whose numbers are not set: to be loaded."""
        weight, bias = matrix_of(linear), linear.bias
        rows, columns = weight.shape
        made = cls(columns, rows, rank, bias=False, device="meta", dtype=weight.dtype)
        made.to_empty(device=weight.device)
        made.up.bias = bias  # type: ignore[assignment]  # a parameter or None, as in the layer
        for factor in (made.down.weight, made.up.weight):
            factor.requires_grad_(linear.weight.requires_grad)  # type: ignore[arg-type]
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def merge(self) -> nn.Linear:
        """The one layer that computes the same. The bias is the very same parameter."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.up.weight.dtype)
        with torch.no_grad():
            wide = torch.promote_types(self.up.weight.dtype, torch.float32)
            product = (self.up.weight.to(wide) @ self.down.weight.to(wide)).to(self.up.weight.dtype)
        made.weight = nn.Parameter(product, self.up.weight.requires_grad)
        made.bias = self.up.bias
        return made.train(self.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights again, from torch's global generator."""
        nn.init.uniform_(self.down.weight, *_bounds(1 / (3 * self.in_features)))
        nn.init.uniform_(self.up.weight, *_bounds(1 / self.rank))
        if self.up.bias is not None:
            nn.init.uniform_(self.up.bias, *_bounds(1 / (3 * self.in_features)))

    @property
    def in_features(self) -> int:
        """N, numbers per row of the input."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """M, numbers per row of the output."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """R, directions of the matrix."""
        return self.down.out_features

    def extra_repr(self) -> str:
        """What stands in the brackets after the class name."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def matrix_of(layer: nn.Module) -> Tensor:
    """The M x N matrix that a linear layer multiplies by, as a view of its weight.

    Raises:
        UsageError: the layer is not linear, or only a part of the matrix is in this process.
    """
    if not is_linear(layer):
        raise UsageError(f"only nn.Linear and Hugging Face's Conv1D can be factored, got {type(layer).__name__}")
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if hasattr(weight, "full_tensor"):
        raise UsageError("a sharded weight cannot be decomposed: factor the model first, then shard it")
    return weight.T if is_transposed(layer) else weight


def to_decompose(weight: Tensor, device: torch.device | str | None = None) -> Tensor:
    """The weight in the precision in which decompositions exist, float32 at least.

    Raises:
        UsageError: a number in it is not finite.
    """
    wide = weight.to(device or weight.device, torch.promote_types(weight.dtype, torch.float32))
    if not torch.isfinite(wide).all():
        raise UsageError(f"a weight of shape {list(weight.shape)} holds numbers that are not finite")
    return wide


def _require_rank(rank: int, rows: int, columns: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(rows, columns):
        raise UsageError(f"rank must be an integer in [1, {min(rows, columns)}] for {rows} x {columns}, got {rank!r}")


def _bounds(variance: float) -> tuple[float, float]:
    return -math.sqrt(3 * variance), math.sqrt(3 * variance)
