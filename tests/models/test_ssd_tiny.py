"""The tiny detector: its shape, its anchors, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from lbdet.data.shapes import SHAPE_CLASSES, draw_scene
from lbdet.models.ssd_tiny import SIZE, TinyBackbone, ssd_tiny


def _batch(indices: range) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    scenes = [draw_scene(0, "train", index) for index in indices]
    images = [torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255 for scene in scenes]
    targets = [
        {
            "boxes": torch.tensor([o.box for o in scene.objects], dtype=torch.float32),
            "labels": torch.tensor([SHAPE_CLASSES.index(o.name) + 1 for o in scene.objects]),
        }
        for scene in scenes
    ]
    return images, targets


def test_it_has_about_a_third_of_a_million_parameters() -> None:
    assert 200_000 < sum(p.numel() for p in ssd_tiny(7).parameters()) < 400_000


def test_the_backbone_gives_three_maps_at_strides_8_16_and_32() -> None:
    maps = TinyBackbone().eval()(torch.zeros(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps.values()] == [(2, 64, 8, 12), (2, 128, 4, 6), (2, 128, 2, 3)]
    assert tuple(m.shape[1] for m in maps.values()) == TinyBackbone.out_channels


def test_batch_norm_follows_every_convolution_of_the_backbone() -> None:
    layers = [m for m in TinyBackbone().modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert [type(m) for m in layers] == [nn.Conv2d, nn.BatchNorm2d] * (len(layers) // 2)


def test_training_reaches_every_parameter() -> None:
    model = ssd_tiny(7)
    losses = model(*_batch(range(4)))
    sum(losses.values()).backward()
    assert set(losses) == {"bbox_regression", "classification"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("num_classes", [2, 21])
def test_detections_lie_in_the_picture_and_have_the_classes(num_classes: int) -> None:
    model = ssd_tiny(num_classes).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 50, 80)])
    assert len(found["boxes"]) > 0
    assert found["boxes"].min() >= 0
    assert (found["boxes"][:, 2:].max(0).values <= torch.tensor([80, 50])).all()
    assert set(found["labels"].tolist()) <= set(range(1, num_classes))


def test_the_weights_are_a_function_of_torchs_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in ssd_tiny(7).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_most_shapes_have_an_anchor_that_overlaps_them_by_half() -> None:
    model = ssd_tiny(7)
    images, targets = _batch(range(40))
    resized, targets = model.transform(images, targets)
    assert resized.tensors.shape[-2:] == (SIZE[1], SIZE[0])
    one = ImageList(resized.tensors[:1], resized.image_sizes[:1])
    (anchors,) = model.anchor_generator(one, list(model.backbone(one.tensors).values()))
    best = torch.cat([box_iou(t["boxes"], anchors).max(1).values for t in targets])
    assert (best > 0.5).float().mean() > 0.8


@pytest.mark.slow
def test_it_learns_four_pictures_by_heart() -> None:
    torch.manual_seed(0)
    model, (images, targets) = ssd_tiny(7), _batch(range(4))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(150):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(images)
    for detections, target in zip(found, targets, strict=True):
        sure = detections["scores"] > 0.5
        assert sorted(detections["labels"][sure].tolist()) == sorted(target["labels"].tolist())
