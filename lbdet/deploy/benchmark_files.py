"""What the engines of a benchmark run: each stage as a file, and the inputs of each, in one folder.

    <stage>.npz                                             its inputs, `<image>_<input>`
    float/   model.pt, <stage>.onnx, <stage>.xml            the same weights, dequantized; no layer of lbdet's
    int8/    end_to_end, network, batch as .onnx and .xml   what lbdet's export writes
    nncf/    the same as .xml                               the float files, quantized by NNCF

An SSD has all stages; a classifier no `prepare` and no `post`, and of Faster R-CNN, whose shapes depend on
the image everywhere, only the whole is timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD

from lbdet.convert import quantized_layers
from lbdet.deploy.benchmark import EngineSetup
from lbdet.deploy.benchmark_torch import MODEL_FILE
from lbdet.deploy.benchmark_worker import SHARED, input_file
from lbdet.deploy.export import place, trace
from lbdet.deploy.graph import ClassifierGraph, SsdGraph, feature_maps, to_batch
from lbdet.deploy.lower import lower
from lbdet.deploy.onnx_export import trace_onnx
from lbdet.deploy.openvino_export import converted, save
from lbdet.engine.task import MEAN, STD
from lbdet.nn import QuantConv2d, QuantLayer, quantized_weight


class Prepare(nn.Module):
    """`image uint8 [H, W, 3] -> x [1, 3, h, w]`."""

    def __init__(self, graph: SsdGraph) -> None:
        super().__init__()
        self.ssd = graph

    def forward(self, image: Tensor) -> Tensor:
        return self.ssd.prepare(image)


class Network(nn.Module):
    """`x [N, 3, h, w] -> logits [N, A, classes + 1], deltas [N, A, 4]`: backbone and head of an SSD."""

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model.head(feature_maps(self.model.backbone, x))
        return found["cls_logits"], found["bbox_regression"]


class Post(nn.Module):
    """`logits [A, classes + 1], deltas [A, 4] -> boxes, labels, scores`, boxes in the resized image."""

    def __init__(self, graph: SsdGraph) -> None:
        super().__init__()
        self.ssd = graph

    def forward(self, logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.ssd.detections(logits, deltas)


@torch.no_grad()
def float_model(model: nn.Module) -> nn.Module:
    """Return the model without lbdet's layers: ordinary ones with the dequantized weights, float inputs.

    Returns:
        A new model on the CPU, in eval mode, in torch's default memory format.
    """
    model = deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, _plain(layer))
    return model


@torch.no_grad()
def write_files(
    model: nn.Module,
    images: Sequence[np.ndarray],
    facts: dict[str, Any],
    setups: Iterable[EngineSetup],
    folder: Path,
    batch: int = 1,
) -> None:
    """Write what some engines run.

    Args:
        model: quantized, calibrated, on the CPU.
        images: uint8 `[H, W, 3]`, at least one; a classifier's all of its size.
        facts: see `lbdet.deploy.export.trace`.
        setups: the engines.
        folder: empty.
        batch: images of the stage `batch`; 1 leaves it out.

    Raises:
        UserError: a layer that cannot be exported.
    """
    setups, plain = list(setups), float_model(model)
    for name in ("float", "int8", "nncf"):
        (folder / name).mkdir()
    classifier = facts["task"] == "classification"
    whole = ClassifierGraph(plain, MEAN, STD) if classifier else plain
    torch.save(whole, folder / MODEL_FILE)
    inputs = _write_inputs(plain, images, folder, batch, classifier)
    suffixes = _suffixes(setups)
    for weights, quantized in (("float", plain), ("int8", model)):
        if suffixes[weights]:
            path = folder / weights / "end_to_end.onnx"
            trace(quantized, path, facts, float_weights=True)
            if ".xml" in suffixes[weights]:
                place(path, path.with_suffix(".xml"))
            shared = weights == "float"
            _write_stages(
                quantized, inputs, folder / weights, ".xml" in suffixes[weights], shared, classifier
            )
    if suffixes["nncf"]:
        _write_nncf(folder, inputs)


Inputs = dict[str, list[tuple[np.ndarray, ...]]]
"""Stage -> image by image what it takes."""


def _suffixes(setups: Iterable[EngineSetup]) -> dict[str, set[str]]:
    """Return which kinds of files are needed of each kind of weights; the stages they share are float."""
    needed: dict[str, set[str]] = {"float": set(), "int8": set(), "nncf": set()}
    for setup in setups:
        suffix = {"torch": None, "onnxruntime": ".onnx", "openvino": ".xml"}[setup.runtime]
        if suffix is not None:
            needed[setup.weights].add(suffix)
            needed["float"].add(suffix)
    return needed


def _write_inputs(
    plain: nn.Module, images: Sequence[np.ndarray], folder: Path, batch: int, classifier: bool
) -> Inputs:
    found: Inputs = {"end_to_end": [(image,) for image in images]}
    if classifier:
        normalize = ClassifierGraph(plain, MEAN, STD).normalize
        prepared = [normalize(to_batch(torch.from_numpy(image))) for image in images]
    elif isinstance(plain, SSD):
        prepare, network = Prepare(SsdGraph(plain)), Network(plain)
        prepared = [prepare(torch.from_numpy(image)) for image in images]
        outputs = [network(x) for x in prepared]
        found["prepare"] = found["end_to_end"]
        found["post"] = [tuple(value[0].numpy() for value in values) for values in outputs]
    else:
        prepared = []
    if prepared:
        found["network"] = [(x.numpy(),) for x in prepared]
        if batch > 1:
            some = (prepared * batch)[:batch]
            found["batch"] = [(torch.cat(some).numpy(),)]
    for stage, arrays in found.items():
        named = {f"{i}_{j}": array for i, row in enumerate(arrays) for j, array in enumerate(row)}
        np.savez(input_file(folder, stage), **named)  # pyright: ignore[reportArgumentType]
    return found


def _write_stages(
    model: nn.Module, inputs: Inputs, folder: Path, openvino_too: bool, shared: bool, classifier: bool
) -> None:
    """Write the stages between; those without quantized layers only where `shared`."""
    lowered = lower(model, float_weights=True)
    graphs: dict[str, nn.Module] = {}
    if classifier:
        graphs["network"] = graphs["batch"] = lowered
    elif isinstance(lowered, SSD):
        graphs["network"] = graphs["batch"] = Network(lowered)
        if shared:
            graphs |= {"prepare": Prepare(SsdGraph(lowered)), "post": Post(SsdGraph(lowered))}
    for stage, graph in graphs.items():
        if stage in inputs:
            path = folder / f"{stage}.onnx"
            _export(graph, inputs[stage][0], path, stage in SHARED)
            if openvino_too:
                save(converted(path), path.with_suffix(".xml"))


def _export(graph: nn.Module, example: Sequence[np.ndarray], path: Path, dynamic: bool) -> None:
    """Write a stage as ONNX.

    Args:
        dynamic: `prepare` takes images of any size, `post` gives any number of boxes; the others are static.
    """
    inputs = [f"input_{i}" for i in range(len(example))]
    outputs = ["boxes", "labels", "scores"] if len(example) > 1 else []
    axes = {inputs[0]: {0: "height", 1: "width"}} if len(example) == 1 else {}
    axes |= {name: {0: "detections"} for name in outputs}
    trace_onnx(graph, tuple(map(torch.from_numpy, example)), inputs, outputs, axes if dynamic else None, path)


def _write_nncf(folder: Path, inputs: Inputs) -> None:
    """Let NNCF quantize the float files: its defaults, ranges from the same images."""
    import nncf  # pyright: ignore[reportMissingImports]

    nncf.set_log_level(40)
    for stage in ("end_to_end", "network", "batch"):
        if stage in inputs:
            source = folder / "float" / f"{stage}.xml"
            data = nncf.Dataset([arrays[0] for arrays in inputs[stage]])
            model = nncf.quantize(openvino.Core().read_model(source), data, subset_size=len(inputs[stage]))
            save(model, folder / "nncf" / source.name)


def _plain(layer: QuantLayer) -> nn.Conv2d | nn.Linear:
    weight, bias = quantized_weight(layer).detach(), layer.bias
    if isinstance(layer, QuantConv2d):
        shape: Any = layer  # torch declares 2-tuples where it stores tuples
        plain = nn.Conv2d(
            layer.in_channels, layer.out_channels, shape.kernel_size, shape.stride, shape.padding,
            shape.dilation, layer.groups, bias is not None, layer.padding_mode, device="meta",
        )  # fmt: skip
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight.clone()), bias  # pyright: ignore[reportAttributeAccessIssue]
    return plain.eval()
