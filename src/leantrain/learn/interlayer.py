"""Interlayer regularisation, simulated: what layers do to one another in backpropagation, given back to blocks that are
trained by themselves.

Backpropagation through a deep network prefers some solutions to others: of low rank, and such that lower layers keep
what upper ones need. A block that follows a loss of its own misses that. Each step below stands in for a part of it:

    look-ahead    g_k = head . relu . norm . A               hidden layers in a head stand for the layers above
    factors       W = A_D ... A_1                            each matrix becomes a product of D
    depth         dL/dW -> sum_{j=1..N} (W W')^((N-j)/N) dL/dW (W'W)^((j-1)/N)     as if it were a product of N
    transport     L_k + mean((h_k - h_{k-1})^2) / (2 tau)    a block moves its features only as far as it pays

Saves nothing: it is to make up for accuracy that local losses lose. Costs: `look_ahead` a layer per block; `factors`
(D - 1) matrices and their gradients and optimizer state per layer; `depth` three or four matrix products per matrix and
step, an eigendecomposition every few steps, and its basis; `transport` next to nothing.

Sources: Arora, Cohen & Hazan 2018 (ICML, arXiv 1802.06509) for products and their preconditioner; Huh et al. 2023
(TMLR, arXiv 2103.10427) for factors; Belilovsky, Eickenberg & Oyallon 2019 (ICML, arXiv 1812.11446) for hidden layers
in heads; Karkar et al. 2023 (NeurIPS, arXiv 2309.17357) for transport. Øland 2024 (thesis, Carnegie Mellon) reports
that a few simple steps simulate interlayer regularisation; which ones was not known here: this is a reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leantrain.errors import UsageError, nearest
from leantrain.layers import hidden_layers, layers_with_matrix
from leantrain.learn.local_losses import LocalLoss


@dataclass(frozen=True, kw_only=True)
class Interlayer:
    """Which of the steps to take. By default none of them.

    Args:
        look_ahead: hidden layers in every head, >= 0.
        factors: of how many matrices each hidden layer's becomes the product, >= 1; see `factorise` and `collapse`.
        depth: as a product of how many matrices each hidden layer's is to learn without being one, >= 1.
        transport: tau above 0, in units of squared features; smaller holds features tighter. None: no penalty.

    Raises:
        UsageError: a value outside its range; both `factors` and `depth`, which are two ways to one thing.
    """

    look_ahead: int = 0
    factors: int = 1
    depth: int = 1
    transport: float | None = None

    def __post_init__(self) -> None:
        _require_count("look_ahead", self.look_ahead, 0)
        _require_count("factors", self.factors, 1)
        _require_count("depth", self.depth, 1)
        if self.factors > 1 and self.depth > 1:
            raise UsageError(
                f"factors={self.factors} and depth={self.depth} do the same thing in two ways; leave one of them at 1"
            )
        if self.transport is not None:
            _require_tau(self.transport)

    def prepare(self, model: nn.Module) -> None:
        """Factor the model's hidden layers, in place. To be done before it is cut and before optimizers are made."""
        if self.factors > 1:
            factorise(model, depth=self.factors)

    def local_loss(self, local: LocalLoss, features: Tensor, before: Tensor | None) -> LocalLoss:
        """A block's local loss with what the block is to be reminded of.

        Args:
            local: its loss. It is changed.
            features: [n, ...] a sample of the block's output.
            before: [n, ...] the same of its input; None for the first block, which is free to move what it is given.
        """
        if self.look_ahead:
            local.head = LookAhead(local.head, features, self.look_ahead)
        if self.transport is None or before is None:
            return local
        return WithTransport(local, Transport(before, features, self.transport))

    def preconditioner(self, model: nn.Module) -> DepthPreconditioner | None:
        """What is to be applied to the model's gradients before each step of an optimizer."""
        if self.depth == 1:
            return None
        return DepthPreconditioner([_matrix(layer) for layer in hidden_layers(model).values()], self.depth)


class LookAhead(nn.Module):
    """A head that first computes further: `layers` times a layer of the features' own shape, normalisation and ReLU.

    Args:
        head: makes logits of features; any module.
        features: [n, width], [n, tokens, width] or [n, channels, height, width], a sample of what it will be given.
        layers: how many, >= 1. They are linear on vectors and tokens and 3x3 convolutions on maps.

    Raises:
        UsageError: `layers` below 1, or features of another number of dimensions.
    """

    def __init__(self, head: nn.Module, features: Tensor, layers: int = 1) -> None:
        super().__init__()
        _require_count("layers", layers, 1)
        _require_features(features)
        made: list[nn.Module] = []
        for _ in range(layers):
            if features.dim() == 4:
                channels = features.shape[1]
                made += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            else:
                width = features.shape[-1]
                made += [nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU()]
        self.ahead = nn.Sequential(*made).to(features)
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.ahead(features))
        return logits


class Transport(nn.Module):
    """The penalty mean((h_k - P h_{k-1})^2) / (2 tau) on how far a block moves its features.

    Where both have one shape, P is the identity. Otherwise P averages h_{k-1} down (or repeats it up) to the positions
    of h_k and, where the widths differ, multiplies by a fixed Gaussian matrix that keeps mean squares in expectation.

    Args:
        before: [n, ...] a sample of the block's input: vectors, tokens or maps.
        features: [n, ...] the same of its output.
        tau: above 0, in units of squared features.
        seed: of the fixed matrix.

    Raises:
        UsageError: `tau` is not above 0, or features of another number of dimensions.
    """

    projection: Tensor | None

    def __init__(self, before: Tensor, features: Tensor, tau: float, *, seed: int = 0) -> None:
        super().__init__()
        _require_tau(tau)
        _require_features(before, features)
        self.tau = tau
        inputs, outputs = _width(before), _width(features)
        projection = None
        if inputs != outputs:
            generator = torch.Generator().manual_seed(seed)
            projection = torch.randn(outputs, inputs, generator=generator).mul_(inputs**-0.5).to(features)
        self.register_buffer("projection", projection)

    def forward(self, features: Tensor, before: Tensor) -> Tensor:
        """The penalty, 0-dim, in at least float32; its gradient goes to `features` alone."""
        kind = torch.promote_types(features.dtype, torch.float32)
        moved = features.to(kind) - self.projected(before.detach().to(kind), features)
        return moved.square().mean() / (2 * self.tau)

    def projected(self, before: Tensor, features: Tensor) -> Tensor:
        """`before`, [B, ...], brought to the shape of `features`."""
        if before.dim() == features.dim() == 4:
            before = F.adaptive_avg_pool2d(before, (features.shape[2], features.shape[3]))
        found = _channels_first(before)
        goal = _channels_first(features)
        if found.shape[2] != goal.shape[2]:
            found = F.adaptive_avg_pool1d(found, goal.shape[2])
        if self.projection is not None:
            found = self.projection.to(found.dtype) @ found
        return found.transpose(1, 2) if features.dim() == 3 else found.view(features.shape)


class WithTransport(LocalLoss):
    """A local loss with a transport penalty on top of it, of the same parts as `local`."""

    def __init__(self, local: LocalLoss, transport: Transport) -> None:
        super().__init__(local.head, local._objective, local.other, local.share)
        self.transport = transport

    def forward(self, features: Tensor, targets: Tensor, inputs: Tensor, before: Tensor | None = None) -> Tensor:
        assert before is not None, "a block with a transport penalty is not the first"
        penalty: Tensor = self.transport(features, before)
        return super().forward(features, targets, inputs, before) + penalty


def factorise(model: nn.Module, names: Sequence[str] | None = None, depth: int = 2) -> nn.Module:
    """Make each layer's matrix a product of `depth` matrices, in place. What the model computes stays the same.

    The layers keep their classes, names and hooks: only `weight` is computed from its factors now, which are the
    parameters (`torch.nn.utils.parametrize`). A kernel is factored as the matrix [outputs, inputs * size]. The factors
    are balanced (A_{j+1}' A_{j+1} = A_j A_j'), as the theory of deep linear networks wants them, and as wide inside as
    the matrix's shorter side S: each further one has S * S numbers.

    Args:
        model: any module. Optimizers are to be made afterwards.
        names: of linear and convolutional layers; None takes the hidden ones (`leantrain.layers.hidden_layers`).
        depth: how many matrices, >= 2.

    Returns:
        The model.

    Raises:
        UsageError: `depth` below 2; a name that is no such layer, one whose weight is shared with another layer,
            a convolution in groups, or one whose weight is computed from something already. Nothing is changed then.
    """
    _require_count("depth", depth, 2)
    layers = layers_with_matrix(model)
    if names is None:
        names = [name for name, layer in hidden_layers(model).items() if not _problem(model, layer)]
        if not names:
            raise UsageError(f"{type(model).__name__} has no hidden linear or convolutional layer that can be factored")
    for name in names:
        if name not in layers:
            raise UsageError(f"there is no linear or convolutional layer {name!r} to factor{nearest(name, layers)}")
        if problem := _problem(model, layers[name]):
            raise UsageError(f"{name} cannot be factored: {problem}")
    for name in names:
        weight = _matrix(layers[name])
        trained = weight.requires_grad
        parametrize.register_parametrization(layers[name], "weight", Product(depth, weight.shape))
        for factor in _factors(layers[name]):
            factor.requires_grad_(trained)
    return model


def collapse(model: nn.Module) -> nn.Module:
    """Put one matrix in the place of each product that `factorise` has made: the same numbers, computed once.

    Returns:
        The model, whose state has the names that it had before.

    Raises:
        UsageError: nothing in the model is factored.
    """
    found = [module for module in model.modules() if _is_factored(module)]
    if not found:
        raise UsageError(f"{type(model).__name__} has no factored layer to collapse")
    for module in found:
        trained = any(factor.requires_grad for factor in _factors(module))
        parametrize.remove_parametrizations(module, "weight")
        weight = module.weight
        assert isinstance(weight, Tensor)
        del module.weight  # where nothing requires gradients it is not a parameter by now
        module.weight = nn.Parameter(weight.detach(), requires_grad=trained)
    return model


class Product(nn.Module):
    """A weight as the product A_D ... A_1 of its factors, which are given first to last.

    Args:
        depth: how many factors.
        shape: the weight's. It is looked at as the matrix [shape[0], the rest].
    """

    def __init__(self, depth: int, shape: torch.Size) -> None:
        super().__init__()
        self.depth, self.shape = depth, shape

    def forward(self, *factors: Tensor) -> Tensor:
        product: Tensor = torch.linalg.multi_dot(factors[::-1])
        return product.view(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Balanced factors: with W = U S V', the one on W's longer side is U S^(1/D) V', the others are the symmetric
        root of the shorter side's Gram matrix. No factor is diagonal, which Adam would treat unlike others."""
        kind = torch.promote_types(weight.dtype, torch.float32)
        u, s, vh = torch.linalg.svd(weight.flatten(1).to(kind), full_matrices=False)
        root = s ** (1 / self.depth)
        longest = ((u * root) @ vh).to(weight.dtype)
        if weight.shape[0] <= weight[0].numel():
            return (longest, *[((u * root) @ u.mT).to(weight.dtype) for _ in range(self.depth - 1)])
        return (*[((vh.mT * root) @ vh).to(weight.dtype) for _ in range(self.depth - 1)], longest)


class DepthPreconditioner:
    """Makes gradient descent on matrices move them as gradient descent on products of `depth` matrices would, to first
    order in the learning rate and for balanced factors:

        G -> sum_{j=1..N} (W W')^((N-j)/N) G (W'W)^((j-1)/N)

    Large directions of W get more, small ones less, which favours solutions of low rank. With W's shorter side on the
    left, W W' = U diag(lambda) U', found anew every few steps. Between those W moves on, but each summand stays
    positive semidefinite on either side: what comes out is always a direction of descent.

    Args:
        params: matrices, or kernels, which count as [outputs, inputs * size].
        depth: N >= 1; 1 leaves gradients as they are.
        every: steps between two eigendecompositions of a matrix, >= 1.
        floor: the least eigenvalue, as a part of the largest, in [0, 1]: directions below it count as that large, so
            that none is starved. 0 is the formula itself.
        keep_norm: give each gradient the Frobenius norm that it had. Without, lengths are the formula's.

    Raises:
        UsageError: a value outside its range, or a parameter with fewer than two dimensions.

    Examples:
        preconditioner = DepthPreconditioner([layer.weight for layer in model.layers], depth=3)
        loss.backward()
        preconditioner.apply()
        optimizer.step()
    """

    def __init__(
        self, params: Iterable[nn.Parameter], depth: int = 3, *, every: int = 10, floor: float = 1e-3,
        keep_norm: bool = True,
    ) -> None:  # fmt: skip
        _require_count("depth", depth, 1)
        _require_count("every", every, 1)
        if not 0 <= floor <= 1:
            raise UsageError(f"floor must be from 0 to 1, got floor={floor}")
        self.params = list(params)
        for param in self.params:
            if param.dim() < 2:
                raise UsageError(f"only matrices and kernels have a depth to simulate, got shape {list(param.shape)}")
        self.depth, self.every, self.floor, self.keep_norm = depth, every, floor, keep_norm
        self._applied = [0] * len(self.params)
        self._spectra: list[_Spectrum | None] = [None] * len(self.params)

    @torch.no_grad()
    def apply(self) -> None:
        """Change every `.grad` that is there, in place. To be called once before each step of the optimizer."""
        if self.depth == 1:
            return
        for index, param in enumerate(self.params):
            if param.grad is None:
                continue
            kind = torch.promote_types(param.dtype, torch.float32)
            weight, gradient = param.detach().flatten(1).to(kind), param.grad.flatten(1).to(kind)
            if tall := weight.shape[0] > weight.shape[1]:
                weight, gradient = weight.mT, gradient.mT
            spectrum = self._spectra[index]
            if spectrum is None or self._applied[index] % self.every == 0:
                spectrum = self._spectra[index] = _Spectrum.of(weight)
            self._applied[index] += 1
            found = self._transformed(gradient, weight, spectrum)
            if self.keep_norm:
                found *= gradient.norm() / found.norm().clamp_min(torch.finfo(kind).tiny)
            param.grad.copy_((found.mT if tall else found).reshape(param.shape))

    def _transformed(self, gradient: Tensor, weight: Tensor, spectrum: _Spectrum) -> Tensor:
        """The sum, computed for W / sqrt(largest eigenvalue), as it is homogeneous in W. On the longer side
        (W'W)^q = W' (W W')^(q-1) W, so that no basis of that side is needed."""
        n, basis = self.depth, spectrum.basis
        values = spectrum.values.clamp_min(max(self.floor, torch.finfo(gradient.dtype).eps))
        weight = weight * spectrum.largest.clamp_min(torch.finfo(gradient.dtype).tiny).rsqrt()
        in_basis, weight_in_basis = basis.mT @ gradient, basis.mT @ weight
        factors = sum(torch.outer(values ** ((n - j) / n), values ** ((j - 1) / n - 1)) for j in range(2, n + 1))
        right = (factors * (in_basis @ weight_in_basis.mT)) @ weight_in_basis
        found = basis @ (values[:, None] ** ((n - 1) / n) * in_basis + right)
        return found if self.keep_norm else found * spectrum.largest ** ((n - 1) / n)

    def state_dict(self) -> dict[str, Any]:
        """How often each matrix has been seen to, and the spectra in use."""
        spectra = [
            each and {"largest": each.largest, "values": each.values, "basis": each.basis} for each in self._spectra
        ]
        return {"applied": list(self._applied), "spectra": spectra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            UsageError: it is of other matrices.
        """
        spectra = [each and _Spectrum(**each) for each in state_dict["spectra"]]
        shapes = [min(param.shape[0], param[0].numel()) for param in self.params]
        fits = len(spectra) == len(shapes) and all(
            each is None or len(each.values) == size for each, size in zip(spectra, shapes, strict=False)
        )
        if not fits:
            raise UsageError("the state of the depth preconditioner is of matrices with other shapes")
        self._applied = list(state_dict["applied"])
        self._spectra = [
            each and _Spectrum(*(tensor.to(param.device) for tensor in (each.largest, each.values, each.basis)))
            for each, param in zip(spectra, self.params, strict=True)
        ]


@dataclass(frozen=True)
class _Spectrum:
    """Of W W', W's shorter side first."""

    largest: Tensor
    """The largest eigenvalue, 0-dim."""
    values: Tensor
    """[S] the eigenvalues as parts of it, ascending; all 1 where W is 0."""
    basis: Tensor
    """[S, S] the eigenvectors, in columns."""

    @classmethod
    def of(cls, weight: Tensor) -> _Spectrum:
        values, basis = torch.linalg.eigh(weight @ weight.mT)
        largest = values[-1].clamp_min(0)
        return cls(largest, torch.where(largest > 0, values / largest, 1.0), basis)


def _problem(model: nn.Module, layer: nn.Module) -> str | None:
    """Why a layer cannot be factored, or None."""
    if parametrize.is_parametrized(layer, "weight"):
        return "its weight is computed from other parameters already"
    if getattr(layer, "groups", 1) != 1:
        return "a convolution in groups has no single matrix"
    weight = _matrix(layer)
    users = sum(each is weight for module in model.modules() for each in module._parameters.values())
    return "its weight is also that of another layer" if users > 1 else None


def _is_factored(module: nn.Module) -> bool:
    if not parametrize.is_parametrized(module, "weight"):
        return False
    assert isinstance(module.parametrizations, nn.ModuleDict)
    steps = module.parametrizations["weight"]
    assert isinstance(steps, parametrize.ParametrizationList)
    return isinstance(steps[0], Product)


def _factors(module: nn.Module) -> list[nn.Parameter]:
    assert isinstance(module.parametrizations, nn.ModuleDict)
    return list(module.parametrizations["weight"].parameters())


def _matrix(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _width(features: Tensor) -> int:
    return features.shape[-1] if features.dim() == 3 else features.shape[1]


def _channels_first(features: Tensor) -> Tensor:
    """[B, width, positions]."""
    return (
        features.transpose(1, 2)
        if features.dim() == 3
        else features.flatten(2)
        if features.dim() == 4
        else features[..., None]
    )


def _require_features(*samples: Tensor) -> None:
    for sample in samples:
        if sample.dim() not in (2, 3, 4):
            raise UsageError(
                "features must be [batch, width], [batch, tokens, width] or [batch, channels, height, width], "
                f"got {list(sample.shape)}"
            )


def _require_tau(tau: float) -> None:
    if not (0 < tau < math.inf):
        raise UsageError(f"transport must be a tau above 0, got {tau}")


def _require_count(name: str, value: int, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise UsageError(f"{name} must be an integer >= {lowest}, got {name}={value!r}")
