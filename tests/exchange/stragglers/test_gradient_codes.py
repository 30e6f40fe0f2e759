"""Every code decodes every set of late workers it promises to, as exactly as its amplification says, and no more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from unittest import mock

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.exchange.stragglers import gradient_codes
from leantrain.exchange.stragglers.gradient_codes import (
    Decoder,
    Undecodable,
    amplification,
    choose_code,
    circulant,
    decoding_weights,
    fractional_repetition,
    random_cyclic,
)

SIZES = [(n, s) for n in range(1, 9) for s in range(n)]


def codes(n: int, s: int) -> Iterator[Tensor]:
    """All codes that there are for n workers and s late ones."""
    if n % (s + 1) == 0:
        yield fractional_repetition(n, s)
    if (n + s) % 2:
        yield circulant(n, s)
    yield random_cyclic(n, s)


def without(n: int, missing: tuple[int, ...]) -> list[int]:
    return [worker for worker in range(n) if worker not in missing]


def brute_amplification(code: Tensor, s: int) -> float:
    """The definition, by numpy's pseudo-inverse. Of equal rows all share the weight, which does not change the sum."""
    matrix, n = code.numpy(), len(code)
    worst = 0.0
    for missing in itertools.combinations(range(n), s):
        rows = matrix[without(n, missing)]
        weights = numpy.linalg.pinv(rows.T, rcond=1e-14) @ numpy.ones(n)
        worst = max(worst, float(numpy.abs(weights) @ numpy.abs(rows).max(1)))
    return worst


@pytest.mark.parametrize(("n", "s"), SIZES)
@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_every_set_of_late_workers_decodes_to_the_whole_gradient(n: int, s: int, dtype: type) -> None:
    # Random codes are solved for in float64, so there they are exact to somewhat less than what float64 can say.
    for code in codes(n, s) if dtype == numpy.float32 else [choose_code(n, s)]:
        chunks = numpy.random.default_rng(n * s).standard_normal((n, 20)).astype(dtype)
        whole = chunks.astype(numpy.float64).sum(0)
        sent = numpy.zeros_like(chunks)
        for i, j in itertools.product(range(n), range(n)):  # one product after the other, as workers compute them
            sent[i] += dtype(code[i, j].item()) * chunks[j]
        bound = 10 * brute_amplification(code, s) * numpy.finfo(dtype).eps * numpy.abs(whole).max()
        for missing in itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(s + 1)):
            present = without(n, missing)
            weights = decoding_weights(code, present).numpy()
            decoded = sum(dtype(weight) * sent[i] for weight, i in zip(weights, present, strict=True))
            assert numpy.abs(decoded - whole).max() <= bound, missing


@pytest.mark.parametrize(("n", "s"), SIZES)
def test_some_set_of_one_more_late_worker_does_not_decode(n: int, s: int) -> None:
    for code in codes(n, s):
        if s + 1 == n:
            continue  # nobody is left
        residuals = []
        for missing in itertools.combinations(range(n), s + 1):
            rows = code.numpy()[without(n, missing)]
            weights = numpy.linalg.lstsq(rows.T, numpy.ones(n), rcond=None)[0]
            residuals.append(numpy.abs(weights @ rows - 1).max())
            if residuals[-1] > 1e-6:
                with pytest.raises(Undecodable, match=r"do not decode, without \["):
                    decoding_weights(code, without(n, missing))
        assert max(residuals) > 1e-6


@pytest.mark.parametrize(("n", "s"), SIZES)
def test_every_worker_has_s_plus_1_chunks_and_every_chunk_s_plus_1_workers(n: int, s: int) -> None:
    for code in codes(n, s):
        assert code.dtype == torch.float64
        assert (code != 0).sum(1).tolist() == [s + 1] * n
        assert (code != 0).sum(0).tolist() == [s + 1] * n
    for i, row in enumerate(random_cyclic(n, s)):
        assert set(row.nonzero().flatten().tolist()) == {(i + k) % n for k in range(s + 1)}


@pytest.mark.parametrize(("n", "s"), [(n, s) for n, s in SIZES if (n + s) % 2])
def test_the_circulant_code_is_positive_and_symmetric_and_has_s_zeros_in_its_spectrum(n: int, s: int) -> None:
    row = circulant(n, s)[0, : s + 1]
    assert (row > 0).all()
    torch.testing.assert_close(row, row.flip(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(circulant(n, s).sum(1), torch.ones(n, dtype=torch.float64))
    spectrum = numpy.abs(numpy.fft.fft(circulant(n, s)[0].numpy()))
    zeros = sorted(numpy.argsort(spectrum)[:s].tolist())
    assert spectrum[zeros].max(initial=0) < 1e-12
    assert zeros == list(range((n - s + 1) // 2, (n - s + 1) // 2 + s))  # consecutive, around n / 2


def test_circulant_rows_are_those_of_the_closed_form() -> None:
    assert circulant(4, 1)[1].tolist() == pytest.approx([0, 0.5, 0.5, 0])
    assert circulant(5, 2)[0, :3].tolist() == pytest.approx([0.276, 0.447, 0.276], abs=1e-3)
    assert circulant(8, 3)[0, :4].tolist() == pytest.approx([0.146, 0.354, 0.354, 0.146], abs=1e-3)


@pytest.mark.parametrize(("n", "s"), [(4, 2), (5, 1), (7, 3), (8, 5)])
def test_rows_of_the_random_code_span_what_s_random_vectors_leave(n: int, s: int) -> None:
    code = random_cyclic(n, s).numpy()
    assert numpy.linalg.matrix_rank(code, tol=1e-9) == n - s
    assert numpy.abs(numpy.ones(n) - numpy.linalg.pinv(code, rcond=1e-9) @ code @ numpy.ones(n)).max() < 1e-9
    assert (numpy.diag(code) == 1).all()
    random_cyclic.cache_clear()
    assert numpy.array_equal(random_cyclic(n, s).numpy(), code)  # in another process, too


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_repetition_is_bit_equal_to_the_sum_of_its_groups(data: st.DataObject) -> None:
    size, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    n, s = size * groups, size - 1
    present = sorted(
        set().union(*[
            data.draw(st.sets(st.integers(size * g, size * g + s), min_size=1, max_size=size)) for g in range(groups)
        ])
    )  # fmt: skip
    weights = decoding_weights(fractional_repetition(n, s), present)
    taken = [worker for worker, weight in zip(present, weights.tolist(), strict=True) if weight == 1]
    assert [worker // size for worker in taken] == list(range(groups))
    assert weights.sum() == groups  # all others are exactly 0
    assert all(worker == min(p for p in present if p // size == worker // size) for worker in taken)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_more_answers_than_needed_never_hurt(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 12))
    s = data.draw(st.integers(0, min(3, n - 1)))
    code = choose_code(n, s)
    missing = data.draw(st.sets(st.integers(0, n - 1), max_size=s))
    present = data.draw(st.permutations(without(n, tuple(missing))))
    weights = decoding_weights(code, present)
    assert (weights @ code[present] - 1).abs().max() < 1e-8


@pytest.mark.parametrize(("n", "s"), [(n, s) for n, s in SIZES if n >= 4])
def test_amplification_is_the_worst_over_all_sets(n: int, s: int) -> None:
    for code in codes(n, s):
        assert amplification(code, s) == pytest.approx(brute_amplification(code, s), rel=1e-6)


def test_the_best_code_is_repetition_then_circulant_then_random() -> None:
    assert torch.equal(choose_code(6, 2), fractional_repetition(6, 2))
    assert torch.equal(choose_code(5, 2), circulant(5, 2))
    assert torch.equal(choose_code(5, 1), random_cyclic(5, 1))
    assert amplification(choose_code(12, 3), 3) == 3
    assert 10 < amplification(circulant(8, 3), 3) < 20


def test_a_set_that_float64_cannot_decode_counts_as_infinitely_amplified() -> None:
    code = torch.eye(3, dtype=torch.float64)
    assert amplification(code, 1) == math.inf


def test_where_sets_are_too_many_some_are_drawn() -> None:
    code = fractional_repetition(30, 9)
    assert amplification(code, 9, most=20) == 3


@pytest.mark.parametrize(("n", "s"), [(4, 4), (4, -1), (0, 0), (1, 1)])
def test_there_is_no_code_that_does_without_everybody(n: int, s: int) -> None:
    for code in (choose_code, fractional_repetition, circulant, random_cyclic):
        with pytest.raises(UsageError, match=f"n={n} workers can do without s of them, 0 <= s < n, got s={s}"):
            code(n, s)


def test_codes_that_do_not_exist_are_refused_with_what_would() -> None:
    with pytest.raises(UsageError, match="s \\+ 1 to divide n, got n=5, s=1"):
        fractional_repetition(5, 1)
    with pytest.raises(UsageError, match="n \\+ s to be odd, got n=5, s=1; s=2 would do"):
        circulant(5, 1)


def test_the_decoder_remembers_the_sets_of_late() -> None:
    decoder = Decoder(circulant(5, 2), remembered=2)
    with mock.patch.object(gradient_codes, "decoding_weights", side_effect=decoding_weights) as solved:
        first = decoder.weights([4, 0, 2])
        assert decoder.weights({0, 2, 4}) is first
        assert solved.call_count == 1
        assert decoder.weights([0, 1]) is None
        assert decoder.weights([0, 1]) is None
        assert solved.call_count == 2
        assert decoder.weights([0, 1, 2]) is not None  # {0, 2, 4} is forgotten now
        assert decoder.weights([0, 2, 4]) == first
        assert solved.call_count == 4
    assert first is not None
    assert list(first) == [0, 2, 4]
    assert torch.tensor(list(first.values())).allclose(decoding_weights(circulant(5, 2), [0, 2, 4]).float())


def test_nobody_decodes_nothing() -> None:
    assert Decoder(fractional_repetition(4, 1)).weights([]) is None
