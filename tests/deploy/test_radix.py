"""Radix packing against arithmetic on Python's unbounded integers."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbdet.deploy.radix import Radix, pack, radix_of, unpack
from lbdet.nn import FORMATS, LbwWeight, UniformWeight
from lbdet.quant.lbw import RADIX_PACKING

KINDS = [
    (name, bits, symmetric)
    for name, found in FORMATS.items()
    for bits in (found.weight.widths if found.weight else ())
    for symmetric in ((True, False) if name == "uniform" else (True,))
]
RADICES = sorted({radix_of(*kind) for kind in KINDS}, key=lambda r: (r.symbols, r.bits))


def pack_by_integers(symbols: list[int], radix: Radix) -> bytes:
    """Add digits times powers, shift words into one huge integer, and write that out."""
    total, words = 0, -(-len(symbols) // radix.group)
    for w in range(words):
        digits = symbols[w * radix.group : (w + 1) * radix.group]
        word = sum(digit * radix.symbols**i for i, digit in enumerate(digits))
        total |= word << (w * radix.bits)
    return total.to_bytes(-(-words * radix.bits // 8), "little")


def some_symbols(count: int, radix: Radix, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, radix.symbols, count, dtype=np.uint8)


@st.composite
def radices(draw: st.DrawFn) -> Radix:
    symbols = draw(st.integers(1, 256))
    largest = 1
    while symbols > 1 and symbols ** (largest + 1) <= 2**64:
        largest += 1
    group = draw(st.integers(1, largest if symbols > 1 else 12))
    fewest = max(1, (symbols**group - 1).bit_length())
    return Radix(symbols, group, draw(st.integers(fewest, 64)))


@settings(max_examples=100, deadline=None)
@given(radices(), st.data())
def test_any_alphabet_in_any_group_is_packed_as_integers_are_and_comes_back(radix, data) -> None:
    symbols = data.draw(st.lists(st.integers(0, radix.symbols - 1), max_size=70))
    packed = pack(np.array(symbols, np.uint8), radix)
    assert packed.tobytes() == pack_by_integers(symbols, radix)
    assert unpack(packed, len(symbols), radix).tolist() == symbols


@pytest.mark.parametrize("radix", RADICES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 11, 12, 13, 95, 96, 97, 1000])
def test_the_codes_of_every_format_and_width_come_back(radix: Radix, count: int) -> None:
    symbols = some_symbols(count, radix)
    packed = pack(symbols, radix)
    assert packed.tobytes() == pack_by_integers(symbols.tolist(), radix)
    assert len(packed) == radix.size(count)
    assert np.array_equal(unpack(packed, count, radix), symbols)


@pytest.mark.parametrize("radix", RADICES, ids=str)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_long_arrays_are_cut_into_parts_without_a_trace(radix: Radix, extra: int) -> None:
    count = 2 * radix.group * (1 << 15) + extra
    symbols = some_symbols(count, radix)
    packed = pack(symbols, radix)
    part = 8 * radix.group * 1000  # a whole number of bytes
    assert packed.tobytes().startswith(pack(symbols[:part], radix).tobytes())
    assert np.array_equal(unpack(packed, count, radix), symbols)


@pytest.mark.parametrize("bits", RADIX_PACKING)
def test_lbw_takes_what_its_quantizer_and_the_table_say(bits: int) -> None:
    radix = radix_of("lbw", bits, True)
    assert (radix.group, radix.bits) == RADIX_PACKING[bits]
    assert radix.symbols == 2 ** (bits - 1) + 1
    codes = LbwWeight().stored_bits(torch.zeros(4, 60), bits) - 8 * 4
    assert radix.size(240) == -(-codes // 8)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_symmetric_uniform_alphabet_leaves_one_code_out(symmetric: bool) -> None:
    radix = radix_of("uniform", 4, symmetric)
    assert radix == Radix(15 if symmetric else 16, 1, 4)
    weight = torch.zeros(4, 60)
    per_scale = 32 if symmetric else 40
    assert UniformWeight(symmetric=symmetric).stored_bits(weight, 4) == 240 * 4 + 4 * per_scale


@pytest.mark.parametrize("radix", [r for r in RADICES if r.symbols**r.group < 2**r.bits], ids=str)
def test_a_word_that_is_no_group_of_symbols_is_refused(radix: Radix) -> None:
    largest = radix.symbols**radix.group - 1
    count, size = 8 * radix.group, radix.bits
    for word in (largest + 1, 2**radix.bits - 1):
        packed = np.frombuffer((word << (3 * radix.bits)).to_bytes(size, "little"), np.uint8)
        with pytest.raises(ValueError, match=f"must be at most {largest}, got {word}"):
            unpack(packed, count, radix)
    packed = np.frombuffer((largest << (3 * radix.bits)).to_bytes(size, "little"), np.uint8)
    assert unpack(packed, count, radix).sum() == radix.group * (radix.symbols - 1)


@pytest.mark.parametrize("radix", [Radix(9, 5, 16), Radix(33, 12, 61), Radix(5, 3, 7)], ids=str)
def test_symbols_behind_the_last_are_refused(radix: Radix) -> None:
    packed = pack(np.array([0, 1], np.uint8), radix)
    with pytest.raises(ValueError, match="the last word must be filled with zeros, got other symbols"):
        unpack(packed, 1, radix)


@pytest.mark.parametrize("radix", [Radix(5, 3, 7), Radix(33, 12, 61), Radix(2, 1, 1)], ids=str)
def test_bits_behind_the_last_word_are_refused(radix: Radix) -> None:
    packed = pack(np.zeros(1, np.uint8), radix)
    packed[-1] |= 128
    with pytest.raises(ValueError, match="the last byte must be filled with zeros, got other bits"):
        unpack(packed, 1, radix)


@pytest.mark.parametrize("radix", RADICES, ids=str)
@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_bytes_is_refused(radix: Radix, change: int) -> None:
    count = 8 * radix.group
    with pytest.raises(
        ValueError, match=f"must take {radix.size(count)} bytes, got {radix.size(count) + change}"
    ):
        unpack(np.zeros(radix.size(count) + change, np.uint8), count, radix)


def test_a_symbol_that_the_alphabet_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="symbols must be less than 9, got 9"):
        pack(np.array([8, 9], np.uint8), Radix(9, 5, 16))


def test_strides_do_not_matter_and_the_input_stays() -> None:
    symbols = some_symbols(202, Radix(9, 5, 16))
    before = symbols.copy()
    packed = pack(symbols[::-2], Radix(9, 5, 16))
    assert np.array_equal(unpack(packed, 101, Radix(9, 5, 16)), symbols[::-2])
    assert np.array_equal(symbols, before)
    kept = packed.copy()
    unpack(packed, 101, Radix(9, 5, 16))[:] = 0
    assert np.array_equal(packed, kept)


@pytest.mark.slow
@pytest.mark.parametrize("radix", [Radix(9, 5, 16), Radix(5, 3, 7), Radix(15, 1, 4)], ids=str)
def test_the_weights_of_a_large_detector_take_less_than_two_seconds(radix: Radix) -> None:
    symbols = some_symbols(26_000_000, radix)
    start = time.process_time()
    packed = pack(symbols, radix)
    middle = time.process_time()
    assert np.array_equal(unpack(packed, len(symbols), radix), symbols)
    assert middle - start < 2
    assert time.process_time() - middle < 2
