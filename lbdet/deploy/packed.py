"""A low-bit model as a file of its true size, certified bit for bit: what the file holds, and how it is read.

The file is safetensors (see `container`) with a header of text (`header`) and these tensors:

    <layer>.codes                  U8        the symbols of a quantized weight, packed (`radix`, `entropy`)
    packed.exponents, .scales,     I8, F32,  what symbols and inputs stand for (`stored`), each joined over
      .zero_points, .levels, ...   I16       all layers in the header's order
    packed.digests                 U8        `[T, 32]`: SHA-256 of every tensor of the model, sorted by name
    packed.sha256                  U8        of all bytes before it
    any other name                 any       the state dict's own: float layers, biases, batch norm

A digest is that of the JSON list [name, dtype, shape] (UTF-8, no spaces) followed by the values that are
computed with, so of a quantized weight's float32 values. Whoever reads the file, with whatever code on
whatever machine, can show that these are the weights that were evaluated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lbdet.deploy import container, entropy
from lbdet.deploy.container import NAMES, RESERVED
from lbdet.deploy.header import Header, PackedLayer, from_metadata
from lbdet.deploy.radix import unpack
from lbdet.deploy.stored import VECTORS, Stored, dequantize, radix, vector_sizes
from lbdet.errors import UserError

DIGESTS = RESERVED + "digests"


@dataclass(frozen=True)
class PackedInput:
    """How a layer rounds its input."""

    format: str
    """a name of `lbdet.nn.FORMATS` that has activations"""
    bits: int
    scale: float | None = None
    """uniform: value = scale * code, a float32"""
    low: int | None = None
    """uniform: the lowest code, never positive; the highest is low + 2^bits - 1"""
    clip: float | None = None
    """dorefa: the largest value, a float32"""


@dataclass(frozen=True)
class Packed:
    """A file that is whole, and every tensor in it of the size that the header tells; values are unseen."""

    source: Path
    header: Header
    tensors: Mapping[str, Tensor]
    vectors: Mapping[str, Mapping[str, Tensor]]
    """layer -> its part of the joined tensors, see `stored.VECTORS`"""

    def stored(self, name: str) -> Stored:
        """Return symbols and vectors of a quantized weight.

        Raises:
            UserError: the codes are no symbols.
        """
        layer, codes = self.header.layers[name], self.tensors[codes_of(name)].numpy()
        count, vectors = math.prod(layer.shape), self.vectors[name]
        try:
            if layer.coder == "ans":
                symbols = entropy.decode(codes, vectors["frequencies"].numpy(), count)
            else:
                symbols = unpack(codes, count, radix(layer))
        except ValueError as error:
            raise UserError(f"{self.source}: codes of {name!a}: {error}; pack the model anew") from None
        return Stored(torch.from_numpy(symbols), vectors)


@dataclass(frozen=True)
class PackedModel:
    """What a model is rebuilt from, see `lbdet.deploy.rebuild`; every tensor has the digest it must have."""

    source: Path
    header: Header
    tensors: Mapping[str, Tensor]
    """the state dict of the float architecture with the weights that were evaluated, without counters of
    batches; where batch norm was folded it has gone and the convolution has a bias"""
    inputs: Mapping[str, PackedInput]
    """layer -> how its input is rounded, where it is"""


def read_packed(path: str | Path) -> Packed:
    """Read a file and check its SHA-256, its header, and the name, dtype and size of every tensor.

    Raises:
        UserError: what the file must have and does not.
    """
    path = Path(path)
    metadata, tensors = container.read(path)
    header = from_metadata(metadata, path)
    sizes = {name: vector_sizes(layer) for name, layer in header.layers.items()}
    _check_tensors(path, header, tensors, sizes)
    vectors: dict[str, dict[str, Tensor]] = {name: {} for name in sizes}
    for vector in VECTORS:
        users = [name for name, found in sizes.items() if vector in found]
        if users:
            parts = tensors[RESERVED + vector].split([sizes[name][vector] for name in users])
            for name, part in zip(users, parts, strict=True):
                vectors[name][vector] = part
    return Packed(path, header, tensors, vectors)


def load_packed(path: str | Path) -> PackedModel:
    """Read a file as `read_packed` does, dequantize its weights and check every tensor against its digest.

    Raises:
        UserError: what the file must have and does not.
    """
    packed = read_packed(path)
    layers, path = packed.header.layers, packed.source
    tensors = {name: packed.tensors[name] for name in _own_names(packed.header, packed.tensors)}
    for name, layer in layers.items():
        if layer.format is not None:
            tensors[f"{name}.weight"] = dequantize(layer, packed.stored(name))
        if layer.format is not None and layer.folded:
            tensors[f"{name}.bias"] = packed.vectors[name]["biases"]
    for name, expected in zip(sorted(tensors), packed.tensors[DIGESTS], strict=True):
        if digest(name, tensors[name]) != bytes(expected.tolist()):
            raise UserError(
                f"{path}: {name!a} must have the digest it was packed with, got another; pack the model anew"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise UserError(f"{path}: {name!a} must be finite, got nan or inf; pack another checkpoint")
    inputs = {
        name: _input(path, layer, packed.vectors[name])
        for name, layer in layers.items()
        if layer.input_format
    }
    for second, first in packed.header.tied.items():
        if first not in tensors or second in tensors:
            raise UserError(f"{path}: {second!a} must be a second name, got none of {first!a}; pack it anew")
        tensors[second] = tensors[first]
    return PackedModel(path, packed.header, tensors, inputs)


def digest(name: str, tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's name, dtype, shape and values."""
    described = [name, container.dtype_name(name, tensor), list(tensor.shape)]
    found = hashlib.sha256(json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode())
    found.update(container.octets(tensor))
    return found.digest()


def codes_of(layer: str) -> str:
    """Return the name of the tensor that has a layer's codes."""
    return f"{layer}.codes"


def certified_names(layers: Iterable[PackedLayer], own: Sequence[str]) -> list[str]:
    """Return the sorted names of all tensors with a digest: the model's own, weights and folded biases."""
    stored = [layer for layer in layers if layer.format is not None]
    weights, biases = ([layer.name for layer in some] for some in (stored, [s for s in stored if s.folded]))
    return sorted([*own, *(f"{name}.weight" for name in weights), *(f"{name}.bias" for name in biases)])


def _own_names(header: Header, tensors: Mapping[str, Tensor]) -> list[str]:
    codes = {codes_of(name) for name, layer in header.layers.items() if layer.format is not None}
    return [name for name in tensors if name not in codes and not name.startswith(RESERVED)]


def _check_tensors(
    path: Path, header: Header, tensors: Mapping[str, Tensor], sizes: Mapping[str, Mapping[str, int]]
) -> None:
    """Refuse tensors that miss, are too many or have another dtype or shape than the header tells."""
    own, layers = _own_names(header, tensors), list(header.layers.values())
    certified = certified_names(layers, own)
    if len(set(certified)) != len(certified):
        raise UserError(f"{path}: a tensor must be stored once, got a weight twice; pack the model anew")
    expected = {DIGESTS: (torch.uint8, [len(certified), 32])}
    for vector, dtype in VECTORS.items():
        if any(vector in found for found in sizes.values()):
            expected[RESERVED + vector] = dtype, [sum(found.get(vector, 0) for found in sizes.values())]
    for layer in layers:
        if layer.format is not None:
            expected[codes_of(layer.name)] = torch.uint8, [_code_bytes(layer, tensors)]
    for name in sorted((tensors.keys() | expected.keys()) - set(own)):
        dtype, shape = expected.get(name, (None, []))
        wanted = "absent" if dtype is None else f"{NAMES[dtype]} {shape}"
        found = f"{NAMES[tensors[name].dtype]} {list(tensors[name].shape)}" if name in tensors else "none"
        if wanted != found:
            raise UserError(
                f"{path}: tensor {name!a:.100} must be {wanted}, got {found}; pack the model anew"
            )


def _code_bytes(layer: PackedLayer, tensors: Mapping[str, Tensor]) -> int:
    """Return how many bytes the codes of a layer must have; a stream has as many as it has, but enough."""
    count = math.prod(layer.shape)
    if layer.coder != "ans" or codes_of(layer.name) not in tensors:
        return radix(layer).size(count)
    return max(tensors[codes_of(layer.name)].numel(), -(-count // entropy.MAX_SYMBOLS_A_BYTE))


def _input(path: Path, layer: PackedLayer, vectors: Mapping[str, Tensor]) -> PackedInput:
    assert layer.input_format is not None
    assert layer.input_bits is not None
    scale = vectors["input_scales"].item() if "input_scales" in vectors else None
    low = int(vectors["input_lows"]) if "input_lows" in vectors else None
    if (scale is not None and not 0 < scale < math.inf) or (
        low is not None and not -(1 << layer.input_bits) < low <= 0
    ):
        raise UserError(
            f"{path}: input of {layer.name!a} must have a positive scale and 0 in its range, got {scale} "
            f"from {low}; pack the model anew"
        )
    clips = layer.input_format == "dorefa"
    return PackedInput(
        layer.input_format, layer.input_bits, None if clips else scale, low, scale if clips else None
    )
