"""Temperature and vector scaling against scipy's minimiser and against scores whose temperature is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.nn.calibration import Calibration, calibration_error


def problem(temperature: float = 1.0, n: int = 4000, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Scores, and classes drawn from their softmax at a temperature."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(n, classes, generator=generator)
    return temperature * scores, torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]


def likelihood(logits: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(logits.double(), targets).item()


@pytest.mark.parametrize("temperature", [0.001, 0.3, 1.0, 50.0])
def test_it_finds_the_temperature_that_the_scores_have(temperature: float) -> None:
    scores, targets = problem(temperature)
    calibration = Calibration(4).fit(scores, targets)
    assert calibration.temperature.item() == pytest.approx(temperature, rel=0.05)
    calibrated = calibration(scores)
    assert torch.equal(calibrated.argmax(1), scores.argmax(1))
    assert likelihood(calibrated, targets) <= likelihood(scores, targets) + 1e-12
    assert calibration_error(calibrated, targets) < 0.03


def test_the_temperature_is_the_one_scipy_finds() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    scores, targets = problem(3.0, n=300)
    found = optimize.minimize_scalar(
        lambda log_t: likelihood(scores / torch.tensor(log_t).exp(), targets), bounds=(-5, 5), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    mine = Calibration(4).fit(scores, targets).temperature.log().item()
    assert mine == pytest.approx(found.x, abs=1e-5)


def test_vector_scaling_is_the_one_scipy_finds_and_no_worse_than_a_temperature() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    scores, targets = problem(2.0, n=300)
    scores = scores + torch.tensor([1.0, 0.0, -2.0, 0.5])

    def value(numbers: object) -> float:
        scale, bias = torch.as_tensor(numbers).view(2, 4)
        return likelihood(scores.double() * scale + bias, targets)

    found = optimize.minimize(value, [1.0] * 4 + [0.0] * 4, method="BFGS", options={"gtol": 1e-7})
    vector, scalar = (Calibration(4, kind).fit(scores, targets) for kind in ("vector", "temperature"))
    assert likelihood(vector(scores), targets) == pytest.approx(found.fun, abs=1e-7)
    assert likelihood(vector(scores), targets) < likelihood(scalar(scores), targets)
    # A bias that all classes share changes no probability, so only differences are determined.
    bias = torch.as_tensor(found.x[4:])
    torch.testing.assert_close((vector.bias - vector.bias[0]).double(), bias - bias[0], atol=1e-3, rtol=1e-3)


def test_the_calibration_error_is_the_gap_between_accuracy_and_confidence_in_each_bin() -> None:
    scores, targets = problem(3.0, n=200)
    p = scores.double().softmax(1)
    expected = 0.0
    for low in range(5):
        members = [n for n in range(200) if low / 5 <= p[n].max() < (low + 1) / 5 or (low == 4 and p[n].max() == 1)]
        if members:
            accuracy = sum(int(p[n].argmax() == targets[n]) for n in members) / len(members)
            confidence = sum(float(p[n].max()) for n in members) / len(members)
            expected += len(members) / 200 * abs(accuracy - confidence)
    assert calibration_error(scores, targets, bins=5) == pytest.approx(expected)


def test_perfect_scores_make_it_stop_at_something_finite() -> None:
    calibration = Calibration(3).fit(torch.eye(3), torch.arange(3))
    assert calibration.scale.isfinite().all() and calibration.scale > 1


def test_scores_that_are_all_equal_stay_so() -> None:
    calibration = Calibration(3).fit(torch.zeros(6, 3), torch.arange(3).repeat(2))
    assert calibration(torch.zeros(1, 3)).isfinite().all()


def test_it_trains_nothing_of_the_model_works_without_grad_and_is_saved() -> None:
    scores, targets = problem(2.0, n=100)
    scores.requires_grad_()
    with torch.no_grad():
        fitted = Calibration(4, "vector").fit(scores, targets)
    assert scores.grad is None and not list(fitted.parameters())
    other = Calibration(4, "vector")
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other(scores), fitted(scores))
    assert torch.equal(Calibration(4, "vector").fit(scores, targets).scale, fitted.scale)


def test_what_does_not_fit_is_refused() -> None:
    for arguments, message in (((1,), "classes must be a whole number, at least 2, got 1"), ((3, "platt"), "'platt'")):
        with pytest.raises(UsageError, match=message):
            Calibration(*arguments)
    calibration = Calibration(3)
    with pytest.raises(UsageError, match=r"calibration of 3 classes got logits \[2, 4\]"):
        calibration(torch.zeros(2, 4))
    with pytest.raises(UsageError, match=r"got \[2, 3\] and int64 \[3\]"):
        calibration.fit(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="calibration needs finite logits"):
        calibration.fit(torch.full((2, 3), float("inf")), torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="bins must be at least 1"):
        calibration_error(torch.zeros(2, 3), torch.tensor([0, 1]), bins=0)
