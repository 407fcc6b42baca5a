"""The tool that reads a whole data set: what it prints, writes and returns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lbdet.cli import check_data, train_det
from lbdet.data.voc import read_voc


@pytest.fixture
def damaged(devkit: Path, tmp_path: Path) -> Path:
    """A copy of the devkit in which three training images are damaged."""
    root = tmp_path / "devkit"
    shutil.copytree(devkit, root)
    year = next(root.rglob("VOC2012"))
    names = (year / "ImageSets/Main/train.txt").read_text().split()[:3]
    image, box, missing = (year / "JPEGImages" / f"{names[0]}.jpg", *(
        year / "Annotations" / f"{name}.xml" for name in names[1:]
    ))  # fmt: skip
    image.write_bytes(image.read_bytes()[:700])
    text = box.read_text()
    box.write_text(text.replace("<xmax>", "<xmax>9", 1))
    missing.unlink()
    return root


def test_a_clean_config_has_code_0_and_its_classes_are_shown(call, config):
    result = call(check_data.main, "--config", config)
    assert (result.code, result.err) == (0, "")
    assert "train: 12 images, " in result.out
    assert "val: 6 images, " in result.out
    assert "  disc " in result.out
    assert "error" not in result.out


def test_every_problem_is_named_and_the_code_is_2(call, damaged, tmp_path):
    output = tmp_path / "out"
    arguments = ["--data", "voc", "--root", damaged, "--split", "2012:train", "--output", output, "--cleaned"]
    result = call(check_data.main, *arguments)
    assert result.code == 2
    assert result.err == (
        f"error: {damaged}: data must have no errors, got 3 in 3 places; see {output / 'problems.json'}\n"
    )
    lines = [line for line in result.out.splitlines() if line.startswith("error: ")]
    assert len(lines) == 3
    assert "object 1: box must lie inside the image" in lines[0]
    assert lines[1].endswith(".xml: file does not exist")
    assert "must be a whole JPEG or PNG image, got image file is truncated" in lines[2]
    problems = json.loads((output / "problems.json").read_text())["train"]
    assert [p["kind"] for p in problems if p["level"] == "error"] == ["box", "no annotation", "image"]
    assert Image.open(output / "sheet.png").width > 1000


def test_the_cleaned_split_loads_and_has_no_errors(call, damaged, tmp_path):
    output = tmp_path / "out"
    arguments = ["--data", "voc", "--root", damaged, "--split", "2012:train", "--output", output]
    call(check_data.main, *arguments, "--cleaned")
    split = f"2012:{output / 'train_2012.txt'}"
    assert len(read_voc(damaged, [split], check_data.found_classes(damaged, [split]))) == 9
    assert call(check_data.main, "--data", "voc", "--root", damaged, "--split", split).code == 0


def test_what_is_checked_without_errors_can_be_trained_on(call, config, tmp_path):
    output = tmp_path / "out"
    assert call(check_data.main, "--config", config, "--output", output, "--cleaned").code == 0
    split = f"data.train=['2012:{output / 'train_2012.txt'}']"
    arguments = ["--config", config, "--output", tmp_path / "run", "--set", split, "train.max_steps=0"]
    assert call(train_det.main, *arguments).code == 0


def test_the_list_of_a_split_is_called_as_the_split(call, devkit, tmp_path):
    output, one = tmp_path / "out", ["--data", "voc", "--root", devkit / "VOC2012"]
    for split in ("train", "val"):
        assert call(check_data.main, *one, "--split", split, "--output", output, "--cleaned").code == 0
    assert call(check_data.main, *one, "--split", "train", "val", "--output", output, "--cleaned").code == 0
    names = {name: (output / f"{name}.txt").read_text() for name in ("train", "val", "train_val")}
    assert names["train"] + names["val"] == names["train_val"]
    assert names["train"] == (devkit / "VOC2012/ImageSets/Main/train.txt").read_text()


def test_a_list_that_is_checked_is_not_written_over(call, devkit, tmp_path):
    (tmp_path / "train.txt").write_text("train_00000\ntrain_00001\n")
    arguments = ["--data", "voc", "--root", devkit / "VOC2012", "--split", tmp_path / "train.txt"]
    result = call(check_data.main, *arguments, "--output", tmp_path, "--cleaned")
    assert result.err == (
        f"error: --output: must not be where the split's {tmp_path / 'train.txt'} is; name another folder\n"
    )
    assert call(check_data.main, *arguments, "--output", tmp_path / "out", "--cleaned").code == 0
    assert (tmp_path / "out/train.txt").read_text() == (tmp_path / "train.txt").read_text()
    own = devkit / "VOC2012/ImageSets/Main"
    arguments = ["--data", "voc", "--root", devkit / "VOC2012", "--split", "train"]
    result = call(check_data.main, *arguments, "--output", own, "--cleaned")
    assert result.err == (
        f"error: --output: must not be where a data set has its splits, got {own}; name another folder\n"
    )


def test_an_image_in_both_splits_is_a_warning(call, config, devkit):
    result = call(check_data.main, "--config", config, "--set", "data.val=['2012:train']")
    assert result.code == 0
    assert result.out.count("is in train and in val") == 12


def test_arrays_of_labels_are_checked_too(call, tmp_path):
    np.savez(tmp_path / "x.npz", classes=["a", "b"], x_train=np.zeros((2, 4, 4), np.uint8), y_train=[0, 0])
    result = call(check_data.main, "--data", "npz", "--root", tmp_path / "x.npz", "--split", "train")
    assert result.code == 0
    assert "warning: class b: has no example" in result.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--data", "voc"], "--data: needs --root and --split, got only some of them"),
        (["--data", "vok", "--root", "x", "--split", "y"], "--data: must be one of voc, coco, "),
        (["--data", "voc", "--root", "x", "--split", "y", "--cleaned"], "--cleaned: needs --output"),
        (
            ["--data", "voc", "--root", "x", "--split", "y", "--input-size", "0"],
            "--input-size: must be at least 1",
        ),
        (
            ["--data", "voc", "--root", "/none", "--split", "train"],
            "/none: data set does not exist; see datasets/README.md",
        ),
        (
            ["--data", "npz", "--root", "x/cifar10_10k_2k.npz", "--split", "train"],
            "x/cifar10_10k_2k.npz: data set does not exist; make it with tools/prepare_cifar10_10k.py",
        ),
        (
            ["--data", "coco", "--root", ".", "--split", "y"],
            "split: of coco must be one images_folder:annotations",
        ),
        (["--config", "x", "--other-classes", "ignore"], "--other-classes: is for --data, got it with"),
        (["--data", "voc", "--root", "x", "--split", "y", "--set", "seed=1"], "--set: is for --config, got"),
        (["--config", "/none.yaml"], "/none.yaml: cannot be read: No such file or directory"),
        (
            ["--config", "x", "--root", "y"],
            "--root: is for --data, got it with --config; use --set data.root=...",
        ),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(call, arguments, text):
    result = call(check_data.main, *arguments)
    assert result.code == 2
    assert result.err.startswith(f"error: {text}")
    assert result.err.count("\n") == 1
