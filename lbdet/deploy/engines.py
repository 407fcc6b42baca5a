"""The engines that run an exported file: onnxruntime and OpenVINO, on the CPU. Nothing here needs torch.

Both would quantize the float input of a linear layer with int8 weights as they see fit; they are told not to.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from lbdet.errors import UserError, one_line, short

METADATA_KEY = "lbdet"
"""of a JSON object with an exported model's facts, in the file's metadata"""
_INT8_OPS = {
    "QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm",
}  # fmt: skip
"""of onnxruntime's optimized graphs"""
_MULTIPLYING = {"Convolution", "FullyConnected", "MatMul"}
_RUNTIME_FACTS = ("layerType", "runtimePrecision", "originalLayersNames")
"""of OpenVINO's runtime models"""


class Engine(Protocol):
    """A file that is ready to run."""

    name: str
    """with its version"""
    facts: Mapping[str, Any]
    """what the file says of itself"""

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Run one image, contiguous uint8 `[H, W, 3]`; outputs by name."""
        ...

    def int8_layers(self) -> set[str]:
        """Return the names of the nodes that the engine computes in int8, as it says itself."""
        ...


class OnnxEngine:
    """onnxruntime on an .onnx file.

    Args:
        threads: 0 = as many as the engine finds right.

    Raises:
        UserError: onnxruntime is not installed; the file is damaged or not of lbdet's making.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        ort = _imported("onnxruntime", path)
        self.path, self.name = path, f"onnxruntime {ort.__version__}"
        try:
            self._session = onnx_session(path, threads)
        except Exception as error:  # onnxruntime's own, which share no base class
            raise UserError(
                f"{path}: must be a whole ONNX file, got {_last_line(error)}; export it anew"
            ) from None
        self.facts = read_facts(self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), path)

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, {"image": image}), strict=True))

    def int8_layers(self) -> set[str]:
        """Return what the optimized graph says. It keeps the names of nodes, some with a `_token_<n>`."""
        onnx = _imported("onnx", self.path)
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder, "optimized.onnx")
            onnx_session(self.path, 1, optimized)
            nodes = onnx.load(optimized).graph.node
        return {node.name.split("_token_")[0] for node in nodes if node.op_type in _INT8_OPS}


class OpenvinoEngine:
    """OpenVINO's CPU plugin on an .xml file and its .bin. What is not int8 is computed in float32.

    Args, Raises: as `OnnxEngine`.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        openvino = _imported("openvino", path)
        self.name = f"openvino {openvino.__version__.split('-')[0]}"
        _check_is_ir(path)
        try:
            model = openvino_core().read_model(path)
            has_facts = METADATA_KEY in model.get_rt_info()
            facts = model.get_rt_info([METADATA_KEY]).astype(str) if has_facts else None
            self._compiled = openvino_compiled(model, threads)
        except Exception as error:
            raise UserError(
                f"{path}: must be an OpenVINO model with its .bin, got {_last_line(error)}; export it anew"
            ) from None
        self.facts = read_facts(facts, path)

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        found = self._compiled(image)
        return {output.get_any_name(): np.array(found[output]) for output in self._compiled.outputs}

    def int8_layers(self) -> set[str]:
        """Return what the runtime model says of each operation: its precision, and what was fused into it."""
        found: set[str] = set()
        for operation in self._compiled.get_runtime_model().get_ops():
            facts = operation.get_rt_info()
            kind, precision, names = (facts[key].astype(str) for key in _RUNTIME_FACTS)
            if kind in _MULTIPLYING and precision in ("i8", "u8"):
                found.update(name.split("/")[0].removesuffix("_original") for name in names.split(","))
        return found


ENGINES: dict[str, type[OnnxEngine] | type[OpenvinoEngine]] = {".onnx": OnnxEngine, ".xml": OpenvinoEngine}
"""Suffix -> engine."""


def float_layers(engine: Engine) -> list[str]:
    """Return the layers of int8 codes and quantized inputs that the engine computes in float all the same."""
    int8 = engine.int8_layers()
    return [name for name in engine.facts["int8_layers"] if name not in int8]


def onnx_session(path: Path, threads: int, optimized: Path | None = None) -> Any:
    """Return onnxruntime's session of a file, on the CPU.

    Args:
        threads: 0 = as many as the engine finds right.
        optimized: where the optimized graph is written, if anywhere.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def openvino_compiled(model: Any, threads: int, precision: str = "f32") -> Any:
    """Compile an OpenVINO model, or the file of one, for the CPU.

    Args:
        threads: 0 = as many as the engine finds right.
        precision: of what is not int8.
    """
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return openvino_core().compile_model(model, "CPU", options)


@cache
def openvino_core() -> Any:
    """Return the one Core of the process, never freed: the CPU plugin of each lends the thread a stack for
    signals, and where two overlap, freeing them leaves one that is gone, so that the next signal is fatal."""
    import openvino

    return openvino.Core()


def read_facts(text: str | None, path: Path, known: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Return what a file says of itself.

    Args:
        text: a JSON object, None = there is none.
        known: what other parts of the file say; it goes before.

    Raises:
        UserError: it is not of lbdet's making, or of another version's.
    """
    if text is None:
        raise UserError(f"{path}: must be written by tools/export.py, got a file without its metadata")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise UserError(f"{path}: metadata must be as this version writes it, got no object; export it anew")
    facts |= known or {}
    classifies = facts.get("task") == "classification"
    for key, is_right in (_FACTS | (_CLASSIFIER_FACTS if classifies else {})).items():
        if key not in facts or not is_right(facts[key]):
            got = short(facts[key]) if key in facts else "none"
            raise UserError(
                f"{path}: metadata must be as this version writes it, got {got} as {key}; export it anew"
            )
    return facts


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 1


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


_FACTS: dict[str, Callable[[Any], bool]] = {
    "task": lambda value: value in ("detection", "classification"),
    "classes": lambda value: _are_texts(value) and len(value) > 0,
    "int8_layers": _are_texts,
    "image_size": lambda value: value is None or _is_size(value),
}
"""what every file says"""
_CLASSIFIER_FACTS: dict[str, Callable[[Any], bool]] = {
    "image_size": _is_size,
    "short_side": lambda value: value is None or _is_size(value),
}
"""what a classifier's says in their place and beside them"""


def _imported(name: str, path: Path) -> ModuleType:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"{path}: needs {name}, which is not installed; pip install -e '.[deploy]'") from None


def _check_is_ir(path: Path) -> None:
    """Refuse an .xml that is not OpenVINO's before its readers of other frameworks' files, which log, try it.

    Raises:
        UserError: its first 4 KiB, if they can be read, have no <net> of a version.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path}: must be an OpenVINO model, got {error.strerror}") from None
    if not re.search(rb'<net\s[^>]*version="\d+"', head):
        raise UserError(
            f"{path}: must be an OpenVINO model, got another kind of file; write it with tools/export.py"
        )


def _last_line(error: Exception) -> str:
    """Return what an engine says at last, behind the lines of OpenVINO's code and onnxruntime's number."""
    line = str(error).strip().rpartition("\n")[2]
    return one_line(line.rpartition(" : ")[2].rstrip(".! "), 200)
