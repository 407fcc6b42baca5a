"""What a packed model says about itself: text that is read before any tensor.

It is safetensors' metadata, a map of text to text:

    architecture, precision, lbdet (the version), config (opaque)    text
    classes    JSON list of names
    layers     JSON list of kinds: format, widths, ... and, by name, the shapes of all layers of that kind
    tied       JSON object: second name of a tensor -> the name it is stored under; only where there are some
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError

from lbdet.deploy.container import first_error, parse_json
from lbdet.errors import UserError
from lbdet.nn import FORMATS
from lbdet.precision import Precision

CODERS = ("radix", "ans")
_HAVE_ZERO_POINTS_OR_HALVES = ("uniform", "learned_levels")
_KEYS = {"architecture", "precision", "lbdet", "config", "classes", "layers"}


@dataclass(frozen=True)
class Kind:
    """What layers may have in common; `None` and false are left out of the file."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    format: StrictStr | None = None
    """of the weights, a name of `lbdet.nn.FORMATS`; None = float, stored as it is"""
    bits: StrictInt | None = None
    granularity: Literal["per_tensor", "per_channel"] | None = None
    symmetric: StrictBool = False
    """uniform: the zero point is 0; learned levels: only the upper half is stored"""
    coder: Literal["radix", "ans"] | None = None
    """how the codes are packed"""
    folded: StrictBool = False
    """whether the batch norm behind it is a part of scales (one a channel) and bias, or of a float weight"""
    input_format: StrictStr | None = None
    """of the layer's input; None = float"""
    input_bits: StrictInt | None = None


@dataclass(frozen=True)
class PackedLayer(Kind):
    """A layer whose weight or input is quantized, or that batch norm was folded into."""

    name: str = ""
    shape: tuple[int, ...] = ()
    """of the weight"""

    @property
    def precision(self) -> Precision:
        """The widths of weight and input."""
        return Precision(self.bits, self.input_bits)


_Size = Annotated[int, Field(strict=True, ge=1, lt=1 << 31)]


@dataclass(frozen=True)
class _Group(Kind):
    """All layers of a kind in the file."""

    shapes: dict[StrictStr, Annotated[list[_Size], Field(min_length=2, max_length=5)]] = field(
        default_factory=dict
    )


_LAYERS = TypeAdapter(list[_Group])
_CLASSES = TypeAdapter(list[StrictStr])
_TIED = TypeAdapter(dict[StrictStr, StrictStr])
_T = TypeVar("_T")


@dataclass(frozen=True)
class Header:
    """The text of a packed model."""

    architecture: str
    """a name of `lbdet.models.MODELS` or `CLASSIFIERS`"""
    classes: tuple[str, ...]
    precision: Precision
    """of the layers without a width of their own"""
    layers: Mapping[str, PackedLayer]
    """by name, in the order in which the file joins their scales"""
    config: str = ""
    """whatever the model can be rebuilt from; nothing here reads it"""
    lbdet: str = ""
    """the version that packed"""
    tied: Mapping[str, str] = field(default_factory=dict)
    """second name of a tensor -> its first"""


def to_metadata(header: Header) -> dict[str, str]:
    """Return the header as text to text."""
    metadata = {
        "architecture": header.architecture,
        "classes": _json(list(header.classes)),
        "precision": str(header.precision),
        "lbdet": header.lbdet,
        "config": header.config,
        "layers": _json(
            [_group(kind, list(layers)) for kind, layers in groupby(header.layers.values(), _kind)]
        ),
    }
    return metadata | ({"tied": _json(dict(header.tied))} if header.tied else {})


def from_metadata(metadata: Mapping[str, str], path: Path) -> Header:
    """Read what `to_metadata` wrote.

    Raises:
        UserError: a key is missing, unknown or has another kind of value, or a layer is impossible.
    """
    if metadata.keys() - {"tied"} != _KEYS:
        found = ", ".join(sorted(metadata)) or "none"
        raise UserError(
            f"{path}: header must have {', '.join(sorted(_KEYS))}, got {found!a:.200}; pack it anew"
        )
    groups = _parsed(_LAYERS, metadata, "layers", path)
    layers = [_layer(path, group, name, shape) for group in groups for name, shape in group.shapes.items()]
    by_name = {layer.name: layer for layer in layers}
    if len(by_name) != len(layers):
        raise UserError(f"{path}: layers must stand once in the header, got one twice; pack the model anew")
    return Header(
        metadata["architecture"],
        tuple(_parsed(_CLASSES, metadata, "classes", path)),
        _precision(metadata["precision"], path),
        by_name,
        metadata["config"],
        metadata["lbdet"],
        _parsed(_TIED, metadata, "tied", path) if "tied" in metadata else {},
    )


def in_file_order(layers: Sequence[PackedLayer]) -> dict[str, PackedLayer]:
    """Return the layers by name, those of one kind together, else in their order."""
    kinds: dict[str, list[PackedLayer]] = {}
    for layer in layers:
        kinds.setdefault(_json(_kind(layer)), []).append(layer)
    return {layer.name: layer for same in kinds.values() for layer in same}


def _kind(layer: PackedLayer) -> dict[str, object]:
    values = asdict(layer)
    return {f.name: values[f.name] for f in fields(Kind) if values[f.name] not in (None, False)}


def _group(kind: dict[str, object], layers: list[PackedLayer]) -> dict[str, object]:
    return kind | {"shapes": {layer.name: list(layer.shape) for layer in layers}}


def _layer(path: Path, group: _Group, name: str, shape: list[int]) -> PackedLayer:
    kind = {f.name: getattr(group, f.name) for f in fields(Kind)}
    layer = PackedLayer(**kind, name=name, shape=tuple(shape))
    if not (_weight_is_possible(layer) and _input_is_possible(layer)):
        raise UserError(
            f"{path}: layer {name!a:.100} must be of a kind that lbdet has, got {_json(_kind(layer)):.250}; "
            "pack it anew"
        )
    return layer


def _weight_is_possible(layer: PackedLayer) -> bool:
    if layer.format is None:
        return not any((layer.bits, layer.granularity, layer.coder, layer.symmetric))
    quantizer = FORMATS[layer.format].weight if layer.format in FORMATS else None
    return (
        quantizer is not None
        and layer.bits in quantizer.widths
        and layer.coder is not None
        and layer.granularity is not None
        and (layer.granularity == "per_tensor" or layer.format != "dorefa")
        and (not layer.symmetric or layer.format in _HAVE_ZERO_POINTS_OR_HALVES)
    )


def _input_is_possible(layer: PackedLayer) -> bool:
    if layer.input_format is None:
        return layer.input_bits is None
    quantizer = FORMATS[layer.input_format].activation if layer.input_format in FORMATS else None
    return quantizer is not None and layer.input_bits in quantizer.widths


def _parsed(adapter: TypeAdapter[_T], metadata: Mapping[str, str], key: str, path: Path) -> _T:
    try:
        return adapter.validate_python(parse_json(metadata[key]))
    except ValidationError as error:
        raise UserError(
            f"{path}: {key} in the header: must be as lbdet writes it, got a mistake at "
            f"{first_error(error)}; pack it anew"
        ) from None
    except ValueError:
        raise UserError(f"{path}: {key} in the header: must be JSON, got other text; pack it anew") from None


def _precision(text: str, path: Path) -> Precision:
    try:
        return Precision.parse(text)
    except (UserError, ValueError):
        raise UserError(f"{path}: precision must be like W4A8, got {text!a:.40}; pack it anew") from None


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
