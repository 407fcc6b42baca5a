"""The stages of a float model in torch, as its user runs them: torchvision's code, without lbdet's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lbdet.deploy.graph import ClassifierGraph, feature_maps

MODEL_FILE = "float/model.pt"


def torch_call(folder: Path, stage: str, threads: int, compiled: bool) -> Callable[..., Any]:
    """Return what runs a stage: arrays -> whatever it gives.

    Args:
        folder: with `MODEL_FILE`, a whole module.
        stage: of `lbdet.deploy.benchmark.STAGES`.
        compiled: backbone and head by `torch.compile`; it cannot do the rest in one piece.
    """
    torch.set_num_threads(threads)
    model = _model(folder, compiled)
    call = _STAGES[stage](model)

    @torch.inference_mode()
    def run(*arrays: np.ndarray) -> Any:
        return call(*map(torch.from_numpy, arrays))

    return run


@lru_cache(maxsize=1)
def _model(folder: Path, compiled: bool) -> nn.Module:
    model = torch.load(folder / MODEL_FILE, weights_only=False).eval()  # of our own making
    if compiled:
        for name in next(names for kind, names in _COMPILED.items() if isinstance(model, kind)):
            setattr(model, name, torch.compile(model.get_submodule(name)))
    return model


def network(model: nn.Module, x: Tensor) -> Any:
    """Run backbone and head, of a classifier all, on prepared images `[N, 3, H, W]`."""
    if isinstance(model, ClassifierGraph):
        return model.model(x)
    assert isinstance(model, SSD)
    return model.head(feature_maps(model.backbone, x))


def _scaled(image: Tensor) -> Tensor:
    return image.permute(2, 0, 1).float().div_(255)


def _end_to_end(model: nn.Module) -> Callable[..., Any]:
    if isinstance(model, ClassifierGraph):
        return model
    return lambda image: model([_scaled(image)])


def _prepare(model: nn.Module) -> Callable[..., Any]:
    transform = model.get_submodule("transform")
    return lambda image: transform([_scaled(image)])


def _network(model: nn.Module) -> Callable[..., Any]:
    return lambda x: network(model, x)


def _post(model: nn.Module) -> Callable[..., Any]:
    assert isinstance(model, SSD)
    assert isinstance(model.transform, GeneralizedRCNNTransform)
    assert model.transform.fixed_size is not None
    width, height = model.transform.fixed_size
    x = torch.zeros(1, 3, height, width)
    maps = feature_maps(model.backbone, x)

    def post(logits: Tensor, deltas: Tensor) -> Any:
        anchors = model.anchor_generator(ImageList(x, [(height, width)]), maps)
        outputs = {"cls_logits": logits[None], "bbox_regression": deltas[None]}
        return model.postprocess_detections(outputs, anchors, [(height, width)])

    return post


_COMPILED: dict[type[nn.Module], Sequence[str]] = {
    SSD: ("backbone", "head"),
    FasterRCNN: ("backbone",),
    ClassifierGraph: ("model",),
}
"""Kind of model -> the parts that have fixed shapes, or nearly"""
_STAGES = {
    "end_to_end": _end_to_end,
    "prepare": _prepare,
    "network": _network,
    "post": _post,
    "batch": _network,
}
