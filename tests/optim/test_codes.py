"""Codes are the nearest there are, by brute force and by bitsandbytes; nothing is lost at odd sizes or odd numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from leantrain.errors import UsageError
from leantrain.optim.codes import Codebook, codebook, dynamic_map, round_stochastically

CPU = torch.device("cpu")
BOOKS = [(8, True), (8, False), (4, True), (4, False)]
books = pytest.mark.parametrize(("bits", "signed"), BOOKS)
reals = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bytes_of_numbers(codes: Tensor, bits: int) -> Tensor:
    """One code per number, [..., n]."""
    return codes.long() if bits == 8 else torch.stack((codes >> 4, codes & 15), -1).flatten(-2).long()


def nearest(shares: Tensor, values: Tensor) -> Tensor:
    """Brute force in float64: the last of the codes whose values are nearest."""
    distance = (shares.double()[..., None] - values.double()).abs()
    return len(values) - 1 - distance.flip(-1).argmin(-1)


def assert_nearest(book: Codebook, numbers: Tensor, block: int) -> None:
    codes, scale = book.encode(numbers, block)
    padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % block)).view(-1, block)
    shares = padded * scale.reciprocal()[:, None]
    found = bytes_of_numbers(codes, book.bits).view(-1, block)
    for share, code, largest, magnitude in zip(shares, found, scale, padded.abs().amax(1), strict=True):
        if magnitude < 2.0**-126:
            assert largest == 0
        else:
            assert largest == magnitude
            assert torch.equal(code, nearest(share, book.values))
    decoded = book.decode(codes, scale, len(numbers))
    assert torch.equal(decoded, (book.values[found] * scale[:, None]).flatten()[: len(numbers)])


@books
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_number_takes_the_nearest_code_of_its_block(bits: int, signed: bool, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 41))
    power = data.draw(st.integers(-30, 30))
    kind = data.draw(st.sampled_from([reals, st.floats(-1, 1, width=32)]))
    numbers = torch.from_numpy(data.draw(arrays("float32", size, elements=kind)))
    numbers = (numbers * 2.0**power).clamp(-3e38, 3e38)
    assert_nearest(codebook(bits, signed, CPU), numbers if signed else numbers.abs(), block=16)


@books
def test_the_boundaries_between_codes_are_exact_and_of_two_equal_ones_the_upper_is_taken(
    bits: int, signed: bool
) -> None:
    book = codebook(bits, signed, CPU)
    wide = book.values.double()
    middles = (wide[1:] + wide[:-1]) / 2
    at = middles.float()
    around = torch.cat([at, at.nextafter(torch.tensor(-1.0)), at.nextafter(torch.tensor(2.0)), book.values])
    numbers = torch.cat([around.repeat_interleave(7).view(-1, 7), torch.ones(len(around), 1)], 1).flatten()  # scale 1
    assert_nearest(book, numbers, block=8)


@books
def test_every_upper_half_of_a_float_has_at_most_one_boundary(bits: int, signed: bool) -> None:
    """What the table of cells stands on, over all 2^31 numbers of a sign by their 2^15 upper halves."""
    values = dynamic_map(bits, signed=signed).double()
    middles = ((values[1:] + values[:-1]) / 2).float()
    cells = middles.view(torch.int32) >> 16
    assert len(cells.unique()) == len(cells)


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_bitsandbytes_and_torchaos(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed)
    if not signed:
        assert theirs[0] == 0
        theirs[0] = 1e-7  # second moments: see test_second_moments_have_no_zero_beside_a_large_one
    assert torch.equal(dynamic_map(8, signed=signed), theirs)
    torchao = pytest.importorskip("torchao.optim.subclass_4bit")
    theirs = torchao.get_qmap_signed() if signed else torchao.get_qmap_unsigned()
    assert torch.equal(dynamic_map(4, signed=signed), torch.tensor(theirs))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_bitsandbytes_codes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(64 * 256, generator=generator) * 10 ** torch.linspace(-12, 6, 64 * 256)
    numbers = numbers if signed else numbers.square()
    book = codebook(8, signed, CPU)
    codes, scale = book.encode(numbers, 256)
    theirs, state = functional.quantize_blockwise(numbers, code=book.values, blocksize=256)
    assert torch.equal(scale, state.absmax)
    agree = codes == theirs
    # On the CPU it looks codes up by evenly spaced numbers, and misses the nearest where codes are dense.
    assert agree.float().mean() > 0.9
    shares = (numbers.view(-1, 256) * scale.reciprocal()[:, None]).flatten()
    ours_off, theirs_off = ((shares - book.values[c.long()]).abs() for c in (codes, theirs))
    assert (ours_off <= theirs_off).all()
    assert torch.equal(book.decode(theirs, state.absmax, len(numbers)), functional.dequantize_blockwise(theirs, state))


@books
@settings(max_examples=40, deadline=None)
@given(numel=st.integers(0, 70), stack=st.integers(1, 3), block=st.sampled_from([8, 24, 32]))
def test_any_size_is_stored_whole_and_nothing_reaches_into_the_next_matrix(
    bits: int, signed: bool, numel: int, stack: int, block: int
) -> None:
    book = codebook(bits, signed, CPU)
    numbers = torch.arange(1.0, 1 + stack * numel).view(stack, numel)
    codes, scale = book.encode(numbers, block)
    blocks = -(-numel // block)
    assert codes.shape == (stack, blocks * block * bits // 8) and scale.shape == (stack, blocks)
    decoded = book.decode(codes, scale, numel)
    assert decoded.shape == numbers.shape
    for row in range(stack):
        assert torch.equal(decoded[row], book.decode(*book.encode(numbers[row], block), numel))


@books
def test_more_numbers_than_a_chunk_are_coded_like_few(bits: int, signed: bool) -> None:
    book = codebook(bits, signed, CPU)
    numbers = torch.rand((1 << 18) + 100)
    codes, scale = book.encode(numbers, 64)
    for start in (0, 1 << 17, 1 << 18):
        part, its_scale = book.encode(numbers[start : start + 640], 64)
        first = start * bits // 8
        assert torch.equal(codes[first : first + len(part)], part)
        assert torch.equal(scale[start // 64 : start // 64 + len(its_scale)], its_scale)


@pytest.mark.parametrize(
    ("bits", "signed", "bad"),
    [(*book, bad) for book in BOOKS for bad in (torch.nan, torch.inf, -torch.inf) if book[1] or bad != -torch.inf],
)
def test_a_number_that_is_not_finite_spoils_its_block_and_no_other(bits: int, signed: bool, bad: float) -> None:
    book = codebook(bits, signed, CPU)
    numbers = torch.rand(48)
    clean = book.decode(*book.encode(numbers, 16), 48)
    numbers[20] = bad
    decoded = book.decode(*book.encode(numbers, 16), 48)
    assert not decoded[16:32].isfinite().any()
    assert torch.equal(decoded[:16], clean[:16]) and torch.equal(decoded[32:], clean[32:])


@books
def test_zeros_negative_zeros_and_subnormal_blocks_are_zeros(bits: int, signed: bool) -> None:
    book = codebook(bits, signed, CPU)
    for numbers in (torch.zeros(16), torch.full((16,), -0.0), torch.full((16,), 1e-39)):
        codes, scale = book.encode(numbers, 16)
        assert scale == 0 and not book.decode(codes, scale, 16).any()
    codes, scale = book.empty_state(20, 16, torch.empty(0))
    assert codes.shape == (32 * bits // 8,) and not book.decode(codes, scale, 20).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_second_moments_have_no_zero_beside_a_large_one(bits: int) -> None:
    book = codebook(bits, False, CPU)
    decoded = book.decode(*book.encode(torch.tensor([1.0, 1e-9, 0.0] + [0.0] * 5), 8), 8)
    assert (decoded > 0).all()


def test_below_zero_counts_as_zero_where_there_is_no_sign() -> None:
    for bits in (8, 4):
        book = codebook(bits, False, CPU)
        got, expected = (book.encode(torch.tensor(n), 8) for n in ([1.0, -2.0] * 4, [1.0, 0.0] * 4))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_wrong_bits_are_named() -> None:
    with pytest.raises(UsageError, match="bits=5"):
        codebook(5, True, CPU)  # type: ignore[arg-type]


class TestStochasticRounding:
    def test_the_mean_of_many_draws_is_the_number(self) -> None:
        generator = torch.Generator().manual_seed(0)
        numbers = torch.tensor([1.0 + 1 / 512, -3.7, 1e-30, 0.1, 65504.5]).repeat_interleave(20_000)
        drawn = round_stochastically(numbers, generator).float().view(5, -1)
        step = (numbers.view(5, -1)[:, 0].abs() * 2**-7).double()
        off = (drawn.double().mean(1) - numbers.view(5, -1)[:, 0].double()).abs()
        assert (off < 5 * step / 20_000**0.5).all()
        assert all(1 <= len(row.unique()) <= 2 for row in drawn)

    @settings(max_examples=100, deadline=None)
    @given(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127))
    def test_only_the_two_neighbours_are_drawn(self, number: float) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = round_stochastically(torch.full((64,), number), generator).double()
        bits = torch.tensor(number, dtype=torch.float32).view(torch.int32)
        below = (bits & ~0xFFFF).view(torch.float32).double()
        above = ((bits & ~0xFFFF) + 0x10000).view(torch.float32).double()
        assert ((drawn == below) | (drawn == above)).all()
        if number == below:
            assert (drawn == below).all()

    def test_what_is_not_finite_stays_so_and_a_seed_repeats(self) -> None:
        numbers = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.1])
        numbers = torch.cat([numbers, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
        first, again = (round_stochastically(numbers, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first[:2].float(), numbers[:2]) and first[2].isnan() and first[4].isnan()
        assert torch.equal(first.view(torch.int16), again.view(torch.int16))


KERNELS = """
import torch
from leantrain.optim import codes_triton as kernels
from leantrain.optim.codes import codebook

CPU, GENERATOR = torch.device("cpu"), torch.Generator().manual_seed(0)
for bits, block, blocks in ((8, 256, 3), (4, 128, 19), (8, 32, 70)):
    mean, square = codebook(bits, True, CPU), codebook(bits, False, CPU)
    for book in (mean, square):
        numel = blocks * block
        x = torch.randn(numel, generator=GENERATOR) * 10 ** torch.linspace(-7, 3, numel)
        x = x if book.signed else x.abs()
        x[:block], x[block + 3], x[2 * block + 1] = 1e-40, torch.nan, torch.inf
        codes, scale = book.encode(x, block)
        its_codes, its_scale = torch.zeros_like(codes), torch.zeros_like(scale)
        kernels.write(book, x, its_codes, its_scale)
        fine = scale.isfinite()
        assert torch.equal(its_codes.view(blocks, -1)[fine], codes.view(blocks, -1)[fine])
        assert torch.equal(its_scale[fine], scale[fine]) and not its_scale[~fine].isfinite().any()
        out = torch.empty(numel)
        kernels.read(book, codes, scale, out)
        assert torch.equal(out.nan_to_num(7.0), book.decode(codes, scale, numel).nan_to_num(7.0))
    for dtype in (torch.float32, torch.bfloat16):
        from leantrain.optim import Adam
        from leantrain.optim.low_bit import LowBit
        numel = blocks * block - 5
        w = torch.randn(numel, generator=GENERATOR).to(dtype)
        rule = LowBit(Adam((0.8, 0.9), 1e-3), bits, block)
        state, its = {**rule.init(w), "step": torch.tensor(0.0)}, rule.init(w)
        its_w = w.clone()
        for step in range(3):
            g = torch.randn(numel, generator=GENERATOR).to(dtype)
            rule.descend([w], [g], [state], 0.1, 0.1)
            parts = [(book, its[n], its[n + "_scale"]) for book, n in ((mean, "exp_avg"), (square, "exp_avg_sq"))]
            kernels.adamw(its_w, g, *parts, step=step + 1, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
            # The order of operations differs in the last bit, which may turn a code that lies at a boundary.
            for name in its:
                differ = its[name] != state[name]
                assert differ.float().mean() < 0.01 or its[name].is_floating_point(), (name, step)
            torch.testing.assert_close(its_w.float(), w.float(), rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
            for name, value in its.items():
                value.copy_(state[name])
            its_w.copy_(w)
print("equal")
"""


def test_triton_kernels_equal_the_code_books_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    # The interpreter is chosen when a kernel is defined, so before anything of this process has imported it.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", KERNELS], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0 and "equal" in run.stdout, run.stderr[-3000:]
