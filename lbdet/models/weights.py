"""Weights from a file or from torchvision, and into a model: read without running code, loaded strictly.

Loading sets parameters and buffers and nothing else: batch norm keeps the eps of the architecture.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from lbdet.errors import UserError, one_line, short
from lbdet.models.plain import load_plain

PREPARED = "ssdlite320_mobilenet_v3_large_coco_v1_int8.pth"
"""what tools/prepare_weights.py makes; published configs start from it"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A checkpoint as it was read, on the CPU."""

    tensors: dict[str, Tensor]
    source: str
    """The file, or the address of torchvision's."""
    classes: tuple[str, ...] | None
    """What the predictors' rows after background stand for; None where the file does not say."""
    metadata: dict[str, str]


def load_weights(source: str, architecture: str | None = None) -> Weights:
    """Read a `.safetensors`, `.pth` or `.pt` file, or torchvision's own weights for `architecture`.

    A pickle is read with `weights_only=True`, which runs no code; `{"model": ...}` and `{"state_dict": ...}`
    are unwrapped. A `.safetensors` file may name its `classes` (a JSON list), `architecture` and `precision`
    in its metadata.

    Args:
        source: a path, or one of torchvision's names such as `COCO_V1` or `DEFAULT` (downloaded once).
        architecture: torchvision's name of the network that such a name belongs to.

    Raises:
        UserError: there are no such weights, or the file is damaged or holds something else.
    """
    names = _names(architecture)
    if source in names:
        return _download(names[source])
    path = Path(source)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "no such file"
        remedy = (
            f"give its path or one of torchvision's: {', '.join(sorted(names))}" if names else "give its path"
        )
        if path.name == PREPARED:
            remedy = "make it with tools/prepare_weights.py"
        raise UserError(f"{source}: weights must be a file, got {found}; {remedy}")
    if path.suffix not in _READERS:
        raise UserError(
            f"{source}: weights must be one of {', '.join(_READERS)}, got '{path.suffix}'; convert the file"
        )
    tensors, metadata = _READERS[path.suffix](source)
    if not tensors:
        raise UserError(f"{source}: weights must hold tensors, got none; save model.state_dict()")
    return Weights(_new_names(tensors), source, _classes(source, metadata), metadata)


def trained_precision(source: str) -> str:
    """Return what the weights of a file that `load_weights` can read were trained at, such as W4;
    "float" where it does not say. Only the file's head is read.
    """
    if not source.endswith(".safetensors"):
        return "float"
    with safe_open(source, framework="pt") as file:
        return (file.metadata() or {}).get("precision", "float")


def float_part(weights: Weights) -> Weights:
    """Return the weights without what quantizers learned: the float model that lies under a low-bit run."""
    tensors = {key: tensor for key, tensor in weights.tensors.items() if "_quantizer." not in key}
    left_out = len(weights.tensors) - len(tensors)
    if left_out:
        log.info("%s: %d tensors of quantizers are left out; they start anew", weights.source, left_out)
    return replace(weights, tensors=tensors)


def load_into(model: nn.Module, weights: Weights, keys: Collection[str] | None = None) -> None:
    """Copy all tensors of `weights` into `model`, in the model's dtype.

    Only `num_batches_tracked` may be missing: frozen batch norm does not save it.

    Args:
        keys: the part of the model's state dict that `weights` must fill; None = all of it.

    Raises:
        UserError: keys miss, are unexpected or have other shapes, or a value is nan or infinite.
    """
    check_fit(model, weights, keys)
    for key, tensor in weights.tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{weights.source}: weights must be finite, got nan or inf in '{one_line(key, 100)}'; "
                "take an earlier checkpoint"
            )
    model.load_state_dict(weights.tensors, strict=False)


def check_fit(
    model: nn.Module, weights: Weights, keys: Collection[str] | None = None, any_rows: Collection[str] = ()
) -> None:
    """Raise UserError unless the keys and shapes of `weights` are those of `model`.

    Args:
        keys: the part of the model's state dict to compare with; None = all of it.
        any_rows: keys whose first dimension may differ (predictors of other classes).
    """
    expected = {key: t for key, t in model.state_dict().items() if keys is None or key in keys}
    missing = [k for k in expected if k not in weights.tensors and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights.tensors if k not in expected]
    reshaped = []
    for key, tensor in weights.tensors.items():
        start = 1 if key in any_rows and tensor.ndim > 0 else 0
        if key in expected and tensor.shape[start:] != expected[key].shape[start:]:
            reshaped.append(f"{key} {list(tensor.shape)} for {list(expected[key].shape)}")
    if missing or unexpected or reshaped:
        raise UserError(
            f"{weights.source}: weights must be those of the model, got a checkpoint of another model: keys "
            f"missing: {_examples(missing)}, unexpected: {_examples(unexpected)}, "
            f"of other shape: {_examples(reshaped)}; choose the architecture it was saved from"
        )


def _examples(entries: list[str]) -> str:
    """`0`, or `5 (a, b, c, ...)`."""
    dots = ["..."] if len(entries) > 3 else []
    shown = [one_line(entry, 100) for entry in entries[:3]]
    return f"{len(entries)} ({', '.join(shown + dots)})" if entries else "0"


def _names(architecture: str | None) -> Mapping[str, WeightsEnum]:
    """torchvision's weights for an architecture, by name; none for one that is not torchvision's."""
    if architecture not in torchvision.models.list_models():
        return {}
    return torchvision.models.get_model_weights(architecture).__members__


def _download(entry: WeightsEnum) -> Weights:
    try:
        tensors = entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, HTTPException) as error:  # no network, a wrong hash, a broken transfer
        raise UserError(
            f"{entry.url}: weights {entry} must be downloaded, got {type(error).__name__}; "
            "fetch the file elsewhere and give its path"
        ) from error
    return Weights(_new_names(tensors), entry.url, None, {})


def _read_safetensors(source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # SafetensorError, and torch's on dtypes that it does not have
        raise UserError(
            f"{source}: must be a safetensors file, got a damaged or other file; copy it anew"
        ) from error


def _read_pickle(source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        content = load_plain(source)
    except Exception as error:  # damaged bytes can raise nearly anything in the unpickler
        raise UserError(
            f"{source}: weights must hold tensors only, got a damaged file or one with code or objects; "
            "save model.state_dict()"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise UserError(
            f"{source}: weights must be a state dict, got {type(content).__name__}; save model.state_dict()"
        )
    size = os.path.getsize(source)
    for key, value in content.items():
        if not (isinstance(key, str) and _is_plain(value, size)):
            raise UserError(
                f"{source}: weights must be a state dict of tensors, got {type(value).__name__} at "
                f"{short(key)}; save model.state_dict()"
            )
    return dict(content), {}


def _is_plain(value: object, size: int) -> bool:
    """Whether a value is a tensor whose elements, none sparse or repeated, lie in a file of so many bytes."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= min(size, value.untyped_storage().nbytes())
    )


_READERS: dict[str, Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]] = {
    ".safetensors": _read_safetensors,
    ".pth": _read_pickle,
    ".pt": _read_pickle,
}


def _classes(source: str, metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    if "classes" not in metadata:
        return None
    try:
        classes = json.loads(metadata["classes"])
        "".join(classes).encode()  # halves of surrogate pairs are no text
    except (ValueError, TypeError, RecursionError):
        classes = None
    if not isinstance(classes, list):
        raise UserError(
            f"{source}: metadata 'classes' must be a JSON list of names, got {short(metadata['classes'])}; "
            "save them with json.dumps"
        )
    return tuple(classes)


def _new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give two layers of Faster R-CNN torchvision's present names; its published files have older ones."""
    renamed = {}
    for key, tensor in tensors.items():
        key = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", key)
        renamed[re.sub(r"(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", key)] = tensor
    return renamed
