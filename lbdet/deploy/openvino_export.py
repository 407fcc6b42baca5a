"""Write an ONNX file as an OpenVINO model: an .xml and a .bin beside it, floats as float32."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnx
import openvino

from lbdet.deploy.engines import METADATA_KEY
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
    model = openvino.convert_model(source)
    model.set_rt_info(facts[METADATA_KEY], [METADATA_KEY])
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder, path.name)
            openvino.save_model(model, written, compress_to_fp16=False)  # or scales would lose digits
            for suffix in (".bin", ".xml"):
                os.replace(written.with_suffix(suffix), path.with_suffix(suffix))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
