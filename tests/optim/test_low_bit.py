"""Low precision is storage only: what the inner rule computes is what it computes, to the codes' precision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.integers import decode, encode
from leantrain.optim import Adam, Chain, Lion, LowRank, Momentum
from leantrain.optim.bases import BASES, SVD
from leantrain.optim.codes import codebook
from leantrain.optim.low_bit import LowBit, LowBitBasis

CPU = torch.device("cpu")


def begin(rule: LowBit, *params: Tensor) -> list[dict[str, Tensor]]:
    return [{"step": torch.tensor(0.0), **rule.init(param)} for param in params]


def stepped_by_hand(rule: Any, bits: int, block: int, weights: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    """The rule on whole float32 moments that are coded after every step, block by block, by brute force."""
    weights = weights.clone().flatten()
    blocks = -(-weights.numel() // block)
    moments = {name: torch.zeros(1, weights.numel()) for name in rule.moments}
    for step, grad in enumerate(grads):
        update = rule.update(grad.reshape(1, -1).float(), moments, torch.tensor([float(step)]).double())
        weights = weights - lr * (0.1 * weights + update[0])
        for name, order in rule.moments.items():
            padded = torch.zeros(blocks * block)
            padded[: weights.numel()] = moments[name][0]
            padded = padded.view(blocks, block)
            scale = padded.abs().amax(1, keepdim=True)
            values = codebook(bits, order == 1, CPU).values  # type: ignore[arg-type]
            codes = (padded.mul(scale.reciprocal())[..., None] - values).abs().argmin(-1)
            moments[name] = (values[codes] * scale).flatten()[: weights.numel()][None]
    return weights


@pytest.mark.parametrize(
    "inner", [Adam((0.8, 0.9), 1e-3), Lion(), Momentum(nesterov=True)], ids=lambda r: type(r).__name__
)
@pytest.mark.parametrize(("bits", "block"), [(8, 64), (4, 32)])
@pytest.mark.parametrize("shape", [(16, 16), (7, 13), (1,)])
def test_a_step_is_the_inner_rules_on_decoded_moments(
    inner: Any, bits: Any, block: int, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) for _ in range(5)]
    expected = stepped_by_hand(inner, bits, block, weights, grads, 0.01)
    rule = LowBit(inner, bits, block)
    (state,) = begin(rule, weights)
    for grad in grads:
        rule.descend([weights], [grad], [state], 0.01, 0.1)
    torch.testing.assert_close(weights.flatten(), expected, rtol=1e-5, atol=1e-5)
    assert state["step"] == 5


@pytest.mark.parametrize("bits", [8, 4])
def test_update_and_descend_are_the_same_step(bits: Any) -> None:
    rule = LowBit(Adam(eps=1e-3), bits, 32)
    weights = torch.randn(9, 11)
    (state,), (other,) = begin(rule, weights), begin(rule, weights)
    moved = weights.clone()
    for step in range(4):
        grad = torch.randn(9, 11, generator=torch.Generator().manual_seed(step))
        rule.descend([weights], [grad], [state], 0.1, 0.0)
        stacked = {name: value.unsqueeze(0) for name, value in other.items()}
        moved -= 0.1 * rule.update(grad[None], stacked, torch.tensor([float(step)]).double())[0]
        torch.testing.assert_close(moved, weights, rtol=1e-5, atol=1e-5)


def test_parameters_larger_than_a_chunk_are_stepped_as_their_parts_are() -> None:
    numel, cut = (1 << 17) + 1000, 1 << 17
    weights, grad = torch.randn(numel), torch.randn(numel)
    parts = [weights[:cut].clone(), weights[cut:].clone()]
    rule = LowBit(Adam(), 8)
    (whole,), states = begin(rule, weights), begin(rule, *parts)
    for _ in range(2):
        rule.descend([weights], [grad], [whole], 0.1, 0.1)
        rule.descend(parts, [grad[:cut], grad[cut:]], states, 0.1, 0.1)
    assert torch.equal(weights, torch.cat(parts))
    for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"):
        assert torch.equal(whole[name], torch.cat([state[name] for state in states]))


def test_what_fills_the_last_block_never_sets_its_scale() -> None:
    """4-bit second moments have no zero, so what fills a block would stay large while the numbers become small."""
    rule = LowBit(Adam((0.0, 0.0)), 4, 32)
    weights = torch.zeros(5)
    (state,) = begin(rule, weights)
    for size in (1000.0, 1e-3):
        rule.descend([weights], [torch.full((5,), size)], [state], 0.1, 0.0)
    torch.testing.assert_close(state["exp_avg_sq_scale"], torch.tensor([1e-6]))


@pytest.mark.parametrize(
    "make", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t.contiguous()], ids=["t", "gaps", "-"]
)
@pytest.mark.parametrize("grad_too", [False, True])
def test_the_layout_in_memory_changes_nothing(make: Any, grad_too: bool) -> None:
    rule = LowBit(Adam(), 8, 32)
    strided = make(torch.arange(64.0).view(8, 8) / 64)
    grad = make(torch.arange(64.0).view(8, 8).sin()) if grad_too else torch.randn(strided.shape)
    plain, plain_grad = strided.contiguous().clone(), grad.contiguous().clone()
    (first,), (second,) = begin(rule, strided), begin(rule, plain)
    for _ in range(3):
        rule.descend([strided], [grad], [first], 0.1, 0.1)
        rule.descend([plain], [plain_grad], [second], 0.1, 0.1)
    assert torch.equal(strided, plain)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("inner", [Adam(), Lion()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_small_parameters_keep_their_moments_and_step_beside_the_others(inner: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    small, large = torch.randn(31).to(dtype), torch.randn(64).to(dtype)
    alone = small.clone()
    rule = LowBit(inner, 8, 32, min_numel=32)
    states = begin(rule, small, large)
    assert states[0]["exp_avg"].dtype == dtype and "exp_avg_scale" not in states[0]
    assert states[1]["exp_avg"].dtype == torch.uint8 and states[1]["exp_avg_scale"].dtype == torch.float32
    chain = Chain([torch.nn.Parameter(alone)], inner, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        chain.param_groups[0]["params"][0].grad = small.sin()
        rule.descend([small, large], [small.sin(), large.sin()], states, 0.1, 0.1)
        chain.step()
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(small, alone, rtol=tolerance, atol=tolerance)
    assert [int(state["step"]) for state in states] == [3, 3] and small.dtype == large.dtype == dtype


@settings(max_examples=40, deadline=None)
@given(numel=st.integers(1, 700), bits=st.sampled_from([8, 4]), block=st.sampled_from([8, 40, 128, 256]))
def test_state_takes_the_bytes_of_the_formula(numel: int, bits: Any, block: int) -> None:
    rule = LowBit(Adam(), bits, block)
    state = rule.init(torch.empty(numel))
    assert sum(t.numel() * t.element_size() for t in state.values()) == LowBit.state_bytes(numel, bits, block)
    on_meta = rule.init(torch.empty(numel, device="meta"))
    assert {n: (t.shape, t.dtype) for n, t in on_meta.items()} == {n: (t.shape, t.dtype) for n, t in state.items()}
    assert all(t.is_meta for t in on_meta.values())
    assert LowBit.state_bytes(numel, bits, block, moments=1) * 2 == LowBit.state_bytes(numel, bits, block)


@pytest.mark.parametrize("on_refresh", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("bits", [8, 4])
def test_it_stores_the_moments_of_a_low_rank_rule(on_refresh: Any, bits: Any) -> None:
    def run(inner: Any) -> Tensor:
        params = [torch.nn.Parameter(torch.eye(24, 16)), torch.nn.Parameter(torch.eye(16, 40)[:, 3:])]
        chain = Chain(params, LowRank(inner, 4, refresh=3, on_refresh=on_refresh, scale=1.0), lr=1e-2)
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            for param in params:
                left = torch.randn(param.shape[0], 3, generator=torch.Generator().manual_seed(0))
                param.grad = left @ torch.randn(3, param.shape[1], generator=generator)
            chain.step()
        return torch.cat([param.detach().flatten() for param in params])

    start = torch.cat([torch.eye(24, 16).flatten(), torch.eye(16, 40)[:, 3:].flatten()])
    whole, coded = run(Adam(eps=1e-2)), run(LowBit(Adam(eps=1e-2), bits, 32))
    off = (coded - whole).norm() / (whole - start).norm()
    assert 0 < off < (0.05 if bits == 8 else 0.4)


def test_a_moment_can_be_read_and_written_for_the_stack() -> None:
    rule = LowBit(Adam(), 8, 32)
    state = {name: torch.stack([value] * 3) for name, value in rule.init(torch.empty(6, 7)).items()}
    moment = torch.randn(3, 6, 7)
    before = moment.clone()
    rule.write(state, "exp_avg", moment)
    assert torch.equal(moment, before)  # it is the caller's
    read = rule.read(state, "exp_avg", torch.Size((6, 7)))
    assert read.shape == (3, 6, 7)
    assert (read - moment).abs().amax() <= moment.abs().amax() * 0.9 / 64


class TestStochasticRounding:
    def test_steps_below_the_weights_precision_count_on_average(self) -> None:
        moved = {}
        for on in (False, True):
            rule = LowBit(Adam((0.0, 0.0)), 8, 256, stochastic_rounding=on)
            weights = torch.full((4096,), 100.0, dtype=torch.bfloat16)
            (state,) = begin(rule, weights)
            for _ in range(50):
                rule.descend([weights], [torch.ones_like(weights)], [state], 0.01, 0.0)
            moved[on] = 100 - weights.double().mean().item()
        assert moved[False] == 0
        assert abs(moved[True] - 0.5) < 0.03

    @pytest.mark.parametrize("min_numel", [0, 10_000])
    def test_it_repeats_itself_and_draws_anew_at_each_step_and_for_each_parameter(self, min_numel: int) -> None:
        def run() -> list[Tensor]:
            rule = LowBit(Adam((0.0, 0.0)), 8, 256, min_numel=min_numel, stochastic_rounding=True)
            params = [torch.full((512,), 100.0, dtype=torch.bfloat16) for _ in range(2)]
            states, seen = begin(rule, *params), []
            for _ in range(2):
                for param in params:
                    param.fill_(100.0)
                rule.descend(params, [torch.ones_like(p) for p in params], states, 0.1, 0.0)
                seen += [param.clone() for param in params]
            return seen

        first, again = run(), run()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))

    def test_where_it_cannot_be_honoured_it_is_refused(self) -> None:
        rule = LowBit(Adam(), stochastic_rounding=True)
        with pytest.raises(UsageError, match="float16"):
            rule.init(torch.empty(8, dtype=torch.float16))
        with pytest.raises(UsageError, match="ends the chain"):
            rule.update(torch.ones(1, 8), {}, torch.zeros(1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"bits": 16}, "bits=16"),
        ({"block": 0}, "block=0"),
        ({"block": 12}, "block=12"),
        ({"block": 16.0}, "block=16.0"),
        ({"min_numel": -1}, "min_numel=-1"),
        ({"inner": LowRank(Adam(), 2)}, "LowRank keeps no moments"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LowBit(**{"inner": Adam(), **wrong})


class TestBasis:
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize(("shape", "rank", "right"), [((2, 20, 9), 3, True), ((1, 40, 64), 16, False)])
    def test_directions_are_the_inner_ones_to_half_a_step_of_each_group(
        self, bits: Any, shape: tuple[int, ...], rank: int, right: bool
    ) -> None:
        size = shape[2] if right else shape[1]
        grads = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        basis = LowBitBasis(SVD(), bits, 32)
        stored = {name: torch.stack([value] * shape[0]) for name, value in basis.init(size, rank, grads).items()}
        new = basis.fit(grads, stored, True, rank, right)
        assert {n: (t.shape, t.dtype) for n, t in new.items()} == {n: (t.shape, t.dtype) for n, t in stored.items()}
        exact = SVD().fit(grads, {"basis": torch.zeros(shape[0], size, rank)}, True, rank, right)["basis"]
        found = basis.directions(new, size, rank)
        assert found.dtype == torch.float32 and found.shape == exact.shape
        for one, two in zip(found, exact, strict=True):
            off = (one - two).flatten()
            groups = two.flatten().split(32)
            for part, group in zip(off.split(32), groups, strict=True):
                half_a_step = (group.max() - group.min()) / (2**bits - 1) / 2
                assert part.abs().max() <= half_a_step * (1 + 1e-4) + 1e-7
        assert not torch.equal(found, exact)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_it_takes_the_bytes_it_says(self, bits: Any) -> None:
        stored = LowBitBasis(SVD(), bits).init(100, 7, torch.empty(0, device="meta"))
        assert sum(t.numel() * t.element_size() for t in stored.values()) == 700 * bits // 8 + 8 * 3

    @pytest.mark.parametrize("name", ["svd", "subspace", "rsvd"])
    def test_it_works_in_a_chain_at_every_refresh(self, name: str) -> None:
        weights = torch.nn.Parameter(torch.eye(12, 8))
        chain = Chain([weights], LowRank(LowBit(Adam(), 8, 32), 2, refresh=2, basis=LowBitBasis(BASES[name], 4, 16)))
        for step in range(5):
            weights.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
            chain.step()
        assert weights.isfinite().all() and chain.state[weights]["basis"].dtype == torch.uint8

    @pytest.mark.parametrize("name", ["dct", "coordinate", "random", "identity"])
    def test_a_basis_that_stores_no_directions_is_refused(self, name: str) -> None:
        with pytest.raises(UsageError, match="directions"):
            LowBitBasis(BASES[name]).init(8, 2, torch.empty(0))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40), st.sampled_from([8, 4]))
    def test_the_grids_it_stands_on_are_off_by_half_a_step_at_most(self, numbers: list[float], bits: int) -> None:
        values = torch.tensor(numbers)
        stored = encode(values, bits, 16)
        off = (decode(stored, 16) - values).double().abs()
        half = (stored.scale / 2).repeat_interleave(16)[: len(values)].double()
        assert (off <= half * (1 + 1e-5) + values.abs().max() * 2e-7 + 1e-38).all()

    def test_wrong_settings_are_named(self) -> None:
        with pytest.raises(UsageError, match="bits=2"):
            LowBitBasis(SVD(), 2)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="group=7"):
            LowBitBasis(SVD(), 8, 7)
