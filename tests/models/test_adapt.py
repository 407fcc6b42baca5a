"""A class that both models know scores exactly as before; the others start afresh."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from lbdet.classes import COCO80, COCO90, VOC20
from lbdet.errors import UserError
from lbdet.models import MODELS
from lbdet.models.adapt import Adaptation, adapt_predictors, infer_classes, predictors

OLD = ("airplane", "dog", "zebra", "tv", "person")
NEW = ("person", "tvmonitor", "rocket", "aeroplane")
KEPT_OLD, KEPT_NEW = [0, 5, 4, 1], [0, 1, 2, 4]  # rows of background, person, tv(monitor), aeroplane
FRESH = 3  # rocket


def head_outputs(model: nn.Module) -> dict[str, Tensor]:
    """Raw predictions for fixed random features; float64, as the number of rows changes float32 sums."""
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if isinstance(model, FasterRCNN):
            logits, boxes = model.roi_heads.box_predictor(
                torch.randn(3, 1024, dtype=torch.float64, generator=generator)
            )
            return {"cls_logits": logits, "boxes_of_classes": boxes.view(3, -1, 4).transpose(1, 2)}
        features = []
        for head in model.head.classification_head.module_list:
            channels = next(layer.in_channels for layer in head.modules() if isinstance(layer, nn.Conv2d))
            features.append(torch.randn(1, channels, 3, 3, dtype=torch.float64, generator=generator))
        return model.head(features)


@pytest.mark.parametrize("name", ["ssd_tiny", "ssdlite320_mobilenet_v3_large", "fasterrcnn_resnet18_fpn"])
def test_shared_classes_and_background_predict_as_before_and_new_ones_as_freshly_built(name: str) -> None:
    torch.manual_seed(0)
    before, fresh = MODELS[name](len(OLD) + 1), MODELS[name](len(NEW) + 1)
    tensors, adaptation = adapt_predictors(before.state_dict(), fresh, OLD, NEW)
    fresh_rows = {key: fresh.state_dict()[key].clone() for key in predictors(fresh)}
    fresh.load_state_dict(tensors)
    assert adaptation == Adaptation(("person", "tvmonitor", "aeroplane"), ("rocket",), 5)
    old, new = head_outputs(before), head_outputs(fresh)
    for output in old:
        if output == "bbox_regression":
            assert torch.equal(new[output], old[output])
        else:
            torch.testing.assert_close(
                new[output][..., KEPT_NEW], old[output][..., KEPT_OLD], rtol=1e-12, atol=1e-12
            )
    for key, rows in predictors(fresh).items():
        adapted = tensors[key].view(-1, len(NEW) + 1, rows, *tensors[key].shape[1:])
        known = before.state_dict()[key].view(-1, len(OLD) + 1, rows, *tensors[key].shape[1:])
        assert torch.equal(adapted[:, KEPT_NEW], known[:, KEPT_OLD])
        assert torch.equal(adapted[:, FRESH], fresh_rows[key].view_as(adapted)[:, FRESH])


def test_every_detector_names_predictors_that_its_state_dict_has() -> None:
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build(4)
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        assert all(shapes[key][0] % (4 * rows) == 0 for key, rows in predictors(model).items()), name


def test_a_model_that_is_no_known_detector_is_our_bug() -> None:
    with pytest.raises(TypeError, match="predictors of Linear are not known"):
        predictors(nn.Linear(2, 2))


def test_the_given_tensors_stay_as_they_are() -> None:
    before = MODELS["ssd_tiny"](len(OLD) + 1).state_dict()
    copies = {key: tensor.clone() for key, tensor in before.items()}
    adapt_predictors(before, MODELS["ssd_tiny"](len(NEW) + 1), OLD, NEW)
    assert all(torch.equal(before[key], copy) for key, copy in copies.items())


def test_half_precision_predictors_are_adapted_in_the_models_dtype() -> None:
    half = {key: tensor.half() for key, tensor in MODELS["ssd_tiny"](len(OLD) + 1).state_dict().items()}
    model = MODELS["ssd_tiny"](len(NEW) + 1)
    tensors, _ = adapt_predictors(half, model, OLD, NEW)
    assert {tensors[key].dtype for key in predictors(model)} == {torch.float32}


def test_a_wrong_number_of_class_names_is_refused() -> None:
    before = MODELS["ssd_tiny"](len(OLD) + 1).state_dict()
    with pytest.raises(UserError) as error:
        adapt_predictors(before, MODELS["ssd_tiny"](len(NEW) + 1), OLD[:4], NEW)
    assert str(error.value) == (
        "classes of the weights: must be the 5 that predictors score, got 4; "
        "list them as weights_classes in the order of their rows"
    )


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (VOC20, "20 of 20 classes keep their rows (from 90); new: none"),
        (("cat", "unicorn", "elf"), "1 of 3 classes keep their rows (from 90); new: unicorn, elf"),
    ],
)
def test_an_adaptation_prints_as_one_line(classes: tuple[str, ...], line: str) -> None:
    before = MODELS["ssd_tiny"](91).state_dict()
    _, adaptation = adapt_predictors(before, MODELS["ssd_tiny"](len(classes) + 1), COCO90, classes)
    assert str(adaptation) == line


@pytest.mark.parametrize(
    ("num_classes", "found"), [(91, COCO90), (81, COCO80), (21, VOC20), (len(NEW) + 1, NEW)]
)
def test_classes_are_told_from_the_number_of_rows(num_classes: int, found: tuple[str, ...]) -> None:
    tensors, model = MODELS["ssd_tiny"](num_classes).state_dict(), MODELS["ssd_tiny"](len(NEW) + 1)
    assert infer_classes(tensors, model, NEW, "w.pth") == found


def test_as_many_rows_as_no_list_has_are_refused() -> None:
    tensors, model = MODELS["ssd_tiny"](8).state_dict(), MODELS["ssd_tiny"](len(NEW) + 1)
    with pytest.raises(UserError) as error:
        infer_classes(tensors, model, NEW, "w.pth")
    assert str(error.value) == (
        "w.pth: weights must tell their classes, got 7 that fit no known list; "
        "list them as weights_classes, or save them in a .safetensors file's metadata"
    )


def test_as_many_rows_as_both_a_known_list_and_other_own_classes_have_are_refused() -> None:
    own = tuple(f"part {i}" for i in range(20))
    tensors, model = MODELS["ssd_tiny"](21).state_dict(), MODELS["ssd_tiny"](21)
    with pytest.raises(UserError, match="got 20 that could be a known list or the model's own classes; "):
        infer_classes(tensors, model, own, "w.pth")
    in_coco_spelling = tuple({"sofa": "couch"}.get(name, name) for name in VOC20)
    assert infer_classes(tensors, model, in_coco_spelling, "w.pth") == in_coco_spelling
