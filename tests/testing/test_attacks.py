"""Attacks are what their papers say, in numpy, and do what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.codecs.codec import named
from leantrain.exchange.robust.aggregators import nearest_neighbor_average, trimmed_mean
from leantrain.testing.attacks import (
    ATTACKS,
    LyingCodec,
    alie,
    around,
    constant,
    displacement,
    flip_labels,
    foe,
    gaussian,
    infinite,
    lie,
    mimic,
    nan,
    random_sign,
    scaled,
    searched,
    sign_flip,
    silence,
)
from tests.gloo import in_processes


def vectors(n: int, d: int, seed: int = 0) -> Tensor:
    return 1 + torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 9), st.integers(1, 50), st.integers(0, 1000), st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_attacks_are_what_their_definitions_say(n: int, d: int, seed: int, strength: float) -> None:
    honest = vectors(n, d, seed)
    x = honest.numpy()
    for found, expected in [
        (sign_flip(honest), -x.mean(0)),
        (sign_flip(honest, strength), -strength * x.mean(0)),
        (scaled(honest), -10 * x.mean(0)),
        (alie(honest, strength), x.mean(0) + strength * x.std(0)),
        (foe(honest, strength), (1 - strength) * x.mean(0)),
        (mimic(honest, n - 1), x[n - 1]),
        (constant(honest, strength), np.full(d, strength)),
        (silence(honest), np.zeros(d)),
    ]:
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_noise_has_the_size_that_was_asked_for_and_repeats_with_its_seed() -> None:
    honest = vectors(4, 100_000)
    noise = gaussian(honest, 3.0, seed=1) - honest.mean(0)
    assert noise.std() == pytest.approx(3.0, rel=0.02) and noise.mean() == pytest.approx(0, abs=0.05)
    assert torch.equal(gaussian(honest, 3.0, seed=1), gaussian(honest, 3.0, seed=1))
    assert not torch.equal(gaussian(honest, 3.0, seed=1), gaussian(honest, 3.0, seed=2))


def test_random_signs_keep_the_size_of_every_coordinate() -> None:
    honest = vectors(4, 10_000)
    found = random_sign(honest)
    torch.testing.assert_close(found.abs(), honest.mean(0).abs())
    assert 0.45 < (found > 0).double().mean() < 0.55


def test_what_is_not_finite_is_so_everywhere() -> None:
    assert infinite(vectors(2, 3)).isposinf().all() and nan(vectors(2, 3)).isnan().all()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_has_the_shape_and_type_of_a_vector_and_changes_none(name: str) -> None:
    honest = vectors(5, 7).float()
    before = honest.clone()
    found = ATTACKS[name](honest)
    found.add_(1)
    assert found.shape == (7,) and found.dtype == torch.float32
    assert torch.equal(honest, before)


def test_labels_are_turned_end_for_end() -> None:
    assert flip_labels(torch.tensor([0, 1, 9]), 10).tolist() == [9, 8, 0]


def test_around_a_point_an_attack_sees_differences() -> None:
    honest, point = vectors(4, 6), torch.full((6,), 5.0, dtype=torch.float64)
    torch.testing.assert_close(around(point, sign_flip)(honest), 2 * point - honest.mean(0))


def test_the_search_finds_the_strength_that_does_most_harm() -> None:
    honest, strengths = vectors(6, 40), [0.1, 0.5, 1.0, 2.0, 8.0]
    harm = displacement(honest, 2, trimmed_mean)
    found = searched(alie, honest, harm, strengths)
    harms = [
        np.linalg.norm(
            np.sort(np.concatenate([honest.numpy(), np.stack([alie(honest, z).numpy()] * 2)]), 0)[2:-2].mean(0)
            - honest.numpy().mean(0)
        )
        for z in strengths
    ]
    torch.testing.assert_close(found, alie(honest, strengths[int(np.argmax(harms))]))
    assert harm(found) == pytest.approx(max(harms))
    assert harm(nan(honest)) < harm(found)  # a rule that leaves it out is not harmed by it


def test_what_makes_a_rule_give_up_is_the_worst() -> None:
    honest = vectors(3, 4)
    harm = displacement(honest, 2, lambda stack, f: torch.full((4,), torch.nan, dtype=torch.float64))
    assert harm(honest[0]) == float("inf")


def test_a_searched_attack_harms_nearest_neighbours_more_than_a_loud_one() -> None:
    honest = vectors(6, 100)
    harm = displacement(honest, 2, nearest_neighbor_average)
    assert harm(searched(alie, honest, harm, [0.25, 0.5, 1.0, 1.5, 3.0])) > 1.05 * harm(scaled(honest))


def test_a_lying_codec_sends_packets_that_are_read_as_any_other() -> None:
    codec = LyingCodec(named("float32"), sign_flip)
    values = vectors(3, 4).float()
    torch.testing.assert_close(named("float32").decode(codec.encode(values)), -values.flatten())
    assert codec.name == "float32"
    torch.testing.assert_close(codec.decode(named("float32").encode(values)), values.flatten())


class Silent:
    """As much of an exchange as `lie` needs."""

    def outgoing(self, vector: Tensor) -> Tensor:
        return vector


def test_liars_of_a_run_know_the_honest_vectors_and_others_stay_honest() -> None:
    def work(rank: int) -> Tensor:
        exchange = lie(Silent(), "scaled", (0, 2))
        exchange.outgoing(torch.zeros(3))
        return exchange.outgoing(torch.full((3,), float(rank)))

    found = in_processes(4, work)
    assert [each[0].item() for each in found] == [-20.0, 1.0, -20.0, 3.0]


def test_a_run_needs_an_honest_rank_and_a_known_attack() -> None:
    def work(rank: int) -> list[str]:
        said = []
        for attack, liars in (("sign_flop", (0,)), ("sign_flip", (0, 1))):
            try:
                lie(Silent(), attack, liars)
            except UsageError as error:
                said.append(str(error))
        return said

    for first, second in in_processes(2, work):
        assert first.startswith("attack 'sign_flop' is unknown; did you mean 'sign_flip'?")
        assert second == "at least one of 2 ranks must be honest, got liars=[0, 1]"
