"""Integers as few bytes: coded by their own histogram, as short as its entropy.

    q        =  low + 2^shift * high + rest              rest: `shift` bits that are stored as they are
    bytes    ~  n H(high) / 8 + n shift / 8 + table      H: entropy of the histogram of `high`, bits

The decoder is sent the exact counts of the histogram, so its sum is checked and no table is ever rounded: a table of
floating-point probabilities may differ by one unit between two machines, which silently ruins everything behind it.
`shift` is 0 for what comes out of a quantiser; it is chosen by counting bytes, and grows where a table would cost more
than it saves: in a tensor of ten numbers, or in random bytes. Of the two coders of `symbol_coders`, the fast one writes
what it can within 2 % of the entropy, the other one the rest. Symbols are coded in chunks with a checksum each, of what
they say and not of how it is written, so that a decoder that reads them otherwise is noticed too.

    bytes   0-3  4      5      6            7-8       9-
            low  shift  coder  log2(chunk)  symbols   table: gap and count of each symbol in turn, 7 bits a byte
                                                      rest: its whole bytes, then its bits, plane by plane
                                                      chunks: bytes, CRC-32, code              all little-endian

Source: Øland & Raj 2015 (ICASSP) for coding what workers exchange; the format is this package's own.
"""

from __future__ import annotations

import struct
import zlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from leantrain.errors import UsageError
from leantrain.exchange.codecs.symbol_coders import Ans, Array, Huffman, has_constriction
from leantrain.exchange.packet import PacketError
from leantrain.histogram import bits_per_symbol

Bytes: TypeAlias = npt.NDArray[np.uint8]

MOST_NUMBERS = 2**31 - 1

TOLERATED = 1.02
"""What a Huffman code may cost, in units of the entropy, before the slower and shorter code is taken."""

_HEADER = struct.Struct("<iBBBH")
_CHUNK = struct.Struct("<II")
_LOG2_CHUNK, _LOG2_LONGEST_CHUNK = 16, 22
_CODERS = (Ans, Huffman)


def encode_integers(values: Array) -> bytes:
    """The integers, int32 [n], as bytes. Exact for every input.

    Histograms span 2^16 values at most: of integers that lie further apart, the lowest bits are stored as they are.

    Raises:
        UsageError: there are more than MOST_NUMBERS.
    """
    n = len(values)
    if n > MOST_NUMBERS:
        raise UsageError(f"at most {MOST_NUMBERS} integers go into one packet, got {n}")
    if n == 0:
        return b""
    low = int(values.min())
    wide = int(values.max()) - low >= 2**31
    offsets = values.astype(np.int64) - low if wide else values - np.int32(low)
    shift, counts = _cheapest_shift(offsets)
    present = np.flatnonzero(counts)
    counts = counts[present]
    index = np.zeros(int(present[-1]) + 1, np.int32)
    index[present] = np.arange(len(present), dtype=np.int32)
    coder, log2_chunk, chunks = _write_chunks(index.take(offsets >> shift if shift else offsets), counts)
    return b"".join([
        _HEADER.pack(low, shift, coder, log2_chunk, len(present)),
        _write_table(present, counts),
        _write_rest(offsets, shift),
        *chunks,
    ])  # fmt: skip


def decode_integers(data: Bytes, n: int) -> Array:
    """The `n` integers that `encode_integers` was given.

    Args:
        data: uint8 [bytes]; all of it.

    Raises:
        PacketError: the bytes contradict themselves or do not hold `n` integers.
    """
    if n == 0 or len(data) < _HEADER.size:
        if n == 0 and len(data) == 0:
            return np.zeros(0, np.int32)
        raise PacketError(f"{n} coded integers cannot have {len(data)} bytes")
    low, shift, coder, log2_chunk, symbols = _HEADER.unpack(data[: _HEADER.size].tobytes())
    if coder >= len(_CODERS) or not (1 <= symbols <= _CODERS[coder].most_symbols and shift <= 32):
        raise PacketError(f"coded integers cannot have {symbols} symbols, {shift} bits of rest and coder {coder}")
    if not _LOG2_CHUNK <= log2_chunk <= _LOG2_LONGEST_CHUNK:
        raise PacketError(f"coded integers cannot have chunks of 2^{log2_chunk}")
    present, counts, data = _read_table(data[_HEADER.size :], symbols)
    if n > MOST_NUMBERS or int(counts.sum()) != n:
        raise PacketError(f"a histogram counts {int(counts.sum())} integers, and {n} are expected")
    if low + (int(present[-1]) << shift) >= 2**31:
        raise PacketError(f"coded integers reach beyond 32 bits: {low} + {int(present[-1])} * 2^{shift}")
    rest, data = _read_rest(data, shift, n)
    symbol = _read_chunks(data, _CODERS[coder], counts, n, 1 << log2_chunk)
    values = (low + (present << shift)).astype(np.int32).take(symbol)
    return values if rest is None else (values + rest).astype(np.int32, copy=False)


def _cheapest_shift(offsets: npt.NDArray[np.integer]) -> tuple[int, npt.NDArray[np.int64]]:
    """How many low bits to store as they are, and the histogram of what is above them."""
    n, width = len(offsets), int(offsets.max()).bit_length()
    first = max(0, width - 16)
    counts = np.bincount(offsets >> first if first else offsets)
    most = (Ans if has_constriction() else Huffman).most_symbols
    best: tuple[float, int, npt.NDArray[np.int64]] | None = None
    for shift in range(first, width + 1):
        if np.count_nonzero(counts) <= most:
            cost = n * (shift + bits_per_symbol(counts)) + 8 * _table_bytes(counts)
            if best is None or cost < best[0]:
                best = cost, shift, counts
        counts = np.pad(counts, (0, len(counts) % 2)).reshape(-1, 2).sum(1)
    assert best is not None  # one symbol is left in the end
    return best[1], best[2]


def _log2_chunk(counts: npt.NDArray[np.int64]) -> int:
    """Chunks of 64 k symbols; longer ones below one bit a symbol, or the frames would cost as much as the symbols."""
    bits = max(bits_per_symbol(counts), 2.0 ** (_LOG2_CHUNK - _LOG2_LONGEST_CHUNK))
    return _LOG2_CHUNK + max(0, int(np.ceil(-np.log2(bits))))


def _write_chunks(symbols: Array, counts: npt.NDArray[np.int64]) -> tuple[int, int, list[bytes]]:
    """Number of the coder, log2 of the chunks' length, chunks."""
    log2_chunk = _log2_chunk(counts)
    if len(counts) == 1:
        return _CODERS.index(Ans), log2_chunk, []
    if len(counts) <= Huffman.most_symbols:
        chunks = _chunks(Huffman(counts), symbols, 1 << log2_chunk)
        allowed = TOLERATED * len(symbols) * bits_per_symbol(counts) / 8 + _CHUNK.size * len(chunks)
        if sum(map(len, chunks)) <= allowed or not has_constriction():
            return _CODERS.index(Huffman), log2_chunk, chunks
    return _CODERS.index(Ans), log2_chunk, _chunks(Ans(counts), symbols, 1 << log2_chunk)


def _chunks(coder: Ans | Huffman, symbols: Array, size: int) -> list[bytes]:
    chunks = []
    for start in range(0, len(symbols), size):
        piece = symbols[start : start + size]
        code = coder.encode(piece)
        chunks.append(_CHUNK.pack(len(code), _checksum(piece)) + code)
    return chunks


def _read_chunks(data: Bytes, coder: type[Ans | Huffman], counts: npt.NDArray[np.int64], n: int, size: int) -> Array:
    if len(counts) == 1:
        _must_be_all(data)
        return np.zeros(n, np.int32)
    decoder = coder(counts)
    symbols = np.empty(n, np.int32)
    for start in range(0, n, size):
        name = f"chunk {start // size + 1} of {-(-n // size)}"
        if len(data) < _CHUNK.size:
            raise PacketError(f"{name} of coded integers is missing")
        length, crc = _CHUNK.unpack(data[: _CHUNK.size].tobytes())
        end = _CHUNK.size + length
        if end > len(data):
            raise PacketError(f"{name} of coded integers is cut off: {len(data)} of {end} bytes are there")
        piece = symbols[start : start + size]
        try:
            piece[:] = decoder.decode(data[_CHUNK.size : end].tobytes(), len(piece))
        except PacketError as error:
            raise PacketError(f"{name} of coded integers is damaged: {error}") from error
        if _checksum(piece) != crc:
            raise PacketError(f"{name} of coded integers is damaged, or was coded by an incompatible version")
        data = data[end:]
    _must_be_all(data)
    return symbols


def _write_table(present: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> bytes:
    """Gaps between symbols and counts, in turn; the first symbol is always 0."""
    entries = np.stack([np.diff(present, prepend=-1) - 1, counts - 1], 1).reshape(-1)
    lengths = _varint_bytes(entries)
    starts = np.cumsum(lengths) - lengths
    table = np.zeros(int(lengths.sum()), np.uint8)
    for place in range(int(lengths.max())):
        has = lengths > place
        more = np.where(lengths[has] > place + 1, 128, 0)
        table[starts[has] + place] = (entries[has] >> (7 * place) & 127) | more
    return table.tobytes()


def _read_table(data: Bytes, symbols: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Bytes]:
    """Symbols and their counts, both [symbols], and what follows the table."""
    longest = 5  # bytes of a number below 2^35
    ends = np.flatnonzero(data[: 2 * symbols * longest] < 128)[: 2 * symbols]
    if len(ends) < 2 * symbols:
        raise PacketError(f"a histogram of {symbols} symbols is cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if int(lengths.max()) > longest:
        raise PacketError("a histogram has an entry of more than 35 bits")
    entries = np.zeros(2 * symbols, np.int64)
    for place in range(longest):
        has = lengths > place
        entries[has] |= (data[starts[has] + place].astype(np.int64) & 127) << (7 * place)
    present = np.cumsum(entries[0::2] + 1) - 1
    if int(present[-1]) >= 2**16 + 1:
        raise PacketError(f"a histogram has symbol {int(present[-1])}, and at most {2**16} are possible")
    return present, entries[1::2] + 1, data[int(ends[-1]) + 1 :]


def _write_rest(offsets: npt.NDArray[np.integer], shift: int) -> bytes:
    whole, bits = divmod(shift, 8)
    pieces = [(offsets >> (8 * place)).astype(np.uint8).tobytes() for place in range(whole)]
    if bits:
        planes = np.stack([offsets >> bit & 1 for bit in range(8 * whole, shift)])
        pieces.append(np.packbits(planes.astype(bool)).tobytes())
    return b"".join(pieces)


def _read_rest(data: Bytes, shift: int, n: int) -> tuple[npt.NDArray[np.integer] | None, Bytes]:
    whole, bits = divmod(shift, 8)
    size = n * whole + -(-n * bits // 8)
    if size > len(data):
        raise PacketError(f"{n} integers have {size} bytes of rest, and {len(data)} are there")
    if not shift:
        return None, data
    wide = np.int32 if shift < 31 else np.int64
    rest = np.zeros(n, wide)
    for place in range(whole):
        rest |= data[n * place : n * (place + 1)].astype(wide) << (8 * place)
    planes = np.unpackbits(data[n * whole : size], count=n * bits).reshape(bits, n)
    for bit, plane in enumerate(planes, start=8 * whole):
        rest |= plane.astype(wide) << bit
    return rest, data[size:]


def _table_bytes(counts: npt.NDArray[np.int64]) -> int:
    present = np.flatnonzero(counts)
    return int(_varint_bytes(np.diff(present, prepend=-1) - 1).sum() + _varint_bytes(counts[present] - 1).sum())


def _varint_bytes(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return 1 + np.searchsorted([2**7, 2**14, 2**21, 2**28], values, side="right")


def _checksum(symbols: Array) -> int:
    return zlib.crc32(symbols.astype("<i4", copy=False).data)


def _must_be_all(data: Bytes) -> None:
    if len(data):
        raise PacketError(f"coded integers are followed by {len(data)} bytes that belong to nothing")
