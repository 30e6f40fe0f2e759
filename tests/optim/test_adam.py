"""Adam's rule against PyTorch's, which shares no line with it."""

from __future__ import annotations

import pytest
import torch

from leantrain.optim import Adam


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.0)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_the_rule_is_pytorchs_adam_in_float64(betas: tuple[float, float], eps: float) -> None:
    rule, shape = Adam(betas, eps), (3, 4)
    weights = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    reference = torch.optim.Adam(weights, lr=0.1, betas=betas, eps=eps, foreach=False)
    moved = torch.zeros(2, *shape, dtype=torch.float64)
    state = {name: torch.stack([value] * 2) for name, value in rule.init(weights[0].detach()).items()}
    for step in range(30):
        grads = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        reference.step()
        moved -= 0.1 * rule.update(grads, state, torch.full((2,), float(step), dtype=torch.float64))
    torch.testing.assert_close(moved, torch.stack([w.detach() for w in weights]), rtol=0, atol=1e-12)


def test_members_of_a_stack_may_have_made_different_numbers_of_steps() -> None:
    rule = Adam()
    state = {name: torch.zeros(2, 3) for name in ("exp_avg", "exp_avg_sq")}
    update = rule.update(torch.ones(2, 3), state, torch.tensor([0.0, 9.0], dtype=torch.float64))
    mean, square = 0.1 / (1 - 0.9**10), 0.001 / (1 - 0.999**10)
    torch.testing.assert_close(update[0], torch.ones(3))
    torch.testing.assert_close(update[1], torch.full((3,), mean / square**0.5))


def test_half_precision_state_is_computed_on_in_float32() -> None:
    rule = Adam()
    state = {name: torch.zeros(1, 3, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
    update = rule.update(torch.full((1, 3), 0.3, dtype=torch.bfloat16), state, torch.zeros(1, dtype=torch.float64))
    assert update.dtype == torch.float32 and state["exp_avg"].dtype == torch.bfloat16
    assert state["exp_avg_sq"][0, 0] > 0
    torch.testing.assert_close(update, torch.ones(1, 3), rtol=1e-4, atol=0)
