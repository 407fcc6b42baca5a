"""Small detectors of each kind with distinct scores, and images for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from deploy.toys import randomize
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import Conv2dNormActivation, MultiScaleRoIAlign

from lbdet.convert import Override, calibrate_activations, quantize_model, quantized_layers
from lbdet.data.labelled import LabelledData
from lbdet.data.shapes import draw_scene
from lbdet.metrics.boxes import box_iou
from lbdet.models.detectors import ssdlite320_mobilenet_v3_large
from lbdet.models.resnet_cifar import resnet20_cifar
from lbdet.models.ssd_tiny import ssd_tiny
from lbdet.nn.batch_norm import recalibrate_bn

CLASSES = ("circle", "cross", "ring")
SIZES = [(96, 96), (50, 70), (31, 200), (1, 1), (1, 40), (333, 250)]
"""height and width"""
Found = Mapping[str, np.ndarray]


def tiny_ssd() -> nn.Module:
    model = ssd_tiny(len(CLASSES) + 1)
    return _spread(model, "head.classification_head", 1.5)


def tiny_ssdlite() -> nn.Module:
    """SSDlite itself, with Hardswish, squeeze-and-excitation and residual sums; there is no smaller one."""
    return _spread(ssdlite320_mobilenet_v3_large(len(CLASSES) + 1), "head.classification_head", 1.0)


def tiny_faster_rcnn() -> nn.Module:
    """Three layers, a proposal network and a head of 32 channels; short side 64."""
    backbone = nn.Sequential(
        Conv2dNormActivation(3, 8, 3, 2),
        Conv2dNormActivation(8, 16, 3, 2),
        Conv2dNormActivation(16, 16, 3, 2),
    )
    backbone.out_channels = 16  # type: ignore[assignment]
    classes = len(CLASSES) + 1
    model = FasterRCNN(
        backbone, min_size=64, max_size=128,
        rpn_anchor_generator=AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2), box_head=TwoMLPHead(16 * 25, 32),
        box_predictor=FastRCNNPredictor(32, classes), rpn_pre_nms_top_n_test=60, rpn_post_nms_top_n_test=20,
        box_score_thresh=0.3,
    )  # fmt: skip
    model = _spread(model, "rpn.head.cls_logits", 30.0)
    return _scaled(model, "roi_heads.box_predictor.cls_score", 10.0)


def tiny_classifier() -> nn.Module:
    torch.manual_seed(0)
    model = resnet20_cifar(len(CLASSES))
    randomize(model)
    return model.eval()


DETECTORS = {"ssd_tiny": tiny_ssd, "ssdlite": tiny_ssdlite, "faster_rcnn": tiny_faster_rcnn}


def quantized_detector(
    name: str, precision: str = "W4A8", overrides: Sequence[Override] = (), keep_float: Sequence[str] = ()
) -> nn.Module:
    """Return a detector whose activations are calibrated on the images."""
    torch.manual_seed(0)
    model = DETECTORS[name]()
    quantize_model(model, precision, None, None, overrides, keep_float)
    if any(layer.precision.act_bits for layer in quantized_layers(model).values()):
        calibrate_activations(model, lambda: [[as_input(image)] for image in scenes(2)])
    return model


def scenes(count: int, size: tuple[int, int] = (96, 96)) -> list[np.ndarray]:
    """Return pictures, uint8 `[H, W, 3]`."""
    height, width = size
    images = [draw_scene(0, "val", index).image for index in range(count)]
    return [np.ascontiguousarray(np.resize(image, (height, width, 3))) for image in images]


def as_input(image: np.ndarray) -> Tensor:
    """Return a picture as torchvision's detectors take it."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255


@torch.no_grad()
def in_torch(model: nn.Module, image: np.ndarray) -> dict[str, np.ndarray]:
    (found,) = model([as_input(image)])
    return {key: value.numpy() for key, value in found.items()}


def assert_same_detections(found: Found, expected: Found, tolerance: float = 1e-3) -> None:
    """Check that both have the same detections, in any order of equal scores."""
    assert {key: value.dtype for key, value in found.items()} == {
        "boxes": np.float32, "labels": np.int64, "scores": np.float32,
    }  # fmt: skip
    assert len(found["scores"]) == len(expected["scores"])
    assert bool((np.diff(found["scores"]) <= 1e-6).all()), "the best comes first"
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=tolerance)
    free = list(range(len(expected["scores"])))
    for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
        partners = [
            j for j in free
            if expected["labels"][j] == label
            and abs(expected["scores"][j] - score) <= tolerance
            and np.abs(expected["boxes"][j] - box).max() <= max(tolerance * 100, 0.05)
        ]  # fmt: skip
        assert partners, f"none of {len(free)} is like {label} at {box} with {score}"
        free.remove(partners[0])


def share_kept(found: Found, expected: Found, iou: float = 0.7) -> float:
    """Return the share of expected detections that have one of the same class at the same place."""
    if not len(expected["scores"]):
        return 1.0
    overlap = box_iou(expected["boxes"][:, None].astype(float), found["boxes"][None].astype(float))
    same = expected["labels"][:, None] == found["labels"][None]
    return float(((overlap >= iou) & same).any(1).mean())


@torch.no_grad()
def _spread(model: nn.Module, classify: str, factor: float) -> nn.Module:
    randomize(model)
    recalibrate_bn(
        model, [[as_input(image) for image in scenes(4)]]
    )  # or nothing would reach the last layers
    return _scaled(model, classify, factor)


@torch.no_grad()
def _scaled(model: nn.Module, part: str, factor: float) -> nn.Module:
    """Make the scores differ, so that rounding does not change their order."""
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.get_submodule(part).named_parameters():
        parameter.copy_(
            torch.randn(parameter.shape, generator=g) * (0.05 if name.endswith("weight") else 0.1)
        )
        parameter.mul_(factor)
    return model.eval()


def labelled() -> LabelledData:
    return LabelledData(CLASSES, np.zeros(4, np.int64), np.stack(scenes(4, (32, 32))))
