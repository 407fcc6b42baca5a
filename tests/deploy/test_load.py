"""One call for every kind of file: photographs in, detections out, without torch where none is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy.detectors import CLASSES, as_input, assert_same_detections, in_torch, scenes
from fuzz.guards import bounded_address_space
from PIL import Image

from lbdet.convert import calibrate_activations, quantize_model
from lbdet.data.labelled import resize_and_crop
from lbdet.deploy import Predictor, load
from lbdet.deploy.certify import pack
from lbdet.deploy.container import read, write
from lbdet.deploy.export import place, trace
from lbdet.errors import UserError
from lbdet.models import MODELS, build_detector
from lbdet.models.classifiers import CLASSIFIERS, build_classifier
from lbdet.precision import Precision

SUFFIXES = (".onnx", ".xml", ".lbw")
FACTS = {
    "task": "detection", "architecture": "ssd_tiny", "classes": list(CLASSES), "precision": "W4A8",
    "image_size": None,
}  # fmt: skip
CLASSIFIER = {
    "task": "classification", "architecture": "resnet20_cifar", "classes": list(CLASSES), "precision": "W4A8",
    "image_size": 32, "short_side": None,
}  # fmt: skip
W4A8 = Precision(4, 8)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    model = build_detector("ssd_tiny", CLASSES).eval()
    quantize_model(model, "W4A8")
    calibrate_activations(model, lambda: [[as_input(image)] for image in scenes(2)])
    return model


@pytest.fixture(scope="module")
def folder(detector, tmp_path_factory) -> Path:
    """Files of the detector in all formats."""
    folder = tmp_path_factory.mktemp("files")
    trace(detector, folder / "a.onnx", FACTS)
    place(folder / "a.onnx", folder / "a.xml")
    pack(detector, folder / "a.lbw", FACTS, W4A8, fold=False, entropy=False)
    return folder


@pytest.fixture(scope="module", params=SUFFIXES)
def predictor(request, folder) -> Predictor:
    return load(folder / f"a{request.param}", threads=1)


def test_what_comes_out_is_sorted_arrays_within_the_image(predictor):
    found = predictor(scenes(1, (50, 70))[0])
    assert {k: (v.dtype, v.ndim) for k, v in found.items()} == {
        "boxes": (np.float32, 2), "labels": (np.int64, 1), "scores": (np.float32, 1),
    }  # fmt: skip
    assert len(found["scores"]) > 0
    assert bool((np.diff(found["scores"]) <= 1e-6).all())
    assert bool((found["boxes"] >= 0).all())
    assert bool((found["boxes"] <= np.array([70, 50, 70, 50]) + 1e-4).all())
    assert set(found["labels"].tolist()) <= {1, 2, 3}


def test_a_list_gives_a_list_of_what_single_images_give(predictor):
    images = [scenes(1, size)[0] for size in ((96, 96), (50, 70), (1, 1))]
    for one, many in zip(map(predictor, images), predictor(images), strict=True):
        assert all(np.array_equal(one[key], many[key]) for key in one)
    assert predictor([]) == []


def test_paths_pil_images_and_arrays_are_the_same(predictor, tmp_path):
    pixels = scenes(1)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = predictor(pixels)
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels)):
        assert np.array_equal(predictor(picture)["scores"], expected["scores"])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
@pytest.mark.parametrize("size", [(1, 1), (40, 50), (1, 90)])
def test_images_of_every_mode_and_size_give_detections(predictor, mode, size):
    found = predictor(Image.new(mode, size))
    assert found["boxes"].shape == (len(found["labels"]), 4)


def test_a_turned_photograph_is_found_upright(predictor, tmp_path):
    upright = Image.fromarray(scenes(1, (60, 90))[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    found, expected = predictor(tmp_path / "a.png"), predictor(upright)
    assert np.array_equal(found["boxes"], expected["boxes"])


def test_labels_have_names_and_classes_are_told(predictor):
    assert predictor.classes == CLASSES
    assert predictor.task == "detection"
    assert [predictor.name(label) for label in (1, 2, 3)] == list(CLASSES)


@pytest.mark.parametrize("picture", ["none.jpg", np.zeros((4, 4), np.uint8)])
def test_what_is_no_image_is_refused(predictor, picture):
    with pytest.raises(UserError, match=r"image"):
        predictor(picture)


def test_a_packed_file_finds_what_the_model_finds_bit_for_bit(detector, folder):
    predictor = load(folder / "a.lbw")
    for image in scenes(3, (80, 120)):
        found, expected = predictor(image), in_torch(detector, image)
        assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_a_packed_file_with_batch_norm_folded_finds_nearly_that(detector, tmp_path):
    quantize = {**FACTS, "precision": "W4"}
    torch.manual_seed(0)
    model = build_detector("ssd_tiny", CLASSES).eval()
    quantize_model(model, "W4")
    summary = pack(model, tmp_path / "a.lbw", quantize, Precision(4, None), fold=True, entropy=True)
    assert len(summary.folded) == 12
    image = scenes(1)[0]
    assert_same_detections(load(tmp_path / "a.lbw")(image), in_torch(model, image), 1e-4)


def test_loading_a_packed_file_draws_no_random_numbers(folder):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load(folder / "a.lbw")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architecture": "ssd_huge"}, r"architecture must be one of lbdet's for detection, got 'ssd_huge'"),
        ({"architecture": "resnet18"}, r"architecture must be one of lbdet's for detection, got 'resnet18'"),
        ({"config": ""}, r"a\.lbw: must be written by tools/export\.py"),
        ({"config": "model: {name: ssd_tiny}"}, r"a\.lbw: metadata must be as this version writes it"),
        ({"config": '{"task": "x"}'}, r"a\.lbw: metadata must be as this version writes it, got 'x' as task"),
        ({"classes": "[]"}, r"a\.lbw: metadata must be as this version writes it, got \[\] as classes"),
        ({"architecture": "ssdlite320_mobilenet_v3_large"}, r"a\.lbw"),
    ],
)
def test_packed_files_of_other_models_or_makers_are_refused(folder, tmp_path, change, message):
    metadata, tensors = read(folder / "a.lbw")
    own = {name: tensor for name, tensor in tensors.items() if name != "packed.sha256"}
    write(tmp_path / "a.lbw", own, {**metadata, **change})
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.lbw")


def test_what_a_packed_file_says_twice_is_taken_from_its_header(folder, tmp_path):
    metadata, tensors = read(folder / "a.lbw")
    own = {name: tensor for name, tensor in tensors.items() if name != "packed.sha256"}
    other = {"classes": [*reversed(CLASSES)], "architecture": "x", "precision": "W2"}
    config = json.dumps(json.loads(metadata["config"]) | other)
    write(tmp_path / "a.lbw", own, {**metadata, "config": config})
    predictor = load(tmp_path / "a.lbw")
    assert predictor.classes == CLASSES
    assert [predictor.engine.facts[key] for key in ("architecture", "precision")] == ["ssd_tiny", "W4A8"]


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
def test_a_header_of_a_million_classes_is_refused_before_a_model_of_their_size_is_built(folder, tmp_path):
    metadata, tensors = read(folder / "a.lbw")
    own = {name: tensor for name, tensor in tensors.items() if name != "packed.sha256"}
    classes = json.dumps([*map(str, range(1_000_000))])
    write(tmp_path / "a.lbw", own, {**metadata, "classes": classes})
    with bounded_address_space(1 << 30), pytest.raises(UserError, match="weights must be those of the model"):
        load(tmp_path / "a.lbw")


@pytest.mark.parametrize("name", [*MODELS, *CLASSIFIERS])
def test_every_architecture_can_be_compared_with_a_file_before_it_takes_memory(name):
    with torch.device("meta"):
        model = build_detector(name, CLASSES) if name in MODELS else build_classifier(name, CLASSES)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_is_refused_by_name(folder, tmp_path, suffix):
    content = (folder / f"a{suffix}").read_bytes()
    (tmp_path / f"b{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"b{suffix}: "):
        load(tmp_path / f"b{suffix}")


def test_other_kinds_of_files_and_missing_ones_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.pt: model must end in \.onnx, \.xml, \.lbw, got '\.pt'"):
        load(tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.onnx: model does not exist; write it with tools/export\.py"):
        load(tmp_path / "a.onnx")


@pytest.fixture(scope="module", params=SUFFIXES)
def classifier(request, tmp_path_factory):
    """A classifier for 32 x 32 pixels and its predictor."""
    torch.manual_seed(0)
    model = build_classifier("resnet20_cifar", CLASSES).eval()
    quantize_model(model, "W4")
    path = tmp_path_factory.mktemp("classifier") / f"a{request.param}"
    if request.param == ".lbw":
        pack(model, path, CLASSIFIER, Precision(4, None), fold=False, entropy=False)
    else:
        trace(model, path.with_suffix(".onnx"), CLASSIFIER)
        place(path.with_suffix(".onnx"), path)
    return model, load(path)


def test_a_classifier_tells_all_classes_best_first(classifier):
    model, predictor = classifier
    image = scenes(1, (32, 32))[0]
    found = predictor(image)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model(((as_input(image) - mean) / std)[None]).softmax(-1)[0].numpy()
    np.testing.assert_allclose(found["scores"], np.sort(expected)[::-1], atol=1e-5)
    assert [predictor.name(label) for label in found["labels"]] == [CLASSES[k] for k in np.argsort(-expected)]
    assert predictor.task == "classification"


def test_a_classifier_of_whole_images_refuses_other_sizes(classifier):
    with pytest.raises(UserError, match=r"^image: must be 32x32 for this classifier, got 40x32; resize it"):
        classifier[1](np.zeros((32, 40, 3), np.uint8))


@pytest.mark.parametrize("size", [(40, 60), (300, 200), (37, 37), (1, 5)])
def test_a_classifier_of_photographs_cuts_out_their_centre_as_the_evaluation_does(tmp_path, size):
    torch.manual_seed(0)
    model = build_classifier("resnet20_cifar", CLASSES).eval()
    quantize_model(model, "W4")
    trace(model, tmp_path / "a.onnx", {**CLASSIFIER, "short_side": round(32 / 0.875)})
    predictor, seen = load(tmp_path / "a.onnx"), []
    engine = predictor.engine
    run = engine.run
    engine.run = lambda image: seen.append(image) or run(image)  # type: ignore[method-assign]
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([y * 250 // size[0], x * 250 // size[1], x * 0 + 90], -1).astype(np.uint8)
    predictor(image)
    expected = resize_and_crop(image, 32)
    assert seen[0].shape == (32, 32, 3)
    assert np.abs(seen[0].astype(int) - expected).max() <= 6


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_an_engines_file_runs_without_torch(folder, suffix):
    code = (
        "import sys; from lbdet.deploy import load; import numpy\n"
        f"found = load({str(folder / f'a{suffix}')!r}, threads=1)(numpy.zeros((40, 50, 3), 'uint8'))\n"
        "assert sorted(found) == ['boxes', 'labels', 'scores']\n"
        "assert not {'torch', 'torchvision', 'cv2', 'pydantic'} & set(sys.modules), sorted(sys.modules)\n"
        "print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "done\n", done.stderr
