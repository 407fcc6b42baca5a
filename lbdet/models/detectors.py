"""The detectors: torchvision's architectures, untrained, with batch norm that can be trained.

torchvision builds its Faster R-CNN with `FrozenBatchNorm2d` as soon as pretrained weights are asked for. Here
every detector is built without weights, so batch norm is `nn.BatchNorm2d` and all layers train; freezing is
the user's choice (`lbdet.nn.batch_norm`). The keys of the state dict are torchvision's, so its
checkpoints load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lbdet.errors import UserError


def ssdlite320_mobilenet_v3_large(num_classes: int) -> SSD:
    """Build torchvision's SSDlite for 320 x 320 images; batch norm has eps 1e-3 and momentum 0.03."""
    return detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=num_classes
    )


def ssd300_vgg16(num_classes: int) -> SSD:
    """Build torchvision's SSD for 300 x 300 images; without batch norm, it hardly trains from scratch."""
    return detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_classes)


def fasterrcnn_resnet18_fpn(num_classes: int) -> FasterRCNN:
    """Build Faster R-CNN on a ResNet-18 with a feature pyramid, short side 800; torchvision has the parts."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return FasterRCNN(backbone, num_classes)


def fasterrcnn_resnet50_fpn(num_classes: int) -> FasterRCNN:
    """Build torchvision's Faster R-CNN on a ResNet-50 with a feature pyramid, short side 800."""
    return detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=num_classes)


def fasterrcnn_mobilenet_v3_large_320_fpn(num_classes: int) -> FasterRCNN:
    """Build torchvision's Faster R-CNN on a MobileNetV3 with a feature pyramid, short side 320."""
    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes
    )


def set_image_size(model: nn.Module, image_size: int) -> None:
    """Let a Faster R-CNN scale the short side of its images to `image_size` pixels.

    The limit of the long side keeps its ratio to the short side (1333/800, or 640/320).

    Raises:
        UserError: the detector is an SSD, whose input size belongs to the architecture.
    """
    if not isinstance(model, FasterRCNN):
        raise UserError(
            f"model.image_size: the input size of an {type(model).__name__} is fixed, got {image_size}; "
            "leave it out or choose a Faster R-CNN"
        )
    if image_size < 1:
        raise UserError(
            f"model.image_size: must be at least 1 pixel, got {image_size}; give the length of the short side"
        )
    transform = model.transform
    assert isinstance(transform, GeneralizedRCNNTransform)
    (short_side,) = transform.min_size  # pyright: ignore[reportGeneralTypeIssues] - torchvision says int
    transform.max_size = round(image_size * transform.max_size / short_side)
    transform.min_size = (image_size,)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class Backbone:
    """Which classifier of torchvision's a detector's backbone is a part of."""

    classifier: str
    """torchvision's name of it"""
    key: Callable[[str], str | None]
    """A key of the classifier's state dict -> the detector's key, or None where it has no such layer."""


def _resnet_key(key: str) -> str | None:
    return None if key.startswith("fc.") else f"backbone.body.{key}"


def _mobilenet_key(key: str) -> str | None:
    return f"backbone.body.{key.removeprefix('features.')}" if key.startswith("features.") else None


def _vgg_key(key: str) -> str | None:
    """SSD taps VGG at its fourth pooling, layer 23, from where its own numbering begins anew."""
    if not (layer := re.match(r"features\.(\d+)\.(.+)", key)):
        return None
    index = int(layer[1])
    return (
        f"backbone.features.{index}.{layer[2]}" if index < 23 else f"backbone.extra.0.{index - 23}.{layer[2]}"
    )


BACKBONES: dict[str, Backbone] = {
    "ssd300_vgg16": Backbone("vgg16", _vgg_key),
    "fasterrcnn_resnet18_fpn": Backbone("resnet18", _resnet_key),
    "fasterrcnn_resnet50_fpn": Backbone("resnet50", _resnet_key),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Backbone("mobilenet_v3_large", _mobilenet_key),
}
"""The detectors that can start from a classifier. ssdlite320 cannot: its last layers have half the width.
ssd300 scales its inputs as `IMAGENET1K_FEATURES` needs them, not as torchvision's other VGG weights do."""


EPS_ZERO_FILE = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url.rsplit("/", maxsplit=1)[-1]
"""The one published file whose batch norm was trained without eps."""


def absorb_zero_eps(tensors: Mapping[str, Tensor], eps: float = 1e-5) -> dict[str, Tensor]:
    """Let batch norm with `eps` compute what it computed with eps = 0: gamma *= sqrt((var + eps) / var).

    torchvision sets eps to 0 in the layers when it loads `EPS_ZERO_FILE` by name. PyTorch refuses to train
    batch norm that way, and an eps in a layer would be lost in the next checkpoint; so the weights take it
    in. A channel without variance, which would have no output at eps = 0, is left as it is.

    Returns:
        A new dict; tensors that do not change are shared.
    """
    absorbed = dict(tensors)
    for key, var in tensors.items():
        if key.endswith("running_var"):
            gamma = key.removesuffix("running_var") + "weight"
            factor = torch.where(var > 0, (1 + eps / var.double()).sqrt(), 1.0)
            absorbed[gamma] = (tensors[gamma] * factor).to(tensors[gamma].dtype)
    return absorbed
