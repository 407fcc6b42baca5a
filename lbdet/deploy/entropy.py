"""How small do the codes get when frequent ones take fewer bits?

Radix packing gives every symbol of an alphabet the same room. An entropy coder comes down to the zeroth-order
entropy, sum of -log2 p(symbol), with p the share of each symbol in its layer. Here asymmetric numeral systems
(ANS), by the library `constriction` (`lbdet[deploy]`).

    codes of Gaussian weights    bits a weight, 2 .. 6 bits
    radix packing                1.600  2.333  3.200  4.091  5.083
    entropy, and ANS             1.577  2.042  3.106  3.495  3.551
    zstandard, level 19          1.628  2.132  3.138  3.550  3.605

Why not zstandard: its Huffman codes are whole bits long, so ternary codes get larger than their radix
packing; only its highest level is near the entropy, and slow. Weights repeat no patterns that it could match.

A stream is the coder's words, little endian. The frequencies are whole numbers, so that every machine
computes with the same probabilities.

Reference: Duda 2013, "Asymmetric numeral systems", arXiv 1311.2540.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lbdet.convert import quantized_layers
from lbdet.deploy.header import PackedLayer
from lbdet.deploy.radix import Bytes
from lbdet.deploy.stored import described, radix
from lbdet.errors import UserError
from lbdet.nn import Quantized

TOTAL = (1 << 15) - 1
"""what the frequencies of a layer add up to, the largest int16"""
MAX_SYMBOLS_A_BYTE = 32
"""A stream stands for at most so many symbols a byte: what a file unpacks to is bounded by its size."""

Frequencies = NDArray[np.int16]


@dataclass(frozen=True)
class CodeSize:
    """What the codes of a layer take, in bytes, without scales."""

    name: str
    weights: int
    entropy: float
    """the zeroth-order entropy of its symbols"""
    radix: int
    ans: int
    """with the frequencies; the radix packing where that is not larger"""


def encode(symbols: Bytes, alphabet: int) -> tuple[Bytes, Frequencies]:
    """Return the stream `[M]` and the frequencies `[alphabet]` of some symbols `[N]`.

    Raises:
        UserError: `constriction` is not installed.
    """
    frequencies = _frequencies(np.bincount(symbols, minlength=alphabet))
    coder, model = _coder(), _model(frequencies)
    coder.encode_reverse(symbols.astype(np.int32), model)
    return coder.get_compressed().astype("<u4").view(np.uint8), frequencies


def decode(stream: Bytes, frequencies: Frequencies, count: int) -> Bytes:
    """Return the `count` symbols of a stream, a new array.

    Raises:
        ValueError: a stream or frequencies that `encode` does not make. Nothing is allocated before that.
        UserError: `constriction` is not installed.
    """
    if count > MAX_SYMBOLS_A_BYTE * len(stream) or len(stream) % 4:
        raise ValueError(
            f"{count} symbols must take at least 1/{MAX_SYMBOLS_A_BYTE} byte each in whole words"
        )
    if int(frequencies.min()) < 0 or int(frequencies.sum(dtype=np.int64)) != TOTAL:
        raise ValueError(f"frequencies must be whole numbers that add up to {TOTAL}")
    coder = _coder(stream.view("<u4").astype(np.uint32))
    symbols = coder.decode(_model(frequencies), count).astype(np.uint8)
    if not coder.is_empty():
        raise ValueError(f"{count} symbols must use up the stream, got some more of it")
    return symbols


def pays(symbols: int, stream: int, alphabet: int, packed: int) -> bool:
    """Return whether a stream of so many bytes is to be preferred to the radix packing, in bytes."""
    return stream + 2 * alphabet < packed and symbols <= MAX_SYMBOLS_A_BYTE * stream


def zeroth_order_entropy(symbols: Bytes) -> float:
    """Return the sum over all symbols of -log2 of their share, in bits."""
    counts = np.bincount(symbols).astype(np.float64)
    counts = counts[counts > 0]
    return float((counts * -np.log2(counts / counts.sum())).sum())


@torch.no_grad()
def code_sizes(model: nn.Module) -> list[CodeSize]:
    """Measure what the codes of every quantized layer take at its present width.

    Raises:
        UserError: `constriction` is not installed.
    """
    return [
        _code_size(described(name, layer), layer.weight_quantizer.quantize(layer.weight, bits))
        for name, layer in quantized_layers(model).items()
        if (bits := layer.precision.weight_bits) is not None
    ]


def size_summary(sizes: Iterable[CodeSize]) -> str:
    """Return a line: bytes and bits a weight of entropy, ANS and radix packing."""
    sizes = list(sizes)
    weights = sum(size.weights for size in sizes)
    totals = {
        "entropy": math.ceil(sum(size.entropy for size in sizes)),
        "ans": sum(size.ans for size in sizes),
        "radix": sum(size.radix for size in sizes),
    }
    parts = [f"{name} {size} bytes ({8 * size / max(weights, 1):.3f} bits)" for name, size in totals.items()]
    return f"codes of {weights} weights: {', '.join(parts)}"


def _code_size(layer: PackedLayer, quantized: Quantized) -> CodeSize:
    symbols = quantized.level_index.flatten().to(torch.uint8).cpu().numpy()
    alphabet, packed = radix(layer).symbols, radix(layer).size(len(symbols))
    stream = len(encode(symbols, alphabet)[0])
    ans = stream + 2 * alphabet if pays(len(symbols), stream, alphabet, packed) else packed
    return CodeSize(layer.name, len(symbols), zeroth_order_entropy(symbols) / 8, packed, ans)


def _frequencies(counts: NDArray[np.int64]) -> Frequencies:
    """Scale counts to `TOTAL`; what occurs gets at least 1, and what is left over goes to the largest."""
    occurs = (counts > 0).astype(np.int64)
    scaled = occurs + counts * (TOTAL - occurs.sum()) // max(counts.sum(), 1)
    scaled[scaled.argmax()] += TOTAL - scaled.sum()
    return scaled.astype(np.int16)


def _model(frequencies: Frequencies) -> Any:
    probabilities = frequencies.astype(np.float64) / TOTAL
    return _constriction().stream.model.Categorical(probabilities, perfect=False)


def _coder(*words: NDArray[np.uint32]) -> Any:
    return _constriction().stream.stack.AnsCoder(*words)


def _constriction() -> Any:
    try:
        return import_module("constriction")
    except ImportError:
        raise UserError(
            "entropy coding: needs the library constriction, got none; install it with pip install "
            "-e '.[deploy]', or pack with radix packing"
        ) from None
