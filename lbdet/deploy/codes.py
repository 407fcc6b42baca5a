"""Where does an engine differ from torch? The uint8 codes of every layer's input, in both.

The engine's come from a copy of the file that returns them too; torch's from the model as it was trained. A
layer that computes something else shows at once: the codes behind it differ by far more than those of torch
with inputs that are larger by a millionth (see `lbdet.deploy.parity`).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lbdet.convert import hold_weights, quantized_layers
from lbdet.data.records import spread_images
from lbdet.deploy.engines import ENGINES
from lbdet.deploy.lower import InputGrid, input_grid
from lbdet.deploy.onnx_export import with_input_codes
from lbdet.deploy.openvino_export import export_openvino
from lbdet.deploy.parity import nudged, raw_images
from lbdet.engine.task import Task

Codes = Mapping[str, np.ndarray]
"""Layer -> the codes of its input, uint8; a layer's second call is `name@1`."""


def code_parity(
    model: nn.Module, source: Path, suffix: str, task: Task, data: Any, image_size: int | None, images: int
) -> dict[str, dict[str, Any]]:
    """Compare the codes of every layer's input on a few images.

    Args:
        model: as it was exported, on the CPU.
        source: the ONNX file.
        suffix: of the engine's files, `.onnx` or `.xml`.
        data: of the task's kind; `images` of them are taken.
        image_size: side of a classifier's input; None = images as they are.

    Returns:
        Layer -> `engine` and `noise`, each as `code_differences` has it; None where it has no such layer.
    """
    few = spread_images(data, images)
    inputs = list(task.inputs(few, 1, torch.device("cpu")))
    reference = [torch_codes(model, batch) for batch in inputs]
    found = engine_codes(source, suffix, list(raw_images(few, image_size)))
    engine = code_differences(reference, found)
    with nudged(model):
        noise = code_differences(reference, [torch_codes(model, batch) for batch in inputs])
    return {layer: {"engine": engine[layer], "noise": noise.get(layer)} for layer in engine}


@torch.no_grad()
def torch_codes(model: nn.Module, inputs: Any) -> Codes:
    """Return the codes that a quantized model's layers see of a batch, in the dimensions of their inputs."""
    found: dict[str, np.ndarray] = {}
    calls: Counter[str] = Counter()

    def watch(name: str, grid: InputGrid) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def note(_: nn.Module, values: tuple[Tensor]) -> None:
            codes = (values[0] / grid.scale).round() + grid.zero_point
            call = f"{name}@{calls[name]}" if calls[name] else name
            found[call] = codes.clamp(0, grid.steps).to(torch.uint8).cpu().numpy()
            calls[name] += 1

        return note

    with ExitStack() as stack:
        for name, layer in quantized_layers(model).items():
            grid = input_grid(name, layer)
            if grid is not None:
                stack.callback(layer.register_forward_pre_hook(watch(name, grid)).remove)
        with hold_weights(model.eval()):
            model(inputs)
    return found


def engine_codes(source: Path, suffix: str, images: Sequence[np.ndarray]) -> list[Codes]:
    """Return the codes that the layers of an exported ONNX file see of images, in an engine.

    Args:
        source: the ONNX file.
        suffix: `.onnx` or `.xml`, for onnxruntime or OpenVINO.
        images: uint8 `[H, W, 3]`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "codes.onnx")
        names = with_input_codes(source, path)
        if suffix == ".xml":
            export_openvino(path, path.with_suffix(suffix))
        engine = ENGINES[suffix](path.with_suffix(suffix))
        results = [engine.run(image) for image in images]
    return [{layer: found[tensor] for layer, tensor in names.items()} for found in results]


def code_differences(reference: Sequence[Codes], other: Sequence[Codes]) -> dict[str, dict[str, float]]:
    """Compare codes layer by layer, over all images.

    Returns:
        Layer -> the share of codes that is `changed`, and the `mean` difference; without layers that one side
        does not have, or whose inputs have other shapes (proposals, of which engines may keep others).
    """
    found = {}
    for layer in reference[0]:
        pairs = [
            (a[layer], b[layer]) for a, b in zip(reference, other, strict=True) if layer in a and layer in b
        ]
        if len(pairs) == len(reference) and all(a.shape == b.shape for a, b in pairs):
            steps = np.concatenate([np.abs(a.astype(int) - b).ravel() for a, b in pairs])
            if steps.size:
                found[layer] = {"changed": float((steps > 0).mean()), "mean": float(steps.mean())}
    return found
