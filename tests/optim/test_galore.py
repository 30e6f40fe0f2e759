"""GaLore against the package its authors published, and against its own arithmetic."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from leantrain.optim import GaLoreAdamW, state_bytes

SHAPES = [(24, 16), (16, 24), (16, 16), (16,)]


def weights(seed: int = 0, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(step: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for param, grad in zip(params, gradients(step, [tuple(p.shape) for p in params]), strict=True):
            param.grad = grad
        optimizer.step()


@pytest.mark.parametrize("refresh", [7, 100])
def test_follows_the_authors_package_to_1e5_over_twenty_steps(refresh: int) -> None:
    galore_torch = pytest.importorskip("galore_torch", reason="galore-torch is not installed")
    theirs, ours = weights(), weights()
    options = {"rank": 4, "update_proj_gap": refresh, "scale": 0.25, "proj_type": "std"}
    reference = galore_torch.GaLoreAdamW(
        [{"params": theirs[:3], **options}, {"params": theirs[3:]}], lr=1e-2, eps=1e-8, no_deprecation_warning=True
    )
    method = GaLoreAdamW(
        [{"params": ours[:3], "rank": 4}, {"params": ours[3:]}], lr=1e-2, refresh=refresh, stagger=False
    )
    train(reference, theirs, range(20))
    train(method, ours, range(20))
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_state_is_the_formulas_bytes_and_no_more() -> None:
    params = weights()
    optimizer = GaLoreAdamW(params, rank=4)
    train(optimizer, params, range(2))
    by_hand = 4 * (4 * (2 * 24 + 16) * 2 + 4 * (2 * 16 + 16) + 2 * 16)
    assert state_bytes(optimizer) == by_hand
    assert by_hand == 4 * sum(GaLoreAdamW.state_numel(tuple(p.shape), 4) for p in params)


def test_a_group_without_rank_is_pytorchs_adamw_to_the_last_bit() -> None:
    params, expected = weights(), weights()
    train(GaLoreAdamW(params, lr=1e-2, weight_decay=0.1), params, range(10))
    train(torch.optim.AdamW(expected, lr=1e-2, weight_decay=0.1, fused=True), expected, range(10))
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_rank_belongs_to_its_group() -> None:
    params = weights()
    optimizer = GaLoreAdamW([{"params": params[:1], "rank": 3}, {"params": params[1:]}])
    train(optimizer, params, range(1))
    assert optimizer.state[params[0]]["basis"].shape == (16, 3)
    assert not any("basis" in optimizer.state[param] for param in params[1:])


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (4,), (4, 3, 1)])
def test_a_matrix_without_more_directions_than_rank_takes_the_plain_step(shape: tuple[int, ...]) -> None:
    params, expected = weights(shapes=[shape]), weights(shapes=[shape])
    train(GaLoreAdamW(params, rank=4), params, range(5))
    train(torch.optim.AdamW(expected, weight_decay=0, fused=True), expected, range(5))
    assert torch.equal(params[0], expected[0])


def test_refreshes_are_spread_over_the_steps() -> None:
    """With as many matrices as steps between refreshes, exactly one basis changes at every step after the first."""
    shapes = [(6, 5)] * 4 + [(5, 6)] * 2
    params = weights(shapes=shapes)
    optimizer = GaLoreAdamW(params, rank=2, refresh=6)
    train(optimizer, params, range(1))
    for step in range(1, 13):
        before = [optimizer.state[p]["basis"].clone() for p in params]
        train(optimizer, params, range(step, step + 1))
        changed = [not torch.equal(b, optimizer.state[p]["basis"]) for b, p in zip(before, params, strict=True)]
        assert sum(changed) == 1 and changed[(step - 1) % 6]


def test_without_stagger_all_refresh_in_the_papers_step() -> None:
    params = weights()
    optimizer = GaLoreAdamW(params, rank=2, refresh=3, stagger=False)
    for step in range(7):
        before = [optimizer.state[p]["basis"].clone() if step else None for p in params[:3]]
        train(optimizer, params, range(step, step + 1))
        if step:
            changed = [not torch.equal(b, optimizer.state[p]["basis"]) for b, p in zip(before, params, strict=False)]
            assert changed == [step % 3 == 0] * 3


def test_transposing_every_weight_changes_nothing() -> None:
    wide, tall = weights(shapes=[(6, 10)]), weights(shapes=[(6, 10)])
    tall = [nn.Parameter(p.detach().T.contiguous()) for p in tall]
    first, second = (GaLoreAdamW(p, rank=3, refresh=4, lr=0.1, basis="subspace") for p in (wide, tall))
    for step in range(9):
        wide[0].grad = gradients(step, [(6, 10)])[0]
        tall[0].grad = wide[0].grad.T.contiguous()
        first.step(), second.step()
    torch.testing.assert_close(wide[0], tall[0].T)


def test_scale_only_rescales_the_update() -> None:
    one, three = weights(shapes=[(8, 6)]), weights(shapes=[(8, 6)])
    start = one[0].detach().clone()
    train(GaLoreAdamW(one, rank=2, scale=0.5), one, range(1))
    train(GaLoreAdamW(three, rank=2, scale=1.5), three, range(1))
    torch.testing.assert_close(3 * (one[0] - start), three[0] - start)


def test_saved_between_refreshes_and_loaded_safely_it_goes_on_bit_for_bit() -> None:
    whole, params = weights(), weights()
    train(GaLoreAdamW(whole, rank=4, refresh=5), whole, range(12))
    optimizer = GaLoreAdamW(params, rank=4, refresh=5)
    train(optimizer, params, range(7))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = GaLoreAdamW(params, rank=4, refresh=5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, params, range(7, 12))
    assert all(torch.equal(a, b) for a, b in zip(params, whole, strict=True))


def test_a_state_of_another_rank_is_refused_and_nothing_changes() -> None:
    params = weights()
    saved = GaLoreAdamW(params, rank=4)
    train(saved, params, range(1))
    other = GaLoreAdamW(params, rank=5)
    train(other, params, range(1))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"basis of shape \(16, 4\).*need \(16, 5\)"):
        other.load_state_dict(saved.state_dict())
    assert torch.equal(before["state"][0]["basis"], other.state_dict()["state"][0]["basis"])


def test_half_precision_state_keeps_its_dtypes_over_a_resume() -> None:
    params = [nn.Parameter(p.detach().bfloat16()) for p in weights()]
    optimizer = GaLoreAdamW(params, rank=4)
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = grad.bfloat16()
    optimizer.step()
    resumed = GaLoreAdamW(params, rank=4)
    resumed.load_state_dict(optimizer.state_dict())
    kinds = {name: tensor.dtype for name, tensor in resumed.state[params[0]].items()}
    assert (
        kinds["exp_avg"] == torch.bfloat16 and kinds["next_refresh"] == torch.int64 and kinds["step"] == torch.float32
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"refresh": 0}, "refresh=0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"basis": "sdv"}, "basis='sdv'"),
        ({"on_refresh": "kep"}, "on_refresh='kep'"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\)"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW(weights(), **setting)
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": weights(), **setting}])


def test_a_rank_that_is_too_large_is_said_once_for_a_group() -> None:
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in [(4, 9), (9, 4), (12, 12), (40, 40), (5,)]]
    with pytest.warns(UserWarning) as said:
        optimizer = GaLoreAdamW(weights, rank=9)
    assert [str(warning.message) for warning in said] == [
        "rank=9 is too large for matrices of shape (4, 9), (9, 4): they take the plain step",
        "rank=9 is too large for matrices of shape (12, 12): they take no less state than the plain step would",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        GaLoreAdamW(weights[3:], rank=9)
        GaLoreAdamW(weights, rank=None)
