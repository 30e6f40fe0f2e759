"""Two ways to write symbols 0 .. A - 1 of a known histogram as bytes: one shorter, one faster.

    Huffman     as many symbols as fit are one byte (A^k <= 256), and bytes get Huffman codes: within 2 % of the entropy
                from about 1 bit a symbol up, where single symbols would cost a whole bit; several times faster to read
    Ans         asymmetric numeral systems: within 0.1 % of any entropy; for A <= 4096

Huffman codes are zlib's, which every Python has, with its search for repetitions off. Numeral systems are those of the
package `constriction` (Bamler 2022). Both are exact; neither sends or uses a probability that was rounded.

Sources: Huffman 1952; Duda 2013 (asymmetric numeral systems).
"""

from __future__ import annotations

import functools
import zlib
from types import ModuleType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from leantrain.errors import UsageError
from leantrain.exchange.packet import PacketError

Array: TypeAlias = npt.NDArray[np.int32]

_WORDS = np.dtype("<u4")
_RAW_DEFLATE = -15


class Ans:
    """Asymmetric numeral systems.

    Args:
        counts: int64 [A], how often each symbol occurs.

    Raises:
        UsageError: the package `constriction` is missing.
    """

    most_symbols = 4096
    """More make the coder slow."""

    def __init__(self, counts: npt.NDArray[np.int64]) -> None:
        self._package = constriction()
        # Whole numbers below 2^53, whose sums are exact in any order: every machine makes the same table of them.
        self._model = self._package.stream.model.Categorical(counts.astype(np.float64), perfect=False)

    def encode(self, symbols: Array) -> bytes:
        """The code of int32 [n]."""
        ans = self._package.stream.stack.AnsCoder()
        ans.encode_reverse(symbols, self._model)
        return ans.get_compressed().astype(_WORDS).tobytes()

    def decode(self, code: bytes, n: int) -> Array:
        """The `n` symbols.

        Raises:
            PacketError: the code is not one of `n` symbols.
        """
        if len(code) % _WORDS.itemsize:
            raise PacketError(f"{len(code)} bytes are no whole words")
        try:
            ans = self._package.stream.stack.AnsCoder(np.frombuffer(code, _WORDS).astype(np.uint32))
        except ValueError as error:
            raise PacketError(str(error)) from error
        symbols: Array = ans.decode(self._model, n)
        if not ans.is_empty():
            raise PacketError(f"something is left after {n} symbols")
        return symbols


class Huffman:
    """Huffman codes of bytes that hold several symbols each.

    Args:
        counts: [A]; only A matters.
    """

    most_symbols = 256

    def __init__(self, counts: npt.NDArray[np.int64]) -> None:
        self._symbols = len(counts)
        self.group = max(k for k in range(1, 9) if self._symbols**k <= 256)
        """Symbols in a byte."""

    def encode(self, symbols: Array) -> bytes:
        """The code of int32 [n]."""
        padded = np.zeros((-(-len(symbols) // self.group), self.group), np.uint8)
        padded.reshape(-1)[: len(symbols)] = symbols
        packed = padded[:, 0].copy()
        for place in range(1, self.group):
            packed *= np.uint8(self._symbols)
            packed += padded[:, place]
        coder = zlib.compressobj(1, zlib.DEFLATED, _RAW_DEFLATE, zlib.MAX_WBITS - 6, zlib.Z_HUFFMAN_ONLY)
        return coder.compress(packed.data) + coder.flush()

    def decode(self, code: bytes, n: int) -> Array:
        """The `n` symbols.

        Raises:
            PacketError: the code is not one of `n` symbols.
        """
        size = -(-n // self.group)
        coder = zlib.decompressobj(_RAW_DEFLATE)
        try:
            packed = np.frombuffer(coder.decompress(code, size + 1), np.uint8)
        except zlib.error as error:
            raise PacketError(str(error)) from error
        if len(packed) != size or not coder.eof or coder.unused_data:
            raise PacketError(f"{len(packed)} bytes instead of {size} came out of it, or something is left")
        digits = np.empty((256, self.group), np.int32)
        rest = np.arange(256, dtype=np.int32)
        for place in reversed(range(self.group)):
            rest, digits[:, place] = np.divmod(rest, self._symbols)
        return digits.take(packed, axis=0).reshape(-1)[:n]


@functools.cache
def constriction() -> ModuleType:
    """The package.

    Raises:
        UsageError: it is missing.
    """
    try:
        import constriction as package
    except ImportError as error:
        raise UsageError("entropy coding needs the package constriction: pip install 'leantrain[entropy]'") from error
    return package


def has_constriction() -> bool:
    """Whether the package is there."""
    try:
        constriction()
    except UsageError:
        return False
    return True
