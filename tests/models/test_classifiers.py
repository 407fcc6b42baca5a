"""Every classifier keeps one contract; weights load strictly and the final layer follows the classes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lbdet.data.labelled import LabelledEvalSet, stack_images
from lbdet.data.loader import eval_batches
from lbdet.data.tiny_imagenet import read_tiny_imagenet
from lbdet.errors import UserError
from lbdet.metrics.topk import top_k
from lbdet.models.classifiers import CLASSIFIERS, build_classifier, final_layer
from lbdet.models.weights import Weights

CLASSES = ("cat", "dog", "bird")
SMALL = "resnet20_cifar"
RESNET18 = Path("datasets/weights/resnet18_imagenet_v1_hybrid_fp16.pth")
TINY = Path("datasets/tiny_imagenet_20")
IMAGENET = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]


@pytest.fixture(scope="module", params=CLASSIFIERS)
def built(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    return request.param, build_classifier(request.param, CLASSES)


def small(classes=CLASSES, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_classifier(SMALL, classes)


def saved(path: Path, model: nn.Module, **metadata: str) -> str:
    save_file(model.state_dict(), path, metadata)
    return str(path)


def fc_of(model: nn.Module) -> Tensor:
    return torch.cat([model.get_parameter("fc.weight"), model.get_parameter("fc.bias")[:, None]], 1).detach()


def test_a_classifier_gives_a_logit_a_class_and_all_of_it_trains(built: tuple[str, nn.Module]) -> None:
    _, model = built
    logits = model.train()(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert logits.shape == (2, len(CLASSES))
    assert logits.isfinite().all()
    assert all(p.requires_grad for p in model.parameters())


def test_the_final_layer_is_the_one_that_scores_the_classes(built: tuple[str, nn.Module]) -> None:
    name, model = built
    layer = model.get_submodule(final_layer(model))
    assert isinstance(layer, nn.Linear)
    assert layer.out_features == len(CLASSES)
    expected = {"mobilenet_v2": "classifier.1", "alexnet": "classifier.6"}.get(name, "fc")
    assert final_layer(model) == expected


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name in torchvision.models.list_models()])
def test_a_classifier_has_as_many_parameters_as_torchvision_publishes(name: str) -> None:
    with torch.device("meta"):
        model = CLASSIFIERS[name](1000)
    published = torchvision.models.get_model_weights(name)["DEFAULT"].meta["num_params"]
    assert sum(p.numel() for p in model.parameters()) == published


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(UserError) as caught:
        build_classifier("resnet19", CLASSES)
    assert str(caught.value) == (
        f"model name: must be one of {', '.join(CLASSIFIERS)}, got 'resnet19'; closest: 'resnet18'"
    )


def test_saved_weights_come_back_whole_for_the_same_number_of_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = small()
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        again = build_classifier(SMALL, ("a", "b", "c"), str(tmp_path / "w.pth"))
    for key, tensor in trained.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert "w.pth: all 3 rows of 'fc' are kept, taken for the same classes" in caplog.text


def test_rows_move_with_the_names_that_the_file_gives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = small(seed=1)
    path = saved(tmp_path / "w.safetensors", trained, classes=json.dumps(CLASSES), architecture=SMALL)
    wanted = ("bird", "lion", "cat", "tiger")
    fresh = small(wanted, seed=2)
    torch.manual_seed(2)
    with caplog.at_level(logging.INFO):
        found = build_classifier(SMALL, wanted, path)
    rows = {"bird": fc_of(trained)[2], "cat": fc_of(trained)[0]}
    expected = [rows.get(name, fc_of(fresh)[i]) for i, name in enumerate(wanted)]
    assert torch.equal(fc_of(found), torch.stack(expected))
    assert "2 of 4 classes keep their rows (from 3); new: lion, tiger" in caplog.text
    assert torch.equal(
        found.state_dict()["layer3.2.conv2.weight"], trained.state_dict()["layer3.2.conv2.weight"]
    )


def test_as_many_classes_of_other_order_are_still_sorted_by_the_names_of_the_file(tmp_path: Path) -> None:
    trained = small()
    path = saved(tmp_path / "w.safetensors", trained, classes=json.dumps(CLASSES))
    assert torch.equal(fc_of(build_classifier(SMALL, CLASSES[::-1], path)), fc_of(trained).flip(0))


def test_the_users_weights_classes_go_before_those_of_the_file(tmp_path: Path) -> None:
    trained = small()
    path = saved(tmp_path / "w.safetensors", trained, classes=json.dumps(CLASSES))
    found = build_classifier(SMALL, CLASSES, path, weights_classes=("x", "bird", "y"))
    assert torch.equal(fc_of(found)[2], fc_of(trained)[1])
    assert not torch.equal(fc_of(found)[1], fc_of(trained)[1])


def test_a_class_that_voc_and_coco_spell_differently_is_one(tmp_path: Path) -> None:
    trained = small(("airplane", "tvmonitor", "cat"))
    path = saved(tmp_path / "w.safetensors", trained, classes='["airplane", "tvmonitor", "cat"]')
    found = build_classifier(SMALL, ("tv", "aeroplane"), path)
    assert torch.equal(fc_of(found), fc_of(trained)[[1, 0]])


def test_no_shared_class_leaves_the_final_layer_random(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", small(), classes=json.dumps(CLASSES))
    fresh = small(("x", "y"), seed=3)
    torch.manual_seed(3)
    assert torch.equal(fc_of(build_classifier(SMALL, ("x", "y"), path)), fc_of(fresh))


def test_weights_of_unnamed_other_classes_leave_the_final_layer_random_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = small(tuple("abcdefg"), seed=1)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    fresh = small(seed=2)
    torch.manual_seed(2)
    with caplog.at_level(logging.INFO):
        found = build_classifier(SMALL, CLASSES, str(tmp_path / "w.pth"))
    assert torch.equal(fc_of(found), fc_of(fresh))
    assert torch.equal(found.state_dict()["conv1.weight"], trained.state_dict()["conv1.weight"])
    assert "'fc' starts afresh for 3 classes, as the weights score 7 others" in caplog.text


def test_weights_classes_of_another_number_are_refused(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        build_classifier(SMALL, ("cat",), str(tmp_path / "w.pth"), weights_classes=("cat", "dog"))
    assert str(caught.value) == (
        "classes of the weights: must be the 3 that the final layer scores, got 2; "
        "list them as weights_classes in the order of its rows"
    )


def test_torchvisions_weights_keep_rows_by_imagenets_names_unless_there_are_1000_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    published = torchvision.models.resnet18(weights=None)
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1

    def no_network(source: str, architecture: str | None = None) -> Weights:
        return Weights(dict(published.state_dict()), entry.url, None, {})

    monkeypatch.setattr("lbdet.models.classifiers.load_weights", no_network)
    some = build_classifier("resnet18", ("teapot", "nonsense", "goldfish"), "IMAGENET1K_V1")
    rows = fc_of(published)[[IMAGENET.index("teapot"), IMAGENET.index("goldfish")]]
    assert torch.equal(fc_of(some)[[0, 2]], rows)
    as_folders = build_classifier("resnet18", [f"n{i:08d}" for i in range(1000)], "IMAGENET1K_V1")
    assert torch.equal(fc_of(as_folders), fc_of(published))


def test_a_file_of_another_architecture_is_refused_by_name_or_by_keys(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", small(), architecture="resnet18")
    with pytest.raises(UserError, match=f"weights must be of {SMALL}, got resnet18; choose that model"):
        build_classifier(SMALL, CLASSES, path)
    torch.save(small().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="got a checkpoint of another model: keys missing: "):
        build_classifier("resnet18", CLASSES, str(tmp_path / "w.pth"))


def test_a_final_layer_of_another_width_or_a_lone_bias_is_refused(tmp_path: Path) -> None:
    for key, shape in (("fc.weight", (3, 65)), ("fc.bias", (4,)), ("fc.weight", ())):
        tensors = {**small().state_dict(), key: torch.zeros(shape)}
        torch.save(tensors, tmp_path / "w.pth")
        with pytest.raises(UserError, match=f"of other shape: 1 .{key}"):
            build_classifier(SMALL, CLASSES, str(tmp_path / "w.pth"))


def test_nan_in_weights_is_refused(tmp_path: Path) -> None:
    tensors = small().state_dict()
    tensors["layer1.0.conv1.weight"][0] = float("nan")
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"weights must be finite, got nan or inf in 'layer1\.0\.conv1\.weight'"
    ):
        build_classifier(SMALL, CLASSES, str(tmp_path / "w.pth"))


@pytest.mark.skipif(not RESNET18.exists(), reason=f"{RESNET18} is absent; run make data")
def test_the_half_precision_imagenet_resnet_loads_as_float() -> None:
    model = build_classifier("resnet18", IMAGENET, str(RESNET18))
    stored = torch.load(RESNET18, weights_only=True)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert torch.equal(tensor, stored[key].to(tensor)), key


@pytest.mark.skipif(not (RESNET18.exists() and TINY.exists()), reason="no weights or data; run make data")
def test_the_real_resnet_knows_real_images_by_the_names_of_their_classes() -> None:
    """From reader to metric. Its 20 kept rows are right far more often than one in 20."""
    data = read_tiny_imagenet(TINY, "val")
    data = data.take(range(0, len(data), 10))
    model = build_classifier("resnet18", data.classes, str(RESNET18), weights_classes=IMAGENET).eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    logits = []
    for images, _ in eval_batches(LabelledEvalSet(data, image_size=112), 25, workers=0):
        with torch.no_grad():
            logits.append(model((stack_images(images) / 255 - mean) / std))
    found = top_k(torch.cat(logits), data.labels)
    assert found["top1"] > 0.6
    assert found["top5"] > 0.8
    assert F.one_hot(torch.cat(logits).argmax(1), 20).any(0).sum() > 15  # not a few classes only
