"""Write a trained low-bit model as a file of its true size; what such a file holds is told in `packed`.

Only what the present widths need is stored: neither the float weights that training changes nor parameters
for other widths, and not how many batches batch norm has seen, which only training reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbdet.convert import quantized_layers, uncalibrated
from lbdet.deploy import container, entropy
from lbdet.deploy.container import RESERVED
from lbdet.deploy.fold import batch_norm_pairs, factor_and_bias
from lbdet.deploy.header import CODERS, Header, PackedLayer, in_file_order, to_metadata
from lbdet.deploy.packed import DIGESTS, codes_of, digest
from lbdet.deploy.radix import pack
from lbdet.deploy.stored import VECTORS, Stored, dequantize, described, fold, narrowed, radix, store
from lbdet.engine.manifest import installed_version
from lbdet.errors import NumericsError, UserError
from lbdet.nn import ActivationQuantizer, DorefaActivation, QuantLayer, WeightQuantizer
from lbdet.precision import FLOAT, Precision


@dataclass(frozen=True)
class PackSummary:
    """What became of a model. Its `str` is a line to print."""

    path: Path
    size: int
    """of the file, in bytes"""
    float_size: int
    """of the float model's state dict"""
    folded: Mapping[str, str]
    """convolution -> the batch norm that is a part of it now"""
    kept: Sequence[str]
    """the batch norms that are stored as they are"""

    def __str__(self) -> str:
        ratio = self.float_size / self.size
        norms = f"{len(self.folded)} batch norms folded, {len(self.kept)} kept"
        return f"{self.path}: {self.size} bytes, 1/{ratio:.2f} of the float state dict; {norms}"


@dataclass(frozen=True)
class _Part:
    """What the file gets from one quantized layer."""

    layer: PackedLayer
    vectors: Mapping[str, Tensor]
    codes: Tensor | None = None
    digests: Mapping[str, bytes] | None = None


@torch.no_grad()
def pack_model(
    model: nn.Module,
    path: str | Path,
    architecture: str,
    classes: Sequence[str],
    precision: Precision | str,
    config: str = "",
    fold_batch_norm: bool = False,
    coder: str = "radix",
) -> PackSummary:
    """Write a model at its present widths. The same model gives the same bytes.

    Args:
        model: what `quantize_model` returned, trained; not changed.
        path: of the file, by habit `model.lbw`.
        architecture: the name under which the float model can be built.
        classes: what it tells apart, without background.
        precision: of the layers without a width of their own; for readers.
        config: whatever the float model can be rebuilt from; kept as it is.
        fold_batch_norm: multiply batch norm into the convolution that it directly follows (see `fold`), which
            is smaller. Codes stay the same up to their sign, scales are no powers of two then, and outputs
            differ by the rounding of float32.
        coder: "radix"; "ans" (see `entropy`) is a little smaller and needs `constriction` to be read.

    Raises:
        UserError: activations are not calibrated, a scale exponent does not fit a byte, a scale becomes
            infinite, a tensor has a name that the format uses, or the file cannot be written.
        NumericsError: a tensor has values that are not finite.
    """
    if coder not in CODERS:
        raise UserError(f"coder: must be one of {', '.join(CODERS)}, got {coder!r}; choose one of them")
    if missing := uncalibrated(model):
        raise UserError(
            f"{missing[0]}: activations must be calibrated before packing, got no range there and in "
            f"{len(missing) - 1} other layers; call lbdet.calibrate_activations with some images"
        )
    pairs, kept = batch_norm_pairs(model) if fold_batch_norm else ({}, _batch_norms(model))
    norms = {conv: model.get_submodule(norm) for conv, norm in pairs.items()}
    parts = {
        name: _part(name, layer, norms.get(name), coder)
        for name, layer in quantized_layers(model).items()
        if layer.precision != FLOAT
    }
    state = model.state_dict()
    for name in (name for name in pairs if name not in parts):
        shape = tuple(state[f"{name}.weight"].shape)
        parts[name] = _Part(PackedLayer(name=name, shape=shape, folded=True), {})
    tied = _second_names(model)
    own = _own_tensors(model, parts, pairs, tied)
    layers = in_file_order([part.layer for part in parts.values()])
    header = Header(
        architecture,
        tuple(classes),
        Precision.parse(precision),
        layers,
        config,
        installed_version("lbdet") or "unknown",
        tied,
    )
    tensors = _tensors([parts[name] for name in layers], own)
    size = container.write(Path(path), tensors, to_metadata(header))
    return PackSummary(Path(path), size, _float_size(model), pairs, kept)


def _part(name: str, layer: QuantLayer, norm: nn.Module | None, coder: str) -> _Part:
    """Quantize the weight of a layer, fold the batch norm behind it, and pack the codes."""
    plain, inputs = described(name, layer), _input_vectors(layer)
    if plain.format is None or plain.bits is None:
        return _Part(replace(plain, folded=norm is not None), inputs)
    try:
        quantized = layer.weight_quantizer.quantize(layer.weight, plain.bits)
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from None
    packed, stored = plain, store(plain, quantized)
    if isinstance(norm, nn.BatchNorm2d):
        packed = replace(plain, folded=True)
        stored = fold(packed, stored, *(t.cpu() for t in factor_and_bias(norm, layer.bias)))
    stored = narrowed(packed, stored)
    weight = dequantize(packed, stored)
    assert packed.folded or torch.equal(weight, quantized.dequantize().cpu())
    digests = {f"{name}.weight": digest(f"{name}.weight", weight)}
    if packed.folded:
        digests[f"{name}.bias"] = digest(f"{name}.bias", stored.vectors["biases"])
    packed, codes, frequencies = _coded(packed, stored, coder)
    return _Part(packed, {**stored.vectors, **frequencies, **inputs}, codes, digests)


def _coded(layer: PackedLayer, stored: Stored, coder: str) -> tuple[PackedLayer, Tensor, dict[str, Tensor]]:
    """Return the layer with its coder, the packed codes, and the frequencies where the coder has some."""
    symbols, alphabet = stored.symbols.numpy(), radix(layer)
    if coder == "ans":
        stream, frequencies = entropy.encode(symbols, alphabet.symbols)
        if entropy.pays(len(symbols), len(stream), alphabet.symbols, alphabet.size(len(symbols))):
            found = {"frequencies": torch.from_numpy(frequencies)}
            return replace(layer, coder=coder), torch.from_numpy(stream), found
    return layer, torch.from_numpy(pack(symbols, alphabet)), {}


def _input_vectors(layer: QuantLayer) -> dict[str, Tensor]:
    """Return what a layer's input is rounded with at its present width."""
    bits, quantizer = layer.precision.act_bits, layer.activation_quantizer
    if bits is None:
        return {}
    if isinstance(quantizer, DorefaActivation):
        return {"input_scales": _clip(quantizer, bits).reshape(1).cpu()}
    found = quantizer.range(bits)
    if found is None:
        return {}
    scale, low, _ = found
    return {
        "input_scales": torch.tensor([scale], dtype=VECTORS["input_scales"]),
        "input_lows": torch.tensor([low], dtype=VECTORS["input_lows"]),
    }


def _clip(quantizer: DorefaActivation, bits: int) -> Tensor:
    """Return the largest value of an input, float32 `[]`, as the forward pass computes it."""
    if not isinstance(quantizer.clip, str):
        return torch.tensor(quantizer.clip)
    return (quantizer.get_parameter(f"log_scale_{bits}") + math.log((1 << bits) - 1)).exp()


def _own_tensors(
    model: nn.Module, parts: Mapping[str, _Part], pairs: Mapping[str, str], tied: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return what is stored under its own name: the state dict but for what parts hold or nothing needs."""
    quantized = {name for name, part in parts.items() if part.codes is not None}
    left_out = {f"{name}.weight" for name in quantized} | {
        f"{name}.bias" for name in quantized & pairs.keys()
    }
    norms = set(pairs.values())
    own = {
        key: value
        for key, value in _float_state(model).items()
        if key not in left_out and key not in tied and key.rpartition(".")[0] not in norms
    }
    for conv in pairs.keys() - quantized:
        own |= _folded_float(model, conv, pairs[conv])
    codes = {codes_of(name) for name in quantized}
    for key, value in own.items():
        if key in codes or key.startswith(RESERVED):
            raise UserError(f"{key}: must not have a name of the file format, got such a tensor; rename it")
        if not bool(torch.isfinite(value).all()):
            raise NumericsError(
                f"{key}: must be finite to be packed, got nan or inf; take an earlier checkpoint"
            )
    return own


def _folded_float(model: nn.Module, name: str, norm_name: str) -> dict[str, Tensor]:
    """Return weight and bias of a float convolution with its batch norm folded."""
    conv, norm = model.get_submodule(name), model.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    factor, bias = factor_and_bias(norm, conv.bias)
    weight = conv.weight.double() * factor.view(-1, 1, 1, 1)
    return {f"{name}.weight": weight.to(conv.weight.dtype), f"{name}.bias": bias.to(conv.weight.dtype)}


def _tensors(parts: Sequence[_Part], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors of the file but the hash of all."""
    tensors = dict(own)
    digests = {name: digest(name, tensor) for name, tensor in own.items()}
    for part in parts:
        digests |= part.digests or {}
        if part.codes is not None:
            tensors[codes_of(part.layer.name)] = part.codes
    for name in VECTORS:
        joined = [part.vectors[name] for part in parts if name in part.vectors]
        if joined:
            tensors[RESERVED + name] = torch.cat(joined)
    rows = b"".join(digests[name] for name in sorted(digests))
    tensors[DIGESTS] = torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(-1, 32)
    return tensors


def _second_names(model: nn.Module) -> dict[str, str]:
    """Return further names of tensors in the state dict, where a module has several, with their first."""
    first: dict[int, str] = {}
    canonical = {
        name: first.setdefault(id(module), name)
        for name, module in model.named_modules(remove_duplicate=False)
    }
    owners = {key: key.rpartition(".") for key in _float_state(model)}
    names = {key: f"{canonical[owner]}.{last}" for key, (owner, _, last) in owners.items() if owner}
    return {key: name for key, name in names.items() if name != key}


def _float_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without what only training or a width needs: counters of batches, quantizers."""
    quantizers = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (WeightQuantizer, ActivationQuantizer))
    }
    return {
        key: value
        for key, value in model.state_dict().items()
        if key.rpartition(".")[0] not in quantizers and not key.endswith("num_batches_tracked")
    }


def _batch_norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def _float_size(model: nn.Module) -> int:
    """Return the size of the float model's state dict in bytes."""
    counters = [value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")]
    return sum(value.numel() * value.element_size() for value in [*_float_state(model).values(), *counters])
