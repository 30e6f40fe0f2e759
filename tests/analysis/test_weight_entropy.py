"""The meter of weight entropy: three quantities, each against its definition."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from torch import Tensor, nn

from leantrain.analysis import EntropyPoint, WeightEntropy, draw_entropy, weight_entropy
from leantrain.errors import RunError, UsageError
from leantrain.histogram import bits_per_symbol, integer_entropy, range_entropy


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))


def bits(values: np.ndarray) -> float:
    """By the definition."""
    return -sum(c / values.size * math.log2(c / values.size) for c in Counter(values.reshape(-1).tolist()).values())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(-(2**40), 2**40) | st.integers(-3, 3), max_size=60))
def test_entropy_of_integers_is_its_definition(values: list[int]) -> None:
    found = integer_entropy(torch.tensor(values, dtype=torch.int64))
    assert found == pytest.approx(bits(np.array(values)) if values else 0.0, abs=1e-9)


def test_entropy_of_a_histogram_is_scipys() -> None:
    counts = np.array([5, 0, 1, 9, 300])
    assert bits_per_symbol(counts) == pytest.approx(scipy_entropy(counts, base=2), abs=1e-12)
    assert bits_per_symbol(np.array([], int)) == bits_per_symbol(np.array([7])) == 0.0


def test_a_grid_over_the_range_knows_no_scale_or_place() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    found = range_entropy(values)
    assert range_entropy(4 * values) == found
    assert range_entropy(values + 3) == pytest.approx(found, abs=0.01)
    assert range_entropy(torch.cat([values, torch.tensor([100.0])])) < found - 3  # the outlier's doing
    assert range_entropy(torch.linspace(-1, 1, 256 * 40)) == pytest.approx(8, abs=0.01)
    assert range_entropy(torch.full((10,), 2.0)) == range_entropy(torch.empty(0)) == 0.0


def by_hand(now: dict[str, Tensor], last: dict[str, Tensor], sigma: dict[str, float]) -> list[float]:
    """Range, fixed and change, in float64."""
    total, weights = np.zeros(3), 0
    for name, tensor in now.items():
        w, before = tensor.double().numpy(), last[name].double().numpy()
        codes = np.rint((w - w.min()) / (w.max() - w.min()) * 255)
        unit = sigma[name] / 32
        total += w.size * np.array([bits(codes), bits(np.rint(w / unit)), bits(np.rint((w - before) / unit))])
        weights += w.size
    return (total / weights).tolist()


def test_the_three_quantities_are_their_definitions() -> None:
    model, later = mlp(0), mlp(0)
    with torch.no_grad():
        for param in later.parameters():
            param += 0.01 * torch.randn(param.shape, generator=torch.Generator().manual_seed(3))
    last = {name: param.detach() for name, param in model.named_parameters()}
    now = {name: param.detach() for name, param in later.named_parameters()}
    sigma = {name: param.std().item() if param.dim() > 1 else 0.05 for name, param in last.items()}
    found = weight_entropy(later, last, sigma)
    assert [found.range, found.fixed, found.change] == pytest.approx(by_hand(now, last, sigma), abs=0.01)


def test_one_call_on_any_model() -> None:
    found = weight_entropy(nn.Conv2d(3, 8, 3).bfloat16())
    assert 0 < found.range < 8 and found.change is None


def test_tied_weights_count_once() -> None:
    tied = nn.ModuleList([nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False)])
    tied[1].weight = tied[0].weight
    assert weight_entropy(tied) == weight_entropy(tied[0])


def drift(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param += 0.02 / step * torch.randn(param.shape, generator=torch.Generator().manual_seed(step))


def test_the_meter_keeps_the_curve_of_every_kth_step() -> None:
    model = mlp()
    meter, copies = WeightEntropy(model, every=3), [{k: v.clone() for k, v in model.state_dict().items()}]
    for step in range(1, 8):
        drift(model, step)
        point = meter.after_step()
        assert (point is not None) == (step % 3 == 0)
        if point is not None:
            copies.append({k: v.clone() for k, v in model.state_dict().items()})
            assert point == meter.curve[-1]
    assert [point.step for point in meter.curve] == [0, 3, 6]
    assert meter.curve[0].change is None
    first, second = meter.curve[1:]
    again = weight_entropy(model_with(copies[2]), copies[1], meter.deviations)
    assert (again.range, again.fixed, again.change) == (second.range, second.fixed, second.change)
    assert first.change is not None and second.change is not None
    assert second.change < first.change  # smaller steps say less


def model_with(weights: dict[str, Tensor]) -> nn.Module:
    model = mlp()
    model.load_state_dict(weights)
    return model


def test_a_meter_goes_on_from_its_state() -> None:
    model = mlp()
    whole = WeightEntropy(model, every=2)
    for step in range(1, 4):
        drift(model, step)
        whole.after_step()
    resumed = WeightEntropy(mlp(1), every=2)
    resumed.load_state_dict(whole.state_dict())
    resumed.model = model
    drift(model, 4)
    assert resumed.after_step() == whole.after_step()
    assert resumed.curve == whole.curve and len(resumed.curve) == 3
    with pytest.raises(UsageError, match=r"of another model: '0\.bias' differs"):
        WeightEntropy(nn.Linear(3, 3)).load_state_dict(whole.state_dict())


def test_measuring_changes_nothing() -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    meter = WeightEntropy(model, every=1)
    meter.after_step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None and param.requires_grad for param in model.parameters())


def test_bad_input_is_named() -> None:
    model = mlp()
    for call, message in [
        (lambda: weight_entropy(model, bits=0), "bits=0"),
        (lambda: weight_entropy(model, step=0.0), "step=0.0"),
        (lambda: weight_entropy(nn.ReLU()), "ReLU has no floating-point parameters"),
        (lambda: weight_entropy(model, last={}), "last has nothing for parameter '0.weight'"),
        (lambda: weight_entropy(model, deviations={}), "deviations has nothing for parameter '0.weight'"),
        (lambda: WeightEntropy(model, every=0), "every=0"),
        (lambda: draw_entropy({"run": []}, "x.png"), "nothing to draw"),
    ]:
        with pytest.raises(UsageError, match=message):
            call()
    with torch.no_grad():
        model[2].bias[1] = math.inf
    with pytest.raises(RunError, match=r"not finite is not defined: '2\.bias'"):
        weight_entropy(model)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    curve = [EntropyPoint(0, 8.0, 6.8, None), EntropyPoint(10, 7.0, 7.0, 5.0), EntropyPoint(20, 6.0, 7.2, 1.0)]
    draw_entropy({"one": curve, "two": curve[:2]}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
