"""From a quantized model to a packed file that `lbdet.deploy.load` runs, read back to be sure of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbdet.convert import quantized_layers
from lbdet.data.labelled import CROP_RATIO, LabelledData
from lbdet.data.records import DetectionData
from lbdet.deploy.fold import factor_and_bias
from lbdet.deploy.pack import PackSummary, pack_model
from lbdet.deploy.packed import load_packed
from lbdet.engine.manifest import installed_version
from lbdet.errors import NumericsError
from lbdet.nn import QuantLayer, quantized_weight
from lbdet.precision import Precision


def describe(
    model: nn.Module, architecture: str, classes: Sequence[str], data: Any, image_size: int | None
) -> dict[str, Any]:
    """Return what an exported file says of itself, plain data.

    Args:
        model: at the widths that are exported.
        data: the images that it is evaluated on; of the task's kind.
        image_size: the config's: short side of a detector's input, or side of a classifier's.
    """
    widths = {str(layer.precision) for layer in quantized_layers(model).values() if layer.scheduled}
    facts = {
        "lbdet": installed_version("lbdet") or "unknown",
        "task": "detection" if isinstance(data, DetectionData) else "classification",
        "architecture": architecture,
        "classes": list(classes),
        "precision": ", ".join(sorted(widths)) or "float",
        "input": "image: uint8 [height, width, 3], RGB",
        "image_size": image_size,
    }
    if isinstance(data, LabelledData):
        short = None if image_size is None else round(image_size / CROP_RATIO)
        facts |= {"image_size": image_size or data.image(0).shape[0], "short_side": short}
    return facts


def pack(
    model: nn.Module,
    path: Path,
    facts: Mapping[str, Any],
    precision: Precision,
    fold: bool = False,
    entropy: bool = False,
) -> PackSummary:
    """Write a packed file that `lbdet.deploy.load` runs, read it back and compare every weight.

    They must be the same bit for bit; with batch norm folded, up to the two roundings of the product.

    Args:
        facts: see `describe`.
        precision: of the layers without a width of their own.
        fold, entropy: take batch norm into scales and biases; use the entropy coder.

    Raises:
        UserError: as `pack_model`.
        NumericsError: a weight came back changed.
    """
    summary = pack_model(
        model, path, facts["architecture"], facts["classes"], precision,
        config=json.dumps({"int8_layers": [], **facts}),
        fold_batch_norm=fold, coder="ans" if entropy else "radix",
    )  # fmt: skip
    tensors = load_packed(path).tensors
    for name, layer in quantized_layers(model).items():
        norm = model.get_submodule(summary.folded[name]) if name in summary.folded else None
        if not _came_back(tensors[f"{name}.weight"], layer, norm):
            raise NumericsError(f"{path}: {name}: weights must come back as they were, got others")
    return summary


def _came_back(found: Tensor, layer: QuantLayer, norm: nn.Module | None) -> bool:
    written = quantized_weight(layer).detach().cpu()
    if not isinstance(norm, nn.BatchNorm2d):
        return torch.equal(found, written)
    factor = factor_and_bias(norm, None)[0].cpu().view(-1, *[1] * (written.ndim - 1))
    return torch.allclose(found.double(), written * factor, rtol=2.0**-22, atol=2.0**-149)
