"""From an image to its detections in one graph: resize, network, boxes, suppression.

    image [H, W, 3] uint8 -> resize -> normalize -> layers -> decode -> best K of each class -> NMS -> best D

What torchvision does around its layers, written so that it becomes one static graph where it can. An SSD's
image is resized to a fixed size, so all behind the resize has fixed shapes; Faster R-CNN keeps the aspect
ratio, so there every shape depends on the image. The image is resized before it is normalized (torchvision:
after), which is the same up to rounding and makes no normalized copy of a large photograph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD, SSDScoringHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lbdet.deploy.onnx_ops import non_max_suppression


def detection_graph(model: nn.Module) -> nn.Module:
    """Return a module `image -> (boxes [N, 4], labels [N], scores [N])` around a lowered detector's layers.

    The image is uint8 `[H, W, 3]`, RGB, of any size; boxes are in its pixels; the best score comes first.
    """
    if isinstance(model, FasterRCNN):
        return FasterRcnnGraph(model).eval()
    assert isinstance(model, SSD)
    return SsdGraph(model).eval()


def feature_maps(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what the heads of an SSD look at, fine to coarse."""
    found = backbone(x)
    return [found] if isinstance(found, Tensor) else list(found.values())


class ClassifierGraph(nn.Module):
    """`image -> scores [C]`, which sum to 1; the image is uint8 `[S, S, 3]`, of the network's own size.

    Args:
        model: a lowered classifier.
        mean, std: of images in [0, 1], as it was trained.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model, self.normalize = model.eval(), _Normalize(mean, std)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(self.normalize(to_batch(image))).softmax(-1)[0]


class SsdGraph(nn.Module):
    """An SSD from an image to detections."""

    size: Tensor
    centers: Tensor
    sides: Tensor

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.classify, self.regress = _scoring_heads(model)
        transform = _transform(model)
        assert transform.fixed_size is not None
        self.width, self.height = transform.fixed_size
        self.normalize = _Normalize(transform.image_mean, transform.image_std)
        self.weights, self.limit = model.box_coder.weights, model.box_coder.bbox_xform_clip
        self.score, self.iou = model.score_thresh, model.nms_thresh
        self.candidates, self.most = model.topk_candidates, model.detections_per_img
        self.register_buffer("size", torch.tensor([self.width, self.height] * 2, dtype=torch.float32))
        anchors = self._anchors(model)
        self.register_buffer("centers", (anchors[:, :2] + anchors[:, 2:]) / 2)
        self.register_buffer("sides", anchors[:, 2:] - anchors[:, :2])

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, labels, scores = self.detections(*self.outputs(self.prepare(image)))
        return boxes * (_width_height(image).repeat(2) / self.size), labels, scores

    def prepare(self, image: Tensor) -> Tensor:
        """Return what the backbone takes, `[1, 3, height, width]`."""
        x = F.interpolate(to_batch(image), (self.height, self.width), mode="bilinear")
        return self.normalize(x)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits `[A, classes + 1]` and the box deltas `[A, 4]` of all anchors."""
        maps = feature_maps(self.backbone, x)
        return _rows(self.classify, maps), _rows(self.regress, maps)

    def detections(self, logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes `[N, 4]` in the resized image, labels and scores; the best score comes first."""
        return self._best(self._decode(deltas), logits.softmax(-1))

    def _anchors(self, model: SSD) -> Tensor:
        x = torch.zeros(1, 3, self.height, self.width)
        with torch.no_grad():
            maps = feature_maps(self.backbone, x)
        return model.anchor_generator(ImageList(x, [(self.height, self.width)]), maps)[0]

    def _decode(self, deltas: Tensor) -> Tensor:
        """Return boxes `[A, 4]` in the resized image, clipped to it."""
        x, y, w, h = self.weights
        centers = deltas[:, :2] / torch.tensor([x, y]) * self.sides + self.centers
        steps = (deltas[:, 2:] / torch.tensor([w, h])).clamp(max=self.limit)
        half = 0.5 * (steps.exp() * self.sides)
        return torch.cat([centers - half, centers + half], 1).clamp(min=0).minimum(self.size)

    def _best(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the best candidates of each class, suppress overlaps, keep the best of all classes."""
        scores, anchor = scores.t()[1:].topk(min(self.candidates, len(boxes)))  # [classes, K]
        boxes = boxes[anchor]
        kept = non_max_suppression(boxes, scores, self.most, self.iou, self.score)
        row, column = kept[:, 0], kept[:, 1]
        place = row * scores.shape[1] + column
        score, order = scores.flatten()[place].sort(descending=True)
        order = order[: self.most]
        return boxes.flatten(0, 1)[place[order]], row[order] + 1, score[: self.most]


class FasterRcnnGraph(nn.Module):
    """A Faster R-CNN from an image to detections, with torchvision's proposals and heads.

    The short side is scaled as torchvision does it, in whole numbers: where its floating point falls just
    short of a whole side (3 % of sizes), this is one pixel larger.
    """

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = model.backbone, model.rpn, model.roi_heads
        transform = _transform(model)
        self.normalize = _Normalize(transform.image_mean, transform.image_std)
        sides: Any = transform.min_size  # torchvision says int and stores a tuple
        self.short, self.long = sides[-1], transform.max_size
        self.multiple = transform.size_divisible

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = self._size(image)
        x = F.interpolate(to_batch(image), (height, width), mode="bilinear")
        x = self.normalize(x)
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        found = self.backbone(x)
        maps = {"0": found} if isinstance(found, Tensor) else found
        images = ImageList(x, [(height, width)])
        proposals, _ = self.rpn(images, maps)
        (detections,), _ = self.roi_heads(maps, proposals, images.image_sizes)
        resized = torch.stack([torch.as_tensor(width), torch.as_tensor(height)]).float()
        boxes = detections["boxes"] * (_width_height(image) / resized).repeat(2)
        return boxes, detections["labels"], detections["scores"]

    def _size(self, image: Tensor) -> Any:
        """Return height and width of the resized image, int64 `[]`: tensors, or they would be constants."""
        sides = torch.stack([torch.as_tensor(image.shape[0]), torch.as_tensor(image.shape[1])])
        short, long = sides.min(), sides.max()
        by_short = self.short * long <= self.long * short
        resized = torch.where(by_short, sides * self.short // short, sides * self.long // long)
        height, width = resized.clamp(min=1)  # of a very narrow image, where torchvision's has no pixels
        return height, width


class _Normalize(nn.Module):
    """(x / 255 - mean) / std of `[1, 3, H, W]`, as one product and one sum."""

    factor: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean_, std_ = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
        self.register_buffer("factor", (1 / (255 * std_)).float())
        self.register_buffer("shift", (-mean_ / std_).float())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


def _scoring_heads(model: SSD) -> tuple[SSDScoringHead, SSDScoringHead]:
    classify = model.get_submodule("head.classification_head")
    regress = model.get_submodule("head.regression_head")
    assert isinstance(classify, SSDScoringHead)
    assert isinstance(regress, SSDScoringHead)
    return classify, regress


def _transform(model: SSD | FasterRCNN) -> GeneralizedRCNNTransform:
    assert isinstance(model.transform, GeneralizedRCNNTransform)
    return model.transform


def to_batch(image: Tensor) -> Tensor:
    """Return an image `[H, W, 3]` as `[1, 3, H, W]` float32."""
    return image.permute(2, 0, 1).unsqueeze(0).float()


def _width_height(image: Tensor) -> Tensor:
    """Return float32 `[2]`; in a traced graph it depends on the image."""
    return torch.stack([torch.as_tensor(image.shape[1]), torch.as_tensor(image.shape[0])]).float()


def _rows(head: SSDScoringHead, maps: list[Tensor]) -> Tensor:
    """Return what a head says of all anchors, `[A, columns]`: map by map, pixel by pixel."""
    found = [layer(x) for layer, x in zip(head.module_list, maps, strict=True)]
    return torch.cat([y.permute(0, 2, 3, 1).reshape(-1, head.num_columns) for y in found])
