"""What tests of the whole path share: a small rendered devkit, a config for it, tools called in process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from lbdet.cli import train_det
from lbdet.data.shapes import render_shapes

CONFIG = {
    "model": {"name": "ssd_tiny"},
    "data": {
        "name": "voc",
        "train": ["2012:train"],
        "val": ["2012:val"],
        "classes": "shapes",
    },
    "quantizer": {"weight": {"format": "lbw"}},
    "schedule": {"target": "W4"},
    "train": {"max_steps": 2, "batch_size": 4, "lr": 0.01, "warmup_steps": 0, "workers": 0},
    "eval": {"max_images": 4},
}


def pytest_configure() -> None:
    """Keep OpenVINO from reporting each import and conversion to Google, in forks of the tests that cost more
    than the conversion; give a worker of `pytest -n` one thread.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@dataclass(frozen=True)
class Result:
    """How a tool ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VOC devkit of 12 images to train on and 6 to evaluate on; not to be changed."""
    root = tmp_path_factory.mktemp("shapes") / "devkit"
    render_shapes(root, train=12, val=6, size=(96, 80))
    return root


def write_config(folder: Path, devkit: Path) -> Path:
    """Write the config of a training of two steps on the devkit."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"data": {**CONFIG["data"], "root": str(devkit)}}))
    return path


@pytest.fixture
def config(tmp_path: Path, devkit: Path) -> Path:
    """The file of a config that trains two steps on the devkit."""
    return write_config(tmp_path, devkit)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, devkit: Path) -> Path:
    """The folder of a run of ten steps; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    path, run = write_config(folder, devkit), folder / "run"
    assert train_det.main(["--config", str(path), "--output", str(run), "--set", "train.max_steps=10"]) == 0
    return run


Tool = Callable[[list[str]], int]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call a tool's `main` with arguments; no tool may ever print a traceback."""

    def run(main: Tool, *arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(code, out, err)

    return run


@pytest.fixture
def train(call: Callable[..., Result], config: Path, tmp_path: Path) -> Callable[..., Result]:
    """Train the tiny config with settings, into `tmp_path / output`."""

    def run(*settings: str, output: str = "run", resume: bool = False) -> Result:
        arguments = ["--config", config, "--output", tmp_path / output]
        arguments += ["--set", *settings] if settings else []
        return call(train_det.main, *arguments, *(["--resume"] if resume else []))

    return run
