"""Write an ONNX file as an OpenVINO model: an .xml and a .bin beside it, floats as float32."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnx
import openvino

from lbdet.deploy.engines import METADATA_KEY
from lbdet.deploy.openvino_passes import quantize_before_pooling, resize_planes
from lbdet.errors import UserError


def export_openvino(source: Path, path: Path) -> None:
    """Convert an exported ONNX file.

    Args:
        source: written by `export_onnx`.
        path: of the .xml; it is renamed into place last.

    Raises:
        UserError: the files cannot be written.
    """
    facts = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    model = converted(source)
    model.set_rt_info(facts[METADATA_KEY], [METADATA_KEY])
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder, path.name)
            save(model, written)
            for suffix in (".bin", ".xml"):
                os.replace(written.with_suffix(suffix), path.with_suffix(suffix))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def save(model: openvino.Model, path: Path) -> None:
    """Write a model with all digits: in float16 scales would lose some."""
    openvino.save_model(model, path, compress_to_fp16=False)


def converted(source: Path) -> openvino.Model:
    """Return an ONNX file as an OpenVINO model, rewritten as `openvino_passes` tells."""
    exported = onnx.load(source)
    quantize_before_pooling(exported.graph)
    resize_planes(exported.graph)
    with tempfile.TemporaryDirectory() as folder:
        rewritten = Path(folder, "model.onnx")
        onnx.save(exported, rewritten)
        return openvino.convert_model(rewritten)  # as read by Core, 2026.4 computes wrong int8 sums
