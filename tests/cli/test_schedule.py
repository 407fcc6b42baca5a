"""`schedule.py`: what it tells of a training is what the training does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import lbdet.engine.train as loop
from lbdet.cli import schedule
from lbdet.cli.schedule import build_timeline
from lbdet.config import load_config
from lbdet.convert import quantized_layers
from lbdet.precision import Precision

STOCHASTIC = (
    "schedule={name: progressive, target: W2A2, through: [float, W4A4], stochastic: {first: 0.4, until: 0.7}}"
)
MANY = ("train.max_steps=12", "train.lr=0.01", "train.warmup_steps=2", "train.calibration_images=4")
OWN_WIDTH = "quantizer.overrides={head.*: {precision: W4A8}}"
MAGIC = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.fixture
def show(call: Callable, config: Path) -> Callable:
    def run(*settings: str, options: tuple = ()):
        arguments = ["--config", config, *options]
        return call(schedule.main, *arguments, *(["--set", *settings] if settings else []))

    return run


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line[:1].isdigit()]


def test_the_output_is_the_headline_a_row_a_phase_and_the_other_layers(show: Callable) -> None:
    result = show("schedule={name: two_stage, target: W4A4}", OWN_WIDTH, *MANY)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "ssd_tiny: 12 scheduled layers; 12 images, 12 updates, 4 epochs, batch 4"
    assert lines[2].split() == ["phase", "updates", "epochs", "widths", "lr", "first", "highest", "last"]
    assert lines[3].split()[:4] == ["0", "0..5", "0.0..2.0", "W4"]
    assert lines[4].split()[:4] == ["1", "6..11", "2.0..4.0", "W4A4"]
    assert lines[6].startswith("W4A8 always: head.")
    assert lines[9].startswith("at a phase change: activation ranges of a new width are calibrated")
    assert "converted" not in result.out
    assert max(map(len, lines)) <= 100


def test_what_is_told_is_what_the_training_does(
    show: Callable, train: Callable, config: Path, monkeypatch
) -> None:
    settings = (STOCHASTIC, OWN_WIDTH, *MANY)
    done: list[tuple[float, dict[str, Precision]]] = []

    def update(networks, task, guidance, rate, *_):
        layers = quantized_layers(networks[0].model)
        done.append((rate, {name: layer.precision for name, layer in layers.items()}))
        return {"loss": 1.0}

    monkeypatch.setattr(loop, "_update", update)
    assert train(*settings).code == 0
    planned = build_timeline(load_config(config, settings))
    weights, inputs = planned.bits(range(12))
    assert len(done) == planned.total == 12
    assert planned.rates().tolist() == [rate for rate, _ in done]
    for step, (_, precision) in enumerate(done):
        for layer, name in enumerate(planned.layers):
            now = precision.get(name, Precision())
            assert (weights[layer, step], inputs[layer, step]) == (now.weight_bits or 0, now.act_bits or 0)
    for row in rows(show(*settings).out):
        first, last = map(int, row[1].split(".."))
        rates = [rate for rate, _ in done[first : last + 1]]
        assert [float(cell) for cell in row[4:7]] == pytest.approx(
            [rates[0], max(rates), rates[-1]], rel=0.006
        )
        scheduled = {
            p for _, step in done[first : last + 1] for n, p in step.items() if n in planned.scheduled
        }
        assert scheduled - {Precision()} == {Precision.parse(row[3])} - {Precision()}


def test_a_classifier_is_told_with_its_blocks_and_without_the_weights_that_it_will_have(
    call: Callable, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", x_train=np.zeros((9, 32, 32, 3), np.uint8), y_train=np.arange(9) % 3,
             classes=np.array(["a", "b", "c"]))  # fmt: skip
    config = {
        "model": {"name": "resnet20_cifar", "weights": "runs/not/yet/model.safetensors"},
        "data": {"name": "npz", "root": str(tmp_path / "x.npz"), "train": ["train"], "val": ["test"],
                 "augment": "cifar"},
        "quantizer": {"weight": {"format": "uniform"}, "keep_float": ["conv1", "fc"]},
        "schedule": {"name": "constant", "target": "W2A2", "stochastic": {}},
        "train": {"epochs": 3, "batch_size": 3},
    }  # fmt: skip
    (tmp_path / "cls.yaml").write_text(yaml.safe_dump(config))
    result = call(schedule.main, "--config", tmp_path / "cls.yaml")
    assert (result.code, result.err) == (0, "")
    assert "resnet20_cifar: 18 scheduled layers in 9 blocks; 9 images, 9 updates, 3 epochs" in result.out
    assert "float always (2): conv1, fc" in result.out
    assert " ".join(rows(result.out)[0][7:]) == "4/9 -> 9/9 6"


def test_without_updates_nothing_is_trained_and_nothing_can_be_drawn(show: Callable, tmp_path: Path) -> None:
    assert "nothing is trained: the scheduled layers have W4" in show("train.max_steps=0").out
    result = show("train.max_steps=0", options=("--plot", tmp_path / "plan.png"))
    assert result.code == 2
    assert "--plot: must have an update to show, got none" in result.err
    assert not (tmp_path / "plan.png").exists()


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_picture_is_written(show: Callable, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plan.{suffix.upper() if suffix == 'png' else suffix}"
    result = show(STOCHASTIC, *MANY, options=("--plot", path))
    assert (result.code, result.err) == (0, "")
    assert f"{path}: written" in result.out
    assert path.read_bytes().startswith(MAGIC[suffix])
    assert path.stat().st_size > 5000
    assert [file.name for file in tmp_path.iterdir() if "plan" in file.name] == [path.name]


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ("plan.jpg", "--plot: must end in .png, .svg, .pdf, got "),
        ("plan", "--plot: must end in .png, .svg, .pdf, got "),
        ("nowhere/plan.png", "--plot: must be a file in a folder that can be written to, got "),
        ("folder.png", "--plot: must be a file in a folder that can be written to, got "),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_else(
    call: Callable, tmp_path: Path, plot: str, message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    result = call(schedule.main, "--config", tmp_path / "no.yaml", "--plot", tmp_path / plot)
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {message}{tmp_path / plot}\n"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.root=/nowhere", "/nowhere"),
        ("model.name=ssd_tinny", "model.name: must be one of"),
        ("model.name=resnet18", "data.name: a classifier needs one of"),
        ("quantizer.keep_float=[haed.*]", "quantizer: keep_float: pattern 'haed.*' matches none of the"),
        ("schedule={target: W4A4, stochastic: {blocks: [x]}}", "pattern 'x' matches no module"),
        ("schedule={name: cyclic, start: W6A6, target: W2A2}", "each of the 10 stages needs an update"),
    ],
)
def test_a_mistake_is_told(show: Callable, setting: str, message: str) -> None:
    result = show(setting)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_an_unknown_model_is_told_before_the_data_are_read(show: Callable) -> None:
    assert "model.name: must be one of" in show("model.name=ssd_tinny", "data.root=/nowhere").err
