"""A packed file as an engine: the rebuilt model in torch, called like the other engines.

It computes what the packed model computed, bit for bit unless batch norm was folded, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lbdet.deploy.engines import read_facts
from lbdet.deploy.packed import PackedModel, load_packed
from lbdet.deploy.rebuild import check_architecture, rebuild
from lbdet.engine.evaluate import to_model
from lbdet.engine.task import normalized
from lbdet.errors import UserError
from lbdet.models import MODELS, build_detector
from lbdet.models.classifiers import CLASSIFIERS, build_classifier


class TorchEngine:
    """torch on an .lbw file.

    Args:
        threads: of torch, from now on in the whole process; 0 = leaves them.

    Raises:
        UserError: the file is damaged, of an architecture that lbdet has not, or packed by other means than
            `tools/export.py`.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        packed = load_packed(path)
        self.facts = _facts(packed)
        self.name = f"torch {torch.__version__.split('+')[0]}"
        with torch.device("meta"):  # a header may claim any number of classes, and memory is taken at once
            check_architecture(packed, _float_model(packed, self.facts))
        self.model = rebuild(packed, _float_model(packed, self.facts))
        if threads:
            torch.set_num_threads(threads)

    @torch.no_grad()
    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        batch = [torch.from_numpy(image.transpose(2, 0, 1).copy())]
        if self.facts["task"] == "classification":
            logits = self.model(normalized(batch, torch.device("cpu")))
            return {"scores": logits.softmax(-1)[0].numpy()}
        try:
            (found,) = self.model(to_model(batch, torch.device("cpu")))
        except RuntimeError as error:
            if "should be greater than 0" not in str(error):
                raise
            height, width = image.shape[:2]
            raise UserError(
                f"image: must not be so narrow that no pixel is left of a side, got {width}x{height}; pad it"
            ) from None
        return {key: value.numpy() for key, value in found.items()}

    def int8_layers(self) -> set[str]:
        return set()


def _facts(packed: PackedModel) -> Mapping[str, Any]:
    """Return what the file says of itself: its config, but what the header says goes before."""
    header = packed.header
    known = {
        "architecture": header.architecture,
        "classes": list(header.classes),
        "precision": str(header.precision),
    }
    return read_facts(header.config or None, packed.source, known)


def _float_model(packed: PackedModel, facts: Mapping[str, Any]) -> nn.Module:
    header = packed.header
    detects = facts["task"] == "detection"
    if header.architecture not in (MODELS if detects else CLASSIFIERS):
        raise UserError(
            f"{packed.source}: architecture must be one of lbdet's for {facts['task']}, got "
            f"{header.architecture!a:.60}; load it with the version that packed it"
        )
    with torch.random.fork_rng(devices=[]):
        if detects:
            return build_detector(header.architecture, header.classes, image_size=facts["image_size"])
        return build_classifier(header.architecture, header.classes)
