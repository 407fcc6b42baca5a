"""How few bits do many symbols of a small alphabet take, if no symbol is to be searched for?

Mixed radix: `group` symbols, each one of L, are the digits of one integer, the first the lowest; that word
takes `bits` bits. Words follow each other without gaps, lowest bit first; the last word is filled with zeros,
and so is the last byte.

    alphabet                  L     group  bits  bits a symbol  log2(L)
    lbw 2 bits                3     5      8     1.600          1.585
    lbw 3                     5     3      7     2.333          2.322
    lbw 4                     9     5      16    3.200          3.170
    lbw 5                     17    11     45    4.091          4.087
    lbw 6                     33    12     61    5.083          5.044
    all others, b bits        2^b   1      b     b              b
    symmetric uniform         2^b-1 1      b     b              a little less
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lbdet.quant.lbw import RADIX_PACKING, magnitudes

_WORDS = 1 << 15  # that are worked on at once: temporaries that stay in a core's cache; a multiple of 8

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Radix:
    """`group` symbols of 0 .. `symbols` - 1 are the digits of one word of `bits` bits, at most 64."""

    symbols: int
    group: int
    bits: int

    def size(self, count: int) -> int:
        """Return how many bytes `count` symbols take."""
        return -(-(-(-count // self.group) * self.bits) // 8)


def radix_of(format: str, bits: int, symmetric: bool) -> Radix:
    """Return how the codes of a number format are packed.

    Args:
        format: a name of `lbdet.nn.FORMATS`.
        bits: one of its widths.
        symmetric: counts for "uniform", which then leaves one code out.

    >>> radix_of("lbw", 4, True)
    Radix(symbols=9, group=5, bits=16)
    """
    if format == "lbw":
        return Radix(2 * magnitudes(bits) + 1, *RADIX_PACKING[bits])
    return Radix((1 << bits) - (format == "uniform" and symmetric), 1, bits)


def pack(symbols: Bytes, radix: Radix) -> Bytes:
    """Pack symbols into words.

    Args:
        symbols: `[N]`, each less than `radix.symbols`.

    Returns:
        `[radix.size(N)]`, a new array.

    Raises:
        ValueError: a symbol that the alphabet does not have.

    >>> pack(np.array([1, 2, 0, 0, 0, 2], np.uint8), Radix(3, 5, 8)).tolist()
    [7, 2]
    """
    if symbols.size and int(symbols.max()) >= radix.symbols:
        raise ValueError(f"symbols must be less than {radix.symbols}, got {int(symbols.max())}")
    step = _WORDS * radix.group
    parts = [_pack(symbols[i : i + step], radix) for i in range(0, len(symbols), step)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack(packed: Bytes, count: int, radix: Radix) -> Bytes:
    """Return the `count` symbols that were packed, a new array.

    Every bit is looked at: no two arrays of bytes give the same symbols.

    Raises:
        ValueError: not `radix.size(count)` bytes, a word that is no group, or bits behind the last.
    """
    if len(packed) != radix.size(count):
        raise ValueError(f"{count} symbols must take {radix.size(count)} bytes, got {len(packed)}")
    step = _WORDS // 8 * radix.bits
    words = -(-count // radix.group)
    symbols = np.empty((words, radix.group), np.uint8)
    for i, start in enumerate(range(0, len(packed), step)):
        _unpack(packed[start : start + step], radix, symbols[i * _WORDS : (i + 1) * _WORDS])
    flat = symbols.reshape(-1)
    if flat[count:].any():
        raise ValueError("the last word must be filled with zeros, got other symbols")
    return flat[:count]


def _word_type(radix: Radix) -> type[np.unsignedinteger]:
    return np.uint32 if radix.bits <= 32 else np.uint64


def _pack(symbols: Bytes, radix: Radix) -> Bytes:
    """Pack whole groups, or the last ones."""
    missing = -len(symbols) % radix.group
    digits = np.pad(symbols, (0, missing)).reshape(-1, radix.group)
    words = digits[:, -1].astype(_word_type(radix))
    for i in reversed(range(radix.group - 1)):
        words = words * radix.symbols + digits[:, i]
    return _to_bytes(words, radix.bits)


def _unpack(packed: Bytes, radix: Radix, out: Bytes) -> None:
    """Fill `out` `[W, group]` with the digits of W words."""
    words = _from_bytes(packed, radix.bits, len(out)).view(_word_type(radix)).reshape(-1)
    largest = radix.symbols**radix.group - 1
    if int(words.max()) > largest:
        raise ValueError(f"a word of {radix.group} symbols must be at most {largest}, got {int(words.max())}")
    for i in range(radix.group):
        rest = words // radix.symbols
        out[:, i] = words - rest * radix.symbols
        words = rest


def _to_bytes(words: NDArray[np.unsignedinteger], bits: int) -> Bytes:
    """Write the lowest `bits` bits of each word, one after the other."""
    octets = words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(len(words), -1)
    if bits % 8 == 0:
        return octets[:, : bits // 8].reshape(-1)
    return np.packbits(np.unpackbits(octets, axis=1, count=bits, bitorder="little"), bitorder="little")


def _from_bytes(packed: Bytes, bits: int, words: int) -> Bytes:
    """Return the words as `[W, 4 or 8]` little-endian bytes; W is `words`."""
    octets = np.zeros((words, 4 if bits <= 32 else 8), np.uint8)
    if bits % 8 == 0:
        octets[:, : bits // 8] = packed.reshape(words, -1)
        return octets
    flags = np.unpackbits(packed, bitorder="little")
    if flags[words * bits :].any():
        raise ValueError("the last byte must be filled with zeros, got other bits")
    octets[:, : -(-bits // 8)] = np.packbits(
        flags[: words * bits].reshape(words, bits), axis=1, bitorder="little"
    )
    return octets
