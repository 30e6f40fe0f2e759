"""GaLore with Adafactor against the package its authors published, and against its own arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leantrain.optim import Adafactor, Chain, predicted_state_bytes, state_bytes
from leantrain.optim.galore_adafactor import GaLoreAdafactor

SHAPES = [(24, 16), (16, 24), (16, 16), (16,)]


def weights(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range = range(20)) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("refresh", [7, 100])
def test_follows_the_authors_package_to_1e5_over_twenty_steps(refresh: int, beta1: float | None) -> None:
    galore_torch = pytest.importorskip("galore_torch", reason="galore-torch is not installed")
    expected, params = weights(), weights()
    options = {"rank": 4, "update_proj_gap": refresh, "scale": 0.25, "proj_type": "std"}
    reference = galore_torch.GaLoreAdafactor(
        [{"params": expected[:3], **options}, {"params": expected[3:]}],
        lr=1e-2, beta1=beta1, scale_parameter=False, relative_step=False,
    )  # fmt: skip
    groups = [{"params": params[:3], "rank": 4}, {"params": params[3:]}]
    train(reference, expected)
    train(GaLoreAdafactor(groups, lr=1e-2, beta1=beta1, refresh=refresh, stagger=False), params)
    for a, b in zip(expected, params, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_state_is_the_formulas_bytes_and_no_more(beta1: float | None) -> None:
    params = weights()
    optimizer = GaLoreAdafactor(params, rank=4, beta1=beta1)
    train(optimizer, params, range(2))
    by_hand = 2 * (4 * 16 + 24 + 4) + (4 * 16 + 16 + 4) + (1 + 16)
    by_hand += 0 if beta1 is None else 4 * 24 * 2 + 4 * 16 + 16
    assert state_bytes(optimizer) == 4 * by_hand == predicted_state_bytes(optimizer)
    assert by_hand == sum(GaLoreAdafactor.state_numel(tuple(p.shape), 4, beta1) for p in params)
    assert GaLoreAdafactor.state_numel((24, 16), None, beta1) == 24 + 16 + (0 if beta1 is None else 24 * 16)


def test_a_group_without_rank_is_plain_adafactor() -> None:
    params, expected = weights(), weights()
    train(GaLoreAdafactor(params, lr=1e-2, beta1=0.5, weight_decay=0.1, decay_exponent=-0.7), params)
    train(Chain(expected, Adafactor(-0.7, beta1=0.5), lr=1e-2, weight_decay=0.1), expected)
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


@pytest.mark.parametrize("on_refresh", ["keep", "rotate", "reset"])
def test_transposing_a_weight_changes_nothing(on_refresh: str) -> None:
    wide = weights([(6, 10)])
    tall = [nn.Parameter(wide[0].detach().T.contiguous())]
    options = {"rank": 3, "refresh": 4, "lr": 0.1, "basis": "subspace", "on_refresh": on_refresh, "beta1": 0.9}
    first, second = GaLoreAdafactor(wide, **options), GaLoreAdafactor(tall, **options)
    for step in range(11):
        wide[0].grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(step))
        tall[0].grad = wide[0].grad.T.contiguous()
        first.step(), second.step()
    torch.testing.assert_close(wide[0], tall[0].T)


def test_scale_only_rescales_the_update() -> None:
    one, three = weights([(8, 6)]), weights([(8, 6)])
    start = one[0].detach().clone()
    train(GaLoreAdafactor(one, rank=2, scale=0.5), one, range(1))
    train(GaLoreAdafactor(three, rank=2, scale=1.5), three, range(1))
    torch.testing.assert_close(3 * (one[0] - start), three[0] - start)


@pytest.mark.parametrize("setting", [{"eps": 0.0}, {"beta1": 1.0}, {"decay_exponent": 0.5}, {"clip_threshold": -1.0}])
def test_a_wrong_setting_of_the_inner_rule_is_named_with_its_value(setting: dict[str, float]) -> None:
    (name, value), *_ = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        GaLoreAdafactor(weights(), **setting)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        GaLoreAdafactor([{"params": weights(), **setting}])
