"""Nothing is lost: trainings that are killed, starved or crowded end with the weights of the others."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import CONFIG

ROOT = Path(__file__).resolve().parents[2]
KILLS = 13
"""in each scenario; there are four"""
STEPS = 30

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, locks and limits as on Linux"),
]


class Server:
    """Trainings in processes of their own, see server.py."""

    def __init__(self, log: Path) -> None:
        self.log, self.stderr = log, log.open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.stderr, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._line() == "ready"

    def start(self, *arguments: object, file_bytes: int | None = None) -> int:
        """Start a training and return its process."""
        assert self.process.stdin is not None
        request = {"arguments": [str(a) for a in arguments], "file_bytes": file_bytes}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def code(self) -> int:
        """Wait for the end; a signal's number comes negative."""
        return int(self._line())

    def run(self, *arguments: object, file_bytes: int | None = None) -> int:
        """Train to the end."""
        self.start(*arguments, file_bytes=file_bytes)
        return self.code()

    def said(self) -> str:
        """Return all that trainings wrote to stderr, and forget it."""
        text = self.log.read_text()
        os.truncate(self.log, 0)
        return text

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, self.log.read_text()
        return line


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "stderr")
    yield server
    server.process.kill()
    server.process.wait()
    server.stderr.close()


@pytest.fixture
def own_devkit(devkit: Path, tmp_path: Path) -> Path:
    """A copy of the devkit that a test may damage."""
    shutil.copytree(devkit, tmp_path / "devkit")
    return tmp_path / "devkit"


def write(folder: Path, devkit: Path, **sections: object) -> Path:
    train = {**CONFIG["train"], "max_steps": STEPS, "epochs": 99, "checkpoint_steps": 1, "batch_size": 2}
    train |= sections.pop("train", {})
    path = folder / "config.yaml"
    config = CONFIG | {"data": {**CONFIG["data"], "root": str(devkit)}, "train": train} | sections
    path.write_text(yaml.safe_dump(config))
    return path


def result(run: Path) -> dict[str, bytes]:
    """What must be equal: weights, metrics, and every line of the log once."""
    weights = load_file(run / "model.safetensors")  # the order of its metadata is random
    values = {name: weights[name].numpy().tobytes() for name in sorted(weights)}
    return values | {name: (run / name).read_bytes() for name in ("metrics.json", "metrics.jsonl")}


SCENARIOS = {
    "two_stage_teacher": {
        "schedule": {"name": "two_stage", "target": "W2A2"},
        "guidance": {"name": "teacher", "logits": 1.0, "boxes": 1.0},
        "train": {"ema": 0.9},
    },
    "progressive_workers": {
        "schedule": {"name": "progressive", "through": ["W4A4"], "target": "W2A2", "two_stage": True},
        "train": {"workers": 1, "optimizer": "sgd", "checkpoint_steps": 2},
    },
    "stochastic_joint": {
        "schedule": {"name": "constant", "target": "W2A2", "stochastic": {}},
        "guidance": {"name": "joint", "logits": 1.0, "boxes": 1.0, "features": 0.1, "taps": ["backbone"]},
    },
    "cyclic_learned_levels": {
        "schedule": {
            "name": "cyclic",
            "start": "W3A3",
            "target": "W2A2",
            "phase_change": {"ranges": "rescale"},
        },
        "quantizer": {"weight": {"format": "learned_levels"}},
        "train": {"optimizer": "sgd", "accumulate": 2},
    },
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_training_killed_again_and_again_ends_with_the_same_weights(name, server, devkit, tmp_path) -> None:
    config = write(tmp_path, devkit, **SCENARIOS[name])
    assert server.run("--config", config, "--output", tmp_path / "whole") == 0
    chance, kills, parts = random.Random(name), 0, tmp_path / "parts"
    while kills < KILLS:
        pid = server.start("--config", config, "--output", parts, "--resume")
        time.sleep(chance.uniform(0.3, 3.0))
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
        kills += server.code() == -signal.SIGKILL
        if (parts / "metrics.json").exists():  # too fast for us: once more from the start
            assert result(parts) == result(tmp_path / "whole")
            shutil.rmtree(parts)
    assert server.run("--config", config, "--output", parts, "--resume") == 0
    assert result(parts) == result(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_with_its_own_code(signum, server, devkit, tmp_path) -> None:
    config = write(tmp_path, devkit, train={"checkpoint_steps": 4})
    assert server.run("--config", config, "--output", tmp_path / "whole") == 0
    pid = server.start("--config", config, "--output", tmp_path / "parts")
    while not (tmp_path / "parts" / "checkpoint.pt").exists():  # before it, signals kill as usual
        time.sleep(0.02)
    os.kill(pid, signum)
    assert server.code() in (128 + signum, 0)
    assert server.run("--config", config, "--output", tmp_path / "parts", "--resume") == 0
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(server, devkit, tmp_path) -> None:
    config = write(tmp_path, devkit)
    assert server.run("--config", config, "--output", tmp_path / "whole") == 0
    server.said()
    run = ("--config", config, "--output", tmp_path / "parts", "--resume")
    assert server.run(*run, file_bytes=200_000) == 2
    said = server.said()
    assert said.count("\n") == 1
    assert "cannot be written: File too large" in said
    assert server.run(*run) == 0
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


def test_an_image_that_disappears_in_mid_epoch_is_named_and_training_goes_on_when_it_is_back(
    server, own_devkit, tmp_path
) -> None:
    config = write(tmp_path, own_devkit, train={"max_steps": 2 * STEPS})
    assert server.run("--config", config, "--output", tmp_path / "whole") == 0
    year = own_devkit / "VOC2012"
    name = (year / "ImageSets" / "Main" / "train.txt").read_text().split()[3]
    image = year / "JPEGImages" / f"{name}.jpg"
    server.said()
    run = ("--config", config, "--output", tmp_path / "parts", "--resume")
    server.start(*run)
    while not (tmp_path / "parts" / "checkpoint.pt").exists():
        time.sleep(0.02)
    image.rename(tmp_path / "away")
    assert server.code() == 2
    said = server.said()
    assert said.count("\n") == 1
    assert str(image) in said
    (tmp_path / "away").rename(image)
    assert server.run(*run) == 0
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_a_loading_process_that_dies_is_told_and_training_goes_on(server, devkit, tmp_path) -> None:
    config = write(tmp_path, devkit, train={"workers": 1, "max_steps": 200})
    server.said()
    pid = server.start("--config", config, "--output", tmp_path / "parts", "--resume")
    while not (tmp_path / "parts" / "checkpoint.pt").exists():
        time.sleep(0.05)
    while is_alive(pid):  # a child that is at its end already would not be missed
        for child in children(pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.2)
    assert server.code() == 2
    said = server.said()
    assert said.count("\n") == 1
    assert "a process that loads images died" in said
    assert (tmp_path / "parts" / "checkpoint.pt").exists()


def test_a_second_process_is_refused_the_folder_of_the_first(server, devkit, tmp_path) -> None:
    config = write(tmp_path, devkit, train={"max_steps": 2000})
    pid = server.start("--config", config, "--output", tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.05)
    arguments = ["--config", str(config), "--output", str(tmp_path / "run"), "--resume"]
    second = subprocess.run(
        [sys.executable, "-m", "lbdet.cli", "train-det", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    os.kill(pid, signal.SIGKILL)
    assert server.code() == -signal.SIGKILL
    assert second.returncode == 2
    assert "another process is writing this run" in second.stderr
