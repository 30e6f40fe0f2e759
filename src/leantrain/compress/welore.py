"""WeLore: factor the matrices of a trained network that have a low rank, each as far as it can bear, leave the others.

    s_1 >= .. >= s_S        singular values of a matrix M x N, S = min(M, N)
    z_j = (s_j - s_S) / (s_1 - s_S)         c = #{z_j < k}, with one threshold k for all matrices
    k such that             sum of c / sum of S = reduction
    c / S > min_ratio       the matrix becomes B_MR A_RN with R = S - c, otherwise it stays dense

Then only the factors are trained on: the low-rank matrices are also those that learn well in few directions.

Saves: M N - R (M + N) numbers per factored matrix; gradients and optimizer state of everything that is frozen.
Costs: quality, one decomposition per matrix, no data. A reduction of the *rank* is not one of the numbers: half the
rank of a square matrix saves nothing, which is why the plan gives rank, numbers and bytes apart.

Source: Jaiswal et al. 2024 (WeLore), arXiv 2407.11239. The criterion "marchenko-pastur" measures singular values
against the largest one of a random matrix with the same median (Gavish & Donoho 2014).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leantrain.atomic import write_text
from leantrain.errors import UsageError
from leantrain.layers import HIDDEN, Choice, chosen_linears, replace_layer
from leantrain.nn.factored import FactoredLinear, matrix_of, to_decompose

Criterion = Literal["normalised", "energy", "marchenko-pastur"]
Measure = Literal["rank", "parameters"]
_HALVINGS = 60


def welore(model: nn.Module, reduction: float | None = 0.3, **options: Any) -> WeLorePlan:
    """Plan and carry out in one call: `model` is changed in place.

    Args:
        model: a trained network.
        reduction: part of the ranks to remove, in (0, 1).
        options: as for `plan_welore`.

    Returns:
        What was done. Save it: with it a saved state of the compressed model can be loaded again.

    Examples:
        >>> model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)])
        >>> plan = welore(model, reduction=0.7)
        >>> plan.bytes_after < plan.bytes_before
        True
    """
    plan = plan_welore(model, reduction, **options)
    plan.apply(model)
    return plan


def plan_welore(
    model: nn.Module,
    reduction: float | None = 0.3,
    *,
    measure: Measure = "rank",
    criterion: Criterion = "normalised",
    threshold: float | None = None,
    min_ratio: float = 0.0,
    even_without_saving: bool = False,
    layers: Choice = HIDDEN,
    device: torch.device | str | None = None,
) -> WeLorePlan:
    """Decide which linear layers to factor, and to which rank. The model is only looked at, one matrix at a time.

    Args:
        model: a trained network.
        reduction: part to remove, in (0, 1), of what `measure` says, over all chosen layers together. Thresholds move
            in steps of one rank of one matrix; the nearest step is taken.
        measure: "rank" counts ranks and, as the paper does, before layers are left dense because of `min_ratio` or
            because nothing would be saved; "parameters" counts the numbers that the plan really saves.
        criterion: what is compared with the threshold. "normalised", the paper's, is z as above, and depends on one
            outlier; "energy" is the part of the sum of squares that a singular value and all smaller ones hold;
            "marchenko-pastur" is the singular value over the largest that noise with the same median would have.
        threshold: given with `reduction=None`, the threshold itself; 1 cuts what noise explains ("marchenko-pastur").
        min_ratio: a layer is factored if more than this part of its rank goes: 0 to compress, 0.4999 to fine-tune.
        even_without_saving: also make factors that have as many numbers as the matrix, or more.
        layers: "hidden" (every linear layer but the output layer and tied ones), a regular expression searched for in
            the layers' names, or a function of name and layer. What is factored already is passed over.
        device: where to decompose, by default where each weight is.

    Raises:
        UsageError: a value outside its range, no layer chosen, a weight that is sharded or not finite, or more
            parameters to remove than rank 1 everywhere would.
    """
    _check(reduction, threshold, min_ratio, criterion, measure)
    factored = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FactoredLinear))
    chosen = {n: m for n, m in chosen_linears(model, layers).items() if not n.startswith(factored or ("\0",))}
    spectra = [_Spectrum.of(name, layer, criterion, device) for name, layer in chosen.items()]
    if not spectra:
        raise UsageError(f"layers={layers!r} chooses only layers that are factored already")

    def at(k: float) -> list[LayerPlan]:
        return [spectrum.plan(k, min_ratio, even_without_saving) for spectrum in spectra]

    def removed(k: float) -> float:
        if measure == "rank":
            return sum(spectrum.removable(k) for spectrum in spectra) / sum(len(s.scores) for s in spectra)
        planned = at(k)
        return 1 - sum(p.parameters_after for p in planned) / sum(p.parameters_before for p in planned)

    if threshold is None:
        assert reduction is not None
        highest = 1 + max(spectrum.scores.max().item() for spectrum in spectra)
        if removed(highest) < reduction and measure == "parameters":
            raise UsageError(
                f"reduction={reduction} of the parameters is out of reach: at most {removed(highest):.3f} can go"
            )
        threshold = _threshold_for(reduction, removed, highest)
    return WeLorePlan(criterion, threshold, removed(threshold) if measure == "rank" else None, tuple(at(threshold)))


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one matrix."""

    name: str
    shape: tuple[int, int]
    """(M, N): outputs and inputs."""
    rank: int
    """Directions kept; min(M, N) where the layer stays dense."""
    factored: bool
    removable: int
    """Singular values below the threshold, whether they are removed or not."""
    retained_energy: float
    """Part of the sum of squares that is kept, 0 to 1."""
    bytes_per_number: int

    @property
    def parameters_before(self) -> int:
        """Numbers of the matrix; the bias, which stays, is not counted."""
        return math.prod(self.shape)

    @property
    def parameters_after(self) -> int:
        """Numbers of the factors, or of the matrix where it stays."""
        return self.rank * sum(self.shape) if self.factored else self.parameters_before


@dataclass(frozen=True)
class WeLorePlan:
    """Which layers become factors of which rank. Plain numbers: kept as JSON beside a compressed model's weights."""

    criterion: str
    threshold: float
    rank_reduction: float | None
    """Part of all ranks below the threshold; None if the plan was made to remove a part of the parameters."""
    layers: tuple[LayerPlan, ...]

    @property
    def parameters_before(self) -> int:
        """Numbers in the planned layers' matrices as they are."""
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def parameters_after(self) -> int:
        """Numbers in them, or in their factors, afterwards."""
        return sum(layer.parameters_after for layer in self.layers)

    @property
    def bytes_before(self) -> int:
        """Bytes of the planned layers' matrices as they are."""
        return sum(layer.parameters_before * layer.bytes_per_number for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of them, or of their factors, afterwards."""
        return sum(layer.parameters_after * layer.bytes_per_number for layer in self.layers)

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace the planned layers by their factors, in place and one after the other.

        Returns:
            The model.

        Raises:
            UsageError: a planned layer is missing or of another shape. Nothing is changed then.
        """
        return self._replace(model, FactoredLinear.from_linear)

    def restructure(self, model: nn.Module) -> nn.Module:
        """As `apply`, without decomposing: the factors' numbers are to be loaded from a compressed model's state.

        Works on the meta device. Returns the model; raises as `apply` does.
        """
        return self._replace(model, FactoredLinear.shaped_like)

    def _replace(self, model: nn.Module, made: Callable[[nn.Module, int], FactoredLinear]) -> nn.Module:
        modules = dict(model.named_modules())
        for plan in self.layers:
            if plan.name not in modules:
                raise UsageError(f"the plan is of another model: this one has no {plan.name!r}")
            found = tuple(matrix_of(modules[plan.name]).shape)
            if found != plan.shape:
                raise UsageError(f"the plan is of another model: {plan.name!r} is {plan.shape} there, {found} here")
        for plan in self.layers:
            if plan.factored:
                # Taken out of the dictionary, so that the dense weight is free before the next one is decomposed.
                dense = modules.pop(plan.name)
                replace_layer(model, dense, made(dense, plan.rank))
        return model

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON."""
        write_text(Path(path), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> WeLorePlan:
        """Read what `save` wrote.

        Raises:
            UsageError: the file is no plan.
        """
        try:
            read = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = tuple(LayerPlan(**{**layer, "shape": tuple(layer["shape"])}) for layer in read.pop("layers"))
            return cls(**read, layers=layers)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{path} is no plan of WeLore: {error!r}") from None

    def __str__(self) -> str:
        rows = [("layer", "shape", "rank", "kept energy", "numbers")]
        for p in self.layers:
            kept = f"{p.rank} of {min(p.shape)}" if p.factored else "dense"
            change = f"{p.parameters_before} -> {p.parameters_after}" if p.factored else str(p.parameters_before)
            rows.append((p.name, "x".join(map(str, p.shape)), kept, f"{p.retained_energy:.3f}", change))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = f"numbers {self.parameters_before} -> {self.parameters_after}"
        return "\n".join([*lines, f"{total}, bytes {self.bytes_before} -> {self.bytes_after}"])


def freeze_all_but_factors(model: nn.Module) -> list[Tensor]:
    """Let only the factors of factored layers be trained, and give them: what an optimizer is to be made with.

    Biases, dense matrices, embeddings, norms and head keep their values and take no gradient and no optimizer state.

    Raises:
        UsageError: the model has no factored layer.
    """
    factors = list(_factors(model))
    if not factors:
        raise UsageError("the model has no factored layer: nothing would be trained")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return [factor.requires_grad_() for factor in factors]


def _factors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, FactoredLinear):
            yield from (module.down.weight, module.up.weight)


@dataclass(frozen=True)
class _Spectrum:
    """The singular values of one layer, and what each is worth under a criterion."""

    name: str
    shape: tuple[int, int]
    bytes_per_number: int
    energy: Tensor
    """s^2 [S], float64, from the largest down."""
    scores: Tensor
    """float64 [S], from the largest down; those below the threshold can go."""

    @classmethod
    def of(cls, name: str, layer: nn.Module, criterion: str, device: torch.device | str | None) -> _Spectrum:
        weight = matrix_of(layer)
        values = torch.linalg.svdvals(to_decompose(weight, device)).double().cpu()
        rows, columns = weight.shape
        scores = _scores(values, (rows, columns), criterion)
        return cls(name, (rows, columns), weight.element_size(), values.square(), scores)

    def removable(self, k: float) -> int:
        """How many singular values are below the threshold; one always stays."""
        return min(int((self.scores < k).sum()), len(self.scores) - 1)

    def plan(self, k: float, min_ratio: float, even_without_saving: bool) -> LayerPlan:
        full, removable = len(self.scores), self.removable(k)
        rank = full - removable
        saves = rank * sum(self.shape) < math.prod(self.shape)
        factored = removable / full > min_ratio and (saves or even_without_saving)
        kept = (self.energy[:rank].sum() / self.energy.sum()).item() if factored and self.energy.any() else 1.0
        return LayerPlan(
            self.name, self.shape, rank if factored else full, factored, removable, kept, self.bytes_per_number
        )


def _scores(values: Tensor, shape: tuple[int, int], criterion: str) -> Tensor:
    if not values.any():
        return torch.zeros_like(values)
    if criterion == "energy":
        return values.square().flip(0).cumsum(0).flip(0) / values.square().sum()
    if criterion == "marchenko-pastur":
        short, long = sorted(shape)
        edge = 1 + math.sqrt(short / long)  # of noise with standard deviation 1 / sqrt(long), as the median below
        noise = values.median() / math.sqrt(marchenko_pastur_median(short / long))
        return values / (noise * edge).clamp_min(torch.finfo(values.dtype).tiny)
    spread = values[0] - values[-1]
    return (values - values[-1]) / spread if spread > 0 else torch.ones_like(values)


def marchenko_pastur_median(aspect: float) -> float:
    """Median of the squared singular values of an S x L matrix of noise of variance 1/L, for large S = aspect * L."""
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2
    # x = middle - half cos(angle) takes the square roots at both ends out of the density.
    angle = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)[1:-1]
    half = (high - low) / 2
    x = (high + low) / 2 - half * angle.cos()
    mass = ((half * angle.sin()).square() / x).cumsum(0)
    return x[torch.searchsorted(mass, mass[-1] / 2)].item()


def _threshold_for(reduction: float, removed: Callable[[float], float], highest: float) -> float:
    """By bisection, for `removed` grows with the threshold: of the two steps around the target, the nearer."""
    below, above = 0.0, highest
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        below, above = (middle, above) if removed(middle) <= reduction else (below, middle)
    return min((below, above), key=lambda k: abs(removed(k) - reduction))


def _check(reduction: float | None, threshold: float | None, min_ratio: float, criterion: str, measure: str) -> None:
    if (reduction is None) == (threshold is None):
        raise UsageError(f"give either reduction or threshold, got reduction={reduction} and threshold={threshold}")
    if reduction is not None and not 0 < reduction < 1:
        raise UsageError(f"reduction must be in (0, 1), got reduction={reduction}")
    if threshold is not None and not threshold >= 0:
        raise UsageError(f"threshold must be >= 0, got threshold={threshold}")
    if not 0 <= min_ratio < 1:
        raise UsageError(f"min_ratio must be in [0, 1), got min_ratio={min_ratio}")
    for name, value, allowed in (
        ("criterion", criterion, get_args(Criterion)),
        ("measure", measure, get_args(Measure)),
    ):
        if value not in allowed:
            raise UsageError(f"{name} must be one of {allowed}, got {name}={value!r}")
