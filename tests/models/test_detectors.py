"""Every detector of MODELS keeps one contract; weights and backbones go where torchvision puts them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from lbdet.classes import COCO90, VOC20
from lbdet.errors import UserError
from lbdet.models import MODELS, build_detector
from lbdet.models.detectors import BACKBONES, EPS_ZERO_FILE, absorb_zero_eps
from lbdet.nn.batch_norm import set_training_mode

CLASSES = ("circle", "square", "star", "cross")
SSDLITE = "ssdlite320_mobilenet_v3_large"
SSDLITE_COCO = Path("datasets/weights/ssdlite320_mobilenet_v3_large_coco_v1_int8.pth")
RESNET18 = Path("datasets/weights/resnet18_imagenet_v1_hybrid_fp16.pth")


@pytest.fixture(scope="module", params=MODELS)
def built(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    size = 96 if request.param.startswith("fasterrcnn") else None
    return request.param, build_detector(request.param, CLASSES, image_size=size)


def images_and_targets() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 96, 120, generator=generator), torch.rand(3, 110, 96, generator=generator)]
    boxes = torch.tensor([[10.0, 20.0, 60.0, 80.0], [30.0, 5.0, 90.0, 40.0]])
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 4])} for _ in images]


def test_a_detector_in_training_returns_finite_losses(built: tuple[str, nn.Module]) -> None:
    _, model = built
    set_training_mode(model, "train")
    losses = model(*images_and_targets())
    assert len(losses) >= 2
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_a_detector_in_evaluation_returns_boxes_labels_and_scores(built: tuple[str, nn.Module]) -> None:
    _, model = built
    images, _ = images_and_targets()
    with torch.no_grad():
        found = model.eval()(images)
    assert len(found) == len(images)
    for detections in found:
        assert set(detections) == {"boxes", "labels", "scores"}
        n = len(detections["scores"])
        assert detections["boxes"].shape == (n, 4)
        assert detections["labels"].shape == (n,)
        assert ((detections["labels"] >= 1) & (detections["labels"] <= len(CLASSES))).all()


def test_all_layers_of_a_detector_train_and_its_batch_norm_is_not_of_the_frozen_kind(
    built: tuple[str, nn.Module],
) -> None:
    name, model = built
    kinds = {type(module) for module in model.modules()}
    assert FrozenBatchNorm2d not in kinds
    assert (nn.BatchNorm2d in kinds) == (name != "ssd300_vgg16")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if name in torchvision.models.list_models()])
def test_a_detector_has_as_many_parameters_as_torchvision_publishes(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name](91)
    published = torchvision.models.get_model_weights(name)["DEFAULT"].meta["num_params"]
    batch_norm = sum(m.weight.numel() * 2 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    frozen_in_torchvision = batch_norm if name.startswith("fasterrcnn") else 0
    assert sum(p.numel() for p in model.parameters()) - frozen_in_torchvision == published


def test_image_size_scales_the_short_side_of_a_faster_rcnn_and_its_limit() -> None:
    model = build_detector("fasterrcnn_mobilenet_v3_large_320_fpn", CLASSES, image_size=160)
    images, _ = model.transform([torch.rand(3, 200, 250), torch.rand(3, 100, 500)])
    assert images.image_sizes == [(160, 200), (64, 320)]


def test_an_image_size_for_an_ssd_is_refused() -> None:
    with pytest.raises(UserError) as error:
        build_detector("ssd_tiny", CLASSES, image_size=256)
    assert str(error.value) == (
        "model.image_size: the input size of an SSD is fixed, got 256; leave it out or choose a Faster R-CNN"
    )


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(UserError, match=r"model name: must be one of .*, got 'ssdlite320'; closest: '"):
        build_detector("ssdlite320", CLASSES)


def test_weights_and_weights_backbone_together_are_refused() -> None:
    with pytest.raises(UserError, match="weights_backbone: is part of weights, got both"):
        build_detector("fasterrcnn_resnet18_fpn", CLASSES, "a.pth", "b.pth")


def test_a_backbone_for_a_detector_that_has_none_to_load_is_refused() -> None:
    with pytest.raises(UserError, match=f"weights_backbone: model must be one of .*, got {SSDLITE}"):
        build_detector(SSDLITE, CLASSES, weights_backbone="IMAGENET1K_V1")


def test_saved_weights_come_back_with_the_classes_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = build_detector("ssd_tiny", CLASSES)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    again = build_detector("ssd_tiny", CLASSES, str(tmp_path / "w.pth"))
    for key, tensor in trained.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_the_classes_of_a_file_decide_which_rows_are_kept_unless_the_user_names_others(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    trained, path = build_detector("ssd_tiny", CLASSES), str(tmp_path / "w.safetensors")
    bias = "head.classification_head.module_list.0.bias"
    with torch.no_grad():
        trained.get_parameter(bias).view(-1, 5)[:] = torch.arange(5.0)
    save_file(trained.state_dict(), path, {"classes": json.dumps(CLASSES)})
    found = build_detector("ssd_tiny", ("cross", "circle"), path)
    assert found.get_parameter(bias).view(-1, 3)[0].tolist() == [0, 4, 1]
    found = build_detector("ssd_tiny", ("cross", "circle"), path, weights_classes=("cross", "a", "b", "c"))
    assert found.get_parameter(bias).view(-1, 3)[0].tolist() == [0, 1, 0]


def test_a_file_that_names_another_architecture_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "w.safetensors")
    save_file(build_detector("ssd_tiny", CLASSES).state_dict(), path, {"architecture": "ssd300_vgg16"})
    with pytest.raises(UserError, match="weights must be of ssd_tiny, got ssd300_vgg16; choose that model"):
        build_detector("ssd_tiny", CLASSES, path)


def test_weights_of_another_model_are_refused_before_their_classes_are_asked_for(tmp_path: Path) -> None:
    torch.save(build_detector("ssd_tiny", CLASSES).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="got a checkpoint of another model: keys missing: "):
        build_detector(SSDLITE, CLASSES, str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "ssd300_vgg16" else ()) for n in BACKBONES]
)
def test_a_classifier_fills_the_backbone_so_that_both_compute_the_same_features(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    classifier = torchvision.models.get_model(BACKBONES[name].classifier, weights=None)
    if (
        name == "fasterrcnn_mobilenet_v3_large_320_fpn"
    ):  # torchvision's detector has PyTorch's eps, not MobileNet's
        for module in classifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-5
    if name == "ssd300_vgg16":
        del classifier.classifier  # half a gigabyte that the test can do without
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    model = build_detector(name, CLASSES, weights_backbone=str(tmp_path / "classifier.pth"))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(
            detector_features(model.eval(), image), classifier_features(classifier.eval(), image)
        )


def detector_features(model: nn.Module, image: Tensor) -> Tensor:
    if model.backbone._get_name() == "SSDFeatureExtractorVGG":
        return model.backbone.extra[0][:-1](model.backbone.features(image))
    return list(model.backbone.body(image).values())[-1]


def classifier_features(classifier: nn.Module, image: Tensor) -> Tensor:
    """The last feature map; VGG's without its last pooling, which SSD replaces."""
    if classifier._get_name() == "VGG":
        return classifier.features[:-1](image)
    layers = [m for name, m in classifier.named_children() if name not in ("avgpool", "fc", "classifier")]
    return nn.Sequential(*layers)(image)


def test_a_backbone_of_another_size_is_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(
        UserError, match=r"got a checkpoint of another model: keys missing: 0, unexpected: 9\d "
    ):
        build_detector("fasterrcnn_resnet18_fpn", CLASSES, weights_backbone=str(tmp_path / "resnet34.pth"))


def test_absorbed_eps_computes_what_frozen_batch_norm_without_eps_does() -> None:
    frozen = FrozenBatchNorm2d(5, eps=0.0)
    frozen.weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    frozen.bias, frozen.running_mean = torch.randn(5), torch.randn(5)
    frozen.running_var = torch.tensor([1.0, 1e-3, 1e-5, 1e-9, 1e-12])
    layer = nn.BatchNorm2d(5).eval()
    layer.load_state_dict(absorb_zero_eps(frozen.state_dict()), strict=False)
    x = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(layer(x), frozen(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("file", "absorbed"), [(EPS_ZERO_FILE, True), ("mine.pth", False)])
def test_only_torchvisions_file_without_eps_has_eps_absorbed(
    file: str, absorbed: bool, tmp_path: Path
) -> None:
    """Its name decides; a small detector stands in for the ResNet-50."""
    tensors = build_detector("ssd_tiny", CLASSES).state_dict()
    torch.save({k: t for k, t in tensors.items() if not k.endswith("num_batches_tracked")}, tmp_path / file)
    model = build_detector("ssd_tiny", CLASSES, str(tmp_path / file))
    gamma = next(module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    expected = torch.full_like(gamma, (1 + 1e-5) ** 0.5 if absorbed else 1.0)
    torch.testing.assert_close(gamma, expected, rtol=0, atol=1e-7)


@pytest.mark.skipif(not RESNET18.exists(), reason=f"{RESNET18} is absent; run make data")
def test_the_half_precision_imagenet_resnet_becomes_a_float_backbone() -> None:
    model = build_detector("fasterrcnn_resnet18_fpn", VOC20, weights_backbone=str(RESNET18))
    stored = torch.load(RESNET18, weights_only=True)["layer4.1.conv2.weight"]
    weight = model.backbone.body.layer4[1].conv2.weight
    assert stored.dtype == torch.float16
    assert weight.dtype == torch.float32
    assert torch.equal(weight, stored.float())


@pytest.mark.skipif(not SSDLITE_COCO.exists(), reason=f"{SSDLITE_COCO} is absent; run make data")
def test_coco_ssdlite_adapted_to_voc_scores_each_class_as_before(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        voc = build_detector(SSDLITE, VOC20, str(SSDLITE_COCO)).eval()
    assert "20 of 20 classes keep their rows (from 90); new: none" in caplog.text
    coco = build_detector(SSDLITE, COCO90, str(SSDLITE_COCO)).eval()
    image = torch.rand(1, 3, 320, 320, dtype=torch.float64)  # how rows are grouped changes float32 sums
    with torch.no_grad():
        before, after = (m.head(list(m.backbone(image).values())) for m in (coco.double(), voc.double()))
    spelled = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle"}
    spelled |= {"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}
    rows = [0] + [1 + COCO90.index(spelled.get(name, name)) for name in VOC20]
    torch.testing.assert_close(after["cls_logits"], before["cls_logits"][..., rows], rtol=1e-12, atol=1e-9)
    assert torch.equal(after["bbox_regression"], before["bbox_regression"])
    adapted, known = (
        m.head.classification_head.module_list[0][1].weight.view(6, -1, 672) for m in (voc, coco)
    )
    assert torch.equal(adapted, known[:, rows])
