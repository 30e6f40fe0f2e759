"""APOLLO against the package its authors published, and against its own laws."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.exchange import FullyShard
from leantrain.optim import Adam, predicted_state_bytes, state_bytes
from leantrain.optim.apollo import APOLLO, Apollo, APOLLOMini
from leantrain.optim.bases import Random
from leantrain.optim.low_bit import LowBit
from tests.gloo import in_processes

SHAPES = [(24, 16), (16, 24), (16, 16), (24, 16), (16,)]


def weights(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(step: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, growth: float = 1.0) -> None:
    """Steps on random gradients whose size is multiplied by `growth` from one to the next."""
    for step in steps:
        for param, grad in zip(params, gradients(step, [tuple(p.shape) for p in params]), strict=True):
            param.grad = growth**step * grad
        optimizer.step()


def directions(refreshes: int, size: int, rank: int, seed: int = 0) -> Tensor:
    """The random matrix in use after so many refreshes."""
    return Random(seed, orthonormal=False).directions({"draw": torch.tensor([refreshes])}, size, rank)[0]


def first_update(rule: Apollo, grad: Tensor) -> Tensor:
    state = {name: value.unsqueeze(0) for name, value in rule.init(grad).items()}
    return rule.update(grad.unsqueeze(0), state, torch.zeros(1, dtype=torch.float64))[0]


@pytest.fixture
def apollo_torch(monkeypatch: pytest.MonkeyPatch):
    """The authors' package, with our random matrices in the place of its own."""
    package = pytest.importorskip("apollo_torch", reason="apollo-torch is not installed")
    from apollo_torch import random_projector

    def injected(self, weights: Tensor, rank: int, type: str, seed: int) -> Tensor:
        ours = directions(seed // 1000, min(weights.shape), rank)  # the package starts seeds at the parameter's number
        return ours.T if type == "right" else ours

    monkeypatch.setattr(random_projector.GradientProjector, "get_orthogonal_matrix", injected)
    monkeypatch.setattr(random_projector, "next_seed", lambda seed: seed + 1000)
    return package


def theirs(package, params: list[nn.Parameter], scale_front: bool = False, **options: object) -> torch.optim.Optimizer:
    common = {"rank": 4, "update_proj_gap": 7, "proj": "random", "proj_type": "std", "scale": 1.0} | options
    matrices, rest = ([p for p in params if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, **common}, {"params": rest}]
    return package.APOLLOAdamW(groups, lr=1e-2, eps=1e-8, scale_front=scale_front)


@pytest.mark.parametrize(("scale_type", "scale", "rank"), [("channel", 1.0, 4), ("tensor", 128.0, 1)])
def test_follows_the_authors_package_to_1e5_over_twenty_steps(apollo_torch, scale_type, scale, rank) -> None:
    expected, params, unlimited = weights(), weights(), weights()
    options = {"rank": rank, "refresh": 7, "scale": scale, "scale_per": scale_type}
    train(theirs(apollo_torch, expected, rank=rank, scale=scale, scale_type=scale_type), expected, range(20), 1.05)
    train(APOLLO(params, lr=1e-2, **options), params, range(20), 1.05)
    for a, b in zip(expected, params, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    train(APOLLO(unlimited, lr=1e-2, **options, growth_limit=math.inf), unlimited, range(20), 1.05)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(expected[:4], unlimited, strict=False))


def test_the_authors_scale_front_which_is_left_out_here_changes_nothing(apollo_torch) -> None:
    behind, before = weights(), weights()
    for params, scale_front in ((behind, False), (before, True)):
        options = {"scale_front": scale_front, "scale": 128.0, "scale_type": "tensor", "rank": 1}
        train(theirs(apollo_torch, params, **options), params, range(20), 1.05)
    for a, b in zip(behind, before, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 8), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_an_update_is_the_gradient_times_a_positive_factor_per_channel(m: int, n: int, rank: int, seed: int) -> None:
    rank = min(rank, min(m, n) - 1)
    if rank < 1:
        return
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    channels = first_update(Apollo(Adam(), rank), grad) / grad
    if m < n:
        channels = channels.T
    assert (channels > 0).all()
    torch.testing.assert_close(channels, channels[:, :1].expand_as(channels))
    whole = first_update(Apollo(Adam(), rank, scale_per="tensor"), grad)
    torch.testing.assert_close(torch.cosine_similarity(whole.flatten(), grad.flatten(), dim=0).item(), 1.0)


def test_the_first_step_moves_a_channel_by_what_adams_first_step_is_to_the_projected_gradient() -> None:
    """Adam's first step is +-1 in each of 5 directions: sqrt(5) long, whatever it was made of."""
    grad = gradients(0, [(9, 6)])[0].double()
    update = first_update(Apollo(Adam(eps=0.0), 5, scale=4.0), grad)
    random = Random(0, orthonormal=False).directions({"draw": torch.tensor([0])}, 6, 5, like=grad.unsqueeze(0))[0]
    expected = 2.0 * grad * math.sqrt(5) / (grad @ random).norm(dim=1, keepdim=True)
    torch.testing.assert_close(update, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale_per", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(300, 80), (80, 300)])
def test_a_first_update_is_as_long_as_the_card_says(shape: tuple[int, int], scale_per: str) -> None:
    """sqrt(scale R L), where Adam's is sqrt(S L): E |G P|^2 = |G|^2, and N is +-1 in R L places."""
    update = first_update(Apollo(Adam(), 20, scale=9.0, scale_per=scale_per), gradients(0, [shape])[0])
    assert update.norm().item() == pytest.approx(math.sqrt(9 * 20 * 300), rel=0.1)


@given(st.floats(1.0, 1.5), st.floats(0.5, 2.0))
@settings(max_examples=15, deadline=None)
def test_an_updates_norm_grows_by_no_more_than_the_limit(limit: float, growth: float) -> None:
    betas = (0.9, 0.999)
    rule = Apollo(Adam(betas), 2, growth_limit=limit)
    param = weights([(8, 5)])[0]
    state = {name: value.unsqueeze(0) for name, value in rule.init(param).items()}
    norms, shortened = [], 0
    for step in range(12):
        grad = growth**step * gradients(step, [(8, 5)])[0].unsqueeze(0)
        update = rule.update(grad, state, torch.tensor([float(step)], dtype=torch.float64))
        correction = math.sqrt(1 - betas[1] ** (step + 1)) / (1 - betas[0] ** (step + 1))
        norms.append(update.norm().item() / correction)
        ratio = norms[-1] / norms[-2] if step else 0.0
        assert ratio <= limit * (1 + 1e-5)
        shortened += abs(ratio - limit) < 1e-5
        assert state["update_norm"].item() == pytest.approx(norms[-1], rel=1e-5)
    assert shortened or growth < 1.2


def test_gradients_of_zero_do_not_hold_back_what_comes_after_them() -> None:
    """A layer behind one that starts at zero has no gradient at first; its later ones are not growth from nothing."""
    waiting, fresh = weights([(8, 5)]), weights([(8, 5)])
    optimizer = APOLLO(waiting, rank=2, betas=(0.0, 0.0), refresh=1000)
    waiting[0].grad = torch.zeros(8, 5)
    optimizer.step()
    train(optimizer, waiting, range(1))
    train(APOLLO(fresh, rank=2, betas=(0.0, 0.0), refresh=1000), fresh, range(1))
    torch.testing.assert_close(waiting[0], fresh[0])


def test_gradients_of_zero_hold_the_authors_package_back(apollo_torch) -> None:
    """The reason for the difference, and for another look when their package changes."""
    params = weights([(8, 5)])
    optimizer = theirs(apollo_torch, params, scale_type="channel")
    params[0].grad = torch.zeros(8, 5)
    optimizer.step()
    start = params[0].detach().clone()
    train(optimizer, params, range(100))
    assert (params[0] - start).abs().max() < 1e-6


def test_a_gradient_of_zero_on_the_way_does_not_lift_the_limit() -> None:
    params = weights([(8, 5)])
    optimizer = APOLLO(params, rank=2)
    train(optimizer, params, range(1))
    norm = optimizer.state[params[0]]["update_norm"].clone()
    params[0].grad = torch.zeros(8, 5)
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["update_norm"], norm) and norm > 0


def test_the_random_matrix_is_a_function_of_seed_and_step_and_is_redrawn_at_refreshes_only() -> None:
    """Followed through the first moment with beta1 = 0, which is the projected gradient itself."""
    params = weights([(9, 6)])
    optimizer = APOLLO(params, rank=3, refresh=4, betas=(0.0, 0.999), seed=5)
    for step in range(10):
        train(optimizer, params, range(step, step + 1))
        expected = gradients(step, [(9, 6)])[0] @ directions(step // 4, 6, 3, seed=5)
        torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"], expected)


def test_a_stack_of_matrices_with_histories_of_their_own_is_stepped_as_each_alone() -> None:
    together, apart = weights([(9, 6), (9, 6)]), weights([(9, 6), (9, 6)])
    first, second = APOLLO(together, rank=2, refresh=2), APOLLO(apart, rank=2, refresh=2)
    for step in range(7):
        for a, b, grad in zip(together, apart, gradients(step, [(9, 6), (9, 6)]), strict=True):
            a.grad = b.grad = grad
        if step < 3:  # the second matrix joins later
            together[1].grad = apart[1].grad = None
        first.step()
        for param in apart:
            if param.grad is not None:
                second.step_param(param, param.grad)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)


def test_transposing_a_weight_changes_nothing() -> None:
    wide = weights([(6, 10)])
    tall = [nn.Parameter(wide[0].detach().T.contiguous())]
    first, second = (APOLLO(p, rank=3, refresh=4, lr=0.1) for p in (wide, tall))
    for step in range(9):
        wide[0].grad = gradients(step, [(6, 10)])[0]
        tall[0].grad = wide[0].grad.T.contiguous()
        first.step(), second.step()
    torch.testing.assert_close(wide[0], tall[0].T)


def test_a_tensor_is_stepped_as_the_matrix_of_its_first_axis() -> None:
    folded, flat = weights([(6, 2, 4)]), weights([(6, 8)])
    for params in (folded, flat):
        train(APOLLO(params, rank=3), params, range(5))
    assert torch.equal(folded[0].view(6, 8), flat[0])


def test_saved_between_refreshes_and_loaded_safely_it_goes_on_bit_for_bit() -> None:
    whole, params = weights(), weights()
    train(APOLLO(whole, rank=4, refresh=5), whole, range(12))
    optimizer = APOLLO(params, rank=4, refresh=5)
    train(optimizer, params, range(7))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(123)  # of no influence: the matrices come from seed and step
    resumed = APOLLO(params, rank=4, refresh=5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, params, range(7, 12))
    assert all(torch.equal(a, b) for a, b in zip(params, whole, strict=True))


def test_state_is_two_moments_and_one_norm() -> None:
    params = weights()
    optimizer = APOLLO(params, rank=4)
    train(optimizer, params, range(2))
    by_hand = 4 * (3 * (2 * 4 * 24 + 1) + (2 * 4 * 16 + 1) + 2 * 16)
    assert state_bytes(optimizer) == by_hand == predicted_state_bytes(APOLLO(weights(), rank=4))
    assert by_hand == 4 * sum(APOLLO.state_numel(tuple(p.shape), 4) for p in params)
    assert APOLLO.state_numel((24, 16), None) == 2 * 24 * 16


def test_moments_in_eight_bits_are_close_and_a_quarter_of_the_size() -> None:
    shapes = [(96, 64)]
    wide, narrow = weights(shapes), weights(shapes)
    train(APOLLO(wide, rank=16, lr=1e-2), wide, range(20))
    small = APOLLO(narrow, rank=16, lr=1e-2, state_bits=8, full_precision_below=0)
    train(small, narrow, range(20))
    assert isinstance(small.rule_for(narrow[0], small.param_groups[0]).inner, LowBit)
    numbers = 2 * 16 * 96
    assert numbers <= state_bytes(small) <= numbers * (1 + 4 / 256) + 4
    way, gap = (wide[0] - weights(shapes)[0]).norm(), (wide[0] - narrow[0]).norm()
    assert 0 < gap < 0.05 * way
    kept = APOLLO(weights(shapes), rank=16, state_bits=8, full_precision_below=16 * 96 + 1)
    assert isinstance(kept.rule_for(kept.param_groups[0]["params"][0], kept.param_groups[0]).inner, Adam)


def test_a_group_without_rank_is_pytorchs_adamw_to_the_last_bit() -> None:
    params, expected = weights(), weights()
    with pytest.warns(UserWarning, match="no group of this APOLLO has a rank"):
        optimizer = APOLLO(params, lr=1e-2, weight_decay=0.1)
    train(optimizer, params, range(10))
    train(torch.optim.AdamW(expected, lr=1e-2, weight_decay=0.1, fused=True), expected, range(10))
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_mini_is_apollo_with_one_direction_and_one_factor() -> None:
    mini, same = weights(), weights()
    train(APOLLOMini(mini, rank=1, lr=1e-2), mini, range(5))
    train(APOLLO(same, rank=1, lr=1e-2, scale=128.0, scale_per="tensor"), same, range(5))
    assert all(torch.equal(a, b) for a, b in zip(mini, same, strict=True))


def test_half_precision_weights_move_as_float32_ones_do_to_their_precision() -> None:
    wide, narrow = weights(), [nn.Parameter(p.detach().bfloat16()) for p in weights()]
    train(APOLLO(wide, rank=4, lr=1e-2), wide, range(5))
    optimizer = APOLLO(narrow, rank=4, lr=1e-2)
    for step in range(5):
        for param, grad in zip(narrow, gradients(step), strict=True):
            param.grad = grad.bfloat16()
        optimizer.step()
    for a, b in zip(wide, narrow, strict=True):
        torch.testing.assert_close(b.float(), a, rtol=2e-2, atol=2e-2)
    assert optimizer.state[narrow[0]]["update_norm"].dtype == torch.float32


def test_sharded_matrices_are_refused_by_name() -> None:
    def work(rank: int) -> str:
        model = FullyShard().attach(nn.Linear(8, 8))
        optimizer = APOLLO(model.parameters(), rank=2)
        model(torch.ones(2, 8)).sum().backward()
        try:
            optimizer.step()
        except UsageError as error:
            return str(error)
        return ""

    for message in in_processes(2, work):
        assert "APOLLO needs whole matrices, got a parameter of shape (8, 8)" in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"refresh": 0}, "refresh=0"),
        ({"refresh": 1.5}, "refresh=1.5"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale_per": "row"}, "scale_per='row'"),
        ({"growth_limit": 0.99}, "growth_limit=0.99"),
        ({"growth_limit": math.nan}, "growth_limit=nan"),
        ({"state_bits": 16}, "state_bits=16"),
        ({"full_precision_below": -1}, "full_precision_below=-1"),
        ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\)"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(setting: dict[str, object], message: str) -> None:
    for cls in (APOLLO, APOLLOMini):
        with pytest.raises(ValueError, match=message):
            cls(weights(), **setting)
        with pytest.raises(ValueError, match=message):
            cls([{"params": weights(), **setting}])
