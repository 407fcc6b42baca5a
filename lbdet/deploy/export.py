"""From a quantized model to a file that an engine runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbdet.convert import check_width, quantized_layers, set_precision
from lbdet.data.labelled import CROP_RATIO, LabelledData
from lbdet.data.records import DetectionData
from lbdet.deploy.fold import factor_and_bias
from lbdet.deploy.graph import ClassifierGraph, detection_graph
from lbdet.deploy.lower import lower
from lbdet.deploy.onnx_export import export_onnx
from lbdet.deploy.openvino_export import export_openvino
from lbdet.deploy.pack import PackSummary, _version, pack_model
from lbdet.deploy.packed import load_packed
from lbdet.engine.checkpoint import write_atomically
from lbdet.engine.finish import calibrate
from lbdet.engine.task import _MEAN, _STD, Task
from lbdet.errors import NumericsError, UserError
from lbdet.nn import QuantLayer, quantized_weight
from lbdet.precision import Precision

DETECTION_OUTPUTS = ("boxes", "labels", "scores")
ACT_BITS = 8


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
        "lbdet": _version(),
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


def quantize_inputs(model: nn.Module, task: Task, train: Any, images: int) -> None:
    """Give the layers that have weight bits alone 8-bit inputs, calibrated on training images; in place.

    Raises:
        UserError: there is no such layer, or its format has no 8-bit inputs.
    """
    layers = quantized_layers(model)
    wanted = {
        name: Precision(layer.precision.weight_bits, ACT_BITS)
        for name, layer in layers.items()
        if layer.precision.weight_bits is not None and layer.precision.act_bits is None
    }
    if not wanted:
        raise UserError(
            "--calibration-images: is for runs of weight bits without activation bits, got none such layer; "
            "leave it out"
        )
    for name, precision in wanted.items():
        check_width(layers[name].weight_quantizer, layers[name].activation_quantizer, precision, name)
    set_precision(model, wanted)
    calibrate(model, task, train, images, names=wanted)


def trace(model: nn.Module, path: Path, facts: Mapping[str, Any], float_weights: bool = False) -> None:
    """Write a quantized model as an ONNX file.

    Args:
        model: a detector or classifier with calibrated activations; not changed.
        path: of the file.
        facts: what it carries, see `describe`: at least `task`, `classes`, and of a classifier `image_size`,
            the side of its input.
        float_weights: see `lbdet.deploy.lower.lower`.

    Raises:
        UserError: a layer that cannot be exported.
    """
    lowered = lower(model, float_weights)
    if facts["task"] == "detection":
        graph, outputs = detection_graph(lowered), DETECTION_OUTPUTS
        example = torch.zeros(240, 320, 3, dtype=torch.uint8)
    else:
        graph, outputs = ClassifierGraph(lowered, _MEAN, _STD), ("scores",)
        example = torch.zeros(facts["image_size"], facts["image_size"], 3, dtype=torch.uint8)
    export_onnx(graph, example, outputs, path, {"image_size": None, "short_side": None, **facts})


def place(source: Path, path: Path) -> None:
    """Write an ONNX file to its place: as it is, or for a path that ends in `.xml` as an OpenVINO model.

    Raises:
        UserError: it cannot be written.
    """
    if path.suffix == ".xml":
        export_openvino(source, path)
    else:
        write_atomically(path, partial(shutil.copyfile, source))


def pack(
    model: nn.Module, path: Path, facts: Mapping[str, Any], precision: Precision, fold: bool, entropy: bool
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
