"""`predict.py`: photographs, folders and streams; what cannot be used never stops the rest."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import torch
from PIL import Image

from lbdet.cli import predict
from lbdet.convert import quantize_model
from lbdet.deploy import load
from lbdet.deploy.certify import pack
from lbdet.deploy.export import place, trace
from lbdet.models import build_detector
from lbdet.models.classifiers import build_classifier
from lbdet.precision import Precision

CLASSES = ("disc", "star", "größe")
DETECTOR = {
    "task": "detection", "architecture": "ssd_tiny", "classes": list(CLASSES), "precision": "W4",
    "image_size": None,
}  # fmt: skip
CLASSIFIER = {"task": "classification", "classes": list(CLASSES), "image_size": 32, "short_side": 37}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with an untrained detector in all formats, whose scores are low, and a classifier."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = build_detector("ssd_tiny", CLASSES).eval()
    quantize_model(model, "W4")
    trace(model, folder / "a.onnx", DETECTOR)
    place(folder / "a.onnx", folder / "a.xml")
    pack(model, folder / "a.lbw", DETECTOR, Precision(4, None), fold=False, entropy=False)
    classifier = build_classifier("resnet20_cifar", CLASSES).eval()
    quantize_model(classifier, "W4")
    trace(classifier, folder / "c.onnx", CLASSIFIER)
    return folder


@pytest.fixture
def photos(devkit, tmp_path) -> Path:
    """Two photographs, one that is none, and a file of another kind."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(2):
        content = (devkit / f"VOC2012/JPEGImages/val_0000{k}.jpg").read_bytes()
        (folder / f"{k}.jpg").write_bytes(content)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def run(call, models):
    def predicted(*arguments: object, model: str = "a.onnx"):
        return call(predict.main, models / model, *arguments)

    return predicted


@pytest.fixture
def stream(run, monkeypatch):
    """Predict with lines on stdin; returns the exit code's result and the lines of JSON."""

    def predicted(*lines: str | bytes, options: tuple[object, ...] = ()):
        content = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        result = run("--jsonl", *options)
        return result, [json.loads(line) for line in result.out.splitlines()]

    return predicted


@pytest.mark.parametrize("model", ["a.onnx", "a.xml", "a.lbw"])
def test_a_photograph_gives_its_detections_by_name(run, photos, models, model):
    result = run(photos / "0.jpg", "--score", 0.02, "--jsonl", model=model)
    assert result.code == 0
    (line,) = map(json.loads, result.out.splitlines())
    found = load(models / model)(photos / "0.jpg")
    expected = int((found["scores"] >= 0.02).sum())
    assert line["image"] == str(photos / "0.jpg")
    assert len(line["detections"]) == expected > 0
    for row, label, score, box in zip(
        line["detections"], found["labels"], found["scores"], found["boxes"], strict=False
    ):
        assert row["label"] == CLASSES[label - 1]
        assert row["score"] == pytest.approx(float(score), abs=1e-3)
        assert row["box"] == pytest.approx(box.tolist(), abs=0.1)


def test_text_has_a_line_an_image_and_one_a_detection(run, photos):
    result = run(photos / "0.jpg", photos / "1.jpg", "--score", 0)
    assert result.code == 0
    heads = [line for line in result.out.splitlines() if not line.startswith(" ")]
    assert [line.split(": ")[0] for line in heads] == [str(photos / "0.jpg"), str(photos / "1.jpg")]
    count = int(heads[0].split(": ")[1].split()[0])
    assert result.out.splitlines()[1 + count] == heads[1]


def test_the_least_score_decides_what_is_told(run, photos):
    def scores(*options: object) -> list[float]:
        (line,) = run(photos / "0.jpg", "--jsonl", *options).out.splitlines()
        return [row["score"] for row in json.loads(line)["detections"]]

    every = scores("--score", 0)
    middle = (every[0] + every[-1]) / 2
    assert 0 < len(scores("--score", middle)) < len(every)
    assert min(scores("--score", middle)) >= middle
    assert scores("--score", 1) == []
    assert scores() == [score for score in every if score >= 0.4]


def test_a_folder_gives_all_its_images_and_one_that_is_none_does_not_stop_the_others(run, photos):
    result = run(photos, "--jsonl")
    assert result.code == 2
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["0.jpg", "1.jpg", "broken.png"]
    assert [("error" in line) for line in lines] == [False, False, True]
    assert "broken.png: must be a whole JPEG, PNG, BMP, WEBP, GIF or TIFF image" in lines[2]["error"]
    assert "1 of 3 images: must be usable" in result.err


def test_pictures_are_drawn_with_names_of_their_own(run, photos, tmp_path):
    (photos / "more").mkdir()
    Image.new("L", (1, 1)).save(photos / "more/0.png")
    result = run(photos / "0.jpg", photos / "more", "--output", tmp_path / "drawn", "--score", 0.01)
    assert result.code == 0
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["0.png", "0_2.png"]
    plain = np.asarray(Image.open(photos / "0.jpg").resize((640, 533)), int)
    drawn = np.asarray(Image.open(tmp_path / "drawn/0.png"), int)
    assert drawn.shape == plain.shape
    assert np.abs(drawn - plain).max() > 100


def test_photographs_are_never_replaced_by_pictures(run, photos):
    before = {file.name: file.read_bytes() for file in photos.iterdir()}
    result = run(photos, "--output", photos)
    assert result.code == 2
    assert "--output: must not be where the images are" in result.err
    assert {file.name: file.read_bytes() for file in photos.iterdir()} == before


def test_a_stream_answers_line_by_line_in_order_and_goes_on_after_mistakes(stream, photos):
    lines = [
        json.dumps({"image": str(photos / "0.jpg"), "id": 7}), "", '{"image": 3}', "{", "[]",
        json.dumps({"image": "none.jpg"}), b"\xff\xfe", json.dumps({"image": "a\0b"}),
        json.dumps({"image": str(photos / "broken.png")}), json.dumps({"image": str(photos / "1.jpg")}),
    ]  # fmt: skip
    result, found = stream(*lines)
    assert result.code == 2
    assert [line.get("image", "-") for line in found] == [
        str(photos / "0.jpg"), "-", "-", "-", "none.jpg", "-", "-",
        str(photos / "broken.png"), str(photos / "1.jpg"),
    ]  # fmt: skip
    assert [("detections" in line, "error" in line) for line in found] == [
        (k in (0, 8), k not in (0, 8)) for k in range(9)
    ]
    assert found[1]["error"] == 'line 3: must be like {"image": "photo.jpg"}, got b\'{"image": 3}\''
    assert found[4]["error"] == "none.jpg: image file does not exist"
    assert "7 of 9 images" in result.err


def test_a_stream_of_good_images_is_code_0_and_an_empty_one_too(stream, photos):
    assert stream(json.dumps({"image": str(photos / "0.jpg")}))[0].code == 0
    assert stream()[0] == stream("", "  ")[0]
    assert stream()[0].code == 0


def test_pictures_of_a_stream_are_drawn_and_its_own_folder_is_refused_image_by_image(
    stream, photos, tmp_path
):
    line = json.dumps({"image": str(photos / "0.jpg")})
    assert stream(line, options=("--output", tmp_path / "drawn"))[0].code == 0
    assert (tmp_path / "drawn/0.png").is_file()
    result, found = stream(line, options=("--output", photos))
    assert result.code == 2
    assert "--output: must not be where the images are" in found[0]["error"]


def test_every_answer_comes_before_the_next_question(models, photos):
    command = [sys.executable, "-m", "lbdet.cli", "predict", str(models / "a.onnx"), "--jsonl"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        late = Timer(60, process.kill)  # an answer that never comes is an empty line then
        late.start()
        for name in ("0.jpg", "broken.png", "1.jpg"):
            process.stdin.write(json.dumps({"image": str(photos / name)}).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["image"] == str(photos / name)
        process.stdin.close()
        assert process.wait(60) == 2
        late.cancel()


def test_an_engines_file_is_predicted_with_without_torch(models, photos):
    arguments = [str(models / "a.onnx"), str(photos / "0.jpg"), "--output", str(photos / "d")]
    code = (
        f"import sys; from lbdet.cli.predict import main; code = main({arguments!r})\n"
        "assert code == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (photos / "d/0.png").is_file()


def test_a_classifier_tells_its_best_classes_and_draws_nothing(run, photos, tmp_path):
    result = run(photos / "0.jpg", "--jsonl", model="c.onnx")
    assert result.code == 0
    rows = json.loads(result.out)["labels"]
    assert {row["label"] for row in rows} == set(CLASSES)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    result = run(photos / "0.jpg", "--output", tmp_path / "drawn", model="c.onnx")
    assert result.code == 2
    assert "--output: is for detectors, got a classifier" in result.err


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_of_other_modes_and_one_pixel_are_fine(run, tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (1, 1)).save(path)
    assert run(path).code == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "INPUT: must be a photograph or a folder, got none; with --jsonl stdin is read"),
        (("none.jpg",), "none.jpg: does not exist"),
        (("https://a.org/b.jpg",), "INPUT: must be a local file, got 'https://a.org/b.jpg'; download it"),
        (("x", "--score", 2), "--score: must lie in [0, 1], got 2.0"),
        (("x", "--threads", -1), "--threads: must not be negative, got -1"),
    ],
)
def test_arguments_that_cannot_work_are_refused(run, arguments, message):
    result = run(*arguments)
    assert (result.code, message in result.err) == (2, True)


@pytest.mark.parametrize("content", [b"", b"<x/>", b'<net name="a"></net>', b"\x00\xff"])
def test_an_xml_that_is_none_of_openvinos_is_one_line(photos, tmp_path, capfd, content):
    (tmp_path / "junk.xml").write_bytes(content)
    assert predict.main([str(tmp_path / "junk.xml"), str(photos / "0.jpg")]) == 2
    assert capfd.readouterr().err == (
        f"error: {tmp_path / 'junk.xml'}: must be an OpenVINO model, got another kind of file; "
        "write it with tools/export.py\n"
    )


@pytest.mark.parametrize("name", ["a.onnx", "a.xml"])
def test_a_damaged_model_is_one_line_without_the_engines_own_code(models, photos, tmp_path, capfd, name):
    (tmp_path / name).write_bytes((models / name).read_bytes()[:3000])
    assert predict.main([str(tmp_path / name), str(photos / "0.jpg")]) == 2
    err = capfd.readouterr().err
    assert re.fullmatch(rf"error: {tmp_path / name}: must be .*, got .*; export it anew\n", err)
    assert ".cpp" not in err
    assert "ONNXRuntimeError" not in err


def test_a_folder_without_images_and_a_model_that_is_none_are_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty: must hold .jpg" in run(tmp_path / "empty").err
    result = run(tmp_path / "empty", model="none.onnx")
    assert result.code == 2
