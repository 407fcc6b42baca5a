"""`sweep_bits.py` as its user runs it: what is missing is run, what fails is told, killed sweeps go on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lbdet.cli import sweep_bits
from lbdet.config import dump_config
from lbdet.deploy import load
from lbdet.engine import train as loop
from lbdet.engine.signals import Interrupted
from lbdet.precision import Precision
from lbdet.sweep import run as one_cell
from lbdet.sweep.cells import plan_cells

ROOT = Path(__file__).resolve().parents[2]


def sweep(config, output, *arguments) -> int:
    return sweep_bits.main(["--config", str(config), "--output", str(output), *arguments])


def content(output) -> dict:
    return json.loads((output / "sweep.json").read_text())


def results(output) -> dict:
    """What must not depend on how often a sweep was begun: all but times."""
    return {
        path.name: {
            name: (path / name).read_bytes() for name in ("metrics.json", "coverage.json", "detections.json")
        }
        for path in sorted((output / "cells").iterdir())
    }


def test_a_sweep_leaves_a_record_a_cell_and_a_second_call_runs_nothing(config, tmp_path, capsys, monkeypatch):
    out = tmp_path / "sweep"
    arguments = ("--precisions", "float", "W4", "W4A4", "--mode", "qat", "ptq", "ptq+bn")
    assert sweep(config, out, *arguments) == 0
    found = content(out)
    assert [cell["state"] for cell in found["cells"]] == ["done"] * 7
    cells = {cell["name"]: cell for cell in found["cells"]}
    assert cells["float_seed0"]["bits_per_weight"] == 32
    assert 3.2 < cells["qat_W4_seed0"]["bits_per_weight"] < 4
    assert cells["qat_W4_seed0"]["bytes"] < 0.2 * cells["float_seed0"]["bytes"]
    assert [cells[name]["steps"] for name in ("float_seed0", "qat_W4_seed0", "ptq_W4_seed0")] == [2, 2, 0]
    assert all(cell["latency_ms"] > 0 for cell in cells.values())
    packed = {name: out / cell["folder"] / "model.lbw" for name, cell in cells.items()}
    assert load(packed["qat_W4_seed0"])(np.zeros((40, 60, 3), np.uint8)).keys() == {
        "boxes",
        "labels",
        "scores",
    }
    assert all(cell["bytes"] == packed[name].stat().st_size for name, cell in cells.items())
    assert "W4A4" in (out / "report.html").read_text()
    assert {"sweep.png", "sweep.svg"} <= {path.name for path in out.iterdir()}
    assert {p["series"] for p in found["summary"]} == {"float", "qat", "ptq", "ptq+bn"}
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [row["precision"] for row in rows] == [cell["precision"] for cell in found["cells"]]
    before = results(out)
    monkeypatch.setattr(loop, "_update", lambda *a: pytest.fail("trained again"))
    assert sweep(config, out, *arguments) == 0
    assert results(out) == before
    assert content(out) == found
    assert "7 of 7" not in capsys.readouterr().err


def test_post_training_cells_have_the_float_cells_weights(config, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "sweep"
    assert sweep(config, out, "--precisions", "W4", "--mode", "ptq", "--seeds", "0", "1") == 0
    for seed in (0, 1):
        trained, quantized = (
            load_file(out / "cells" / f"{name}_seed{seed}" / "model.safetensors")
            for name in ("float", "ptq_W4")
        )
        assert all((quantized[key] == trained[key]).all() for key in trained)
    assert [p["seeds"] for p in content(out)["summary"]] == [[0, 1], [0, 1]]


def test_a_later_call_adds_to_the_sweep(config, tmp_path):
    out = tmp_path / "sweep"
    assert sweep(config, out, "--precisions", "W4", "--mode", "ptq") == 0
    assert sweep(config, out, "--precisions", "W3", "--mode", "ptq") == 0
    assert {cell["name"]: cell["state"] for cell in content(out)["cells"]} == {
        "float_seed0": "done", "ptq_W3_seed0": "done", "ptq_W4_seed0": "done"
    }  # fmt: skip
    (out / "cells/ptq_W4_seed0").rename(tmp_path / "away")  # what a call does not name is looked at as well
    assert sweep(config, out, "--precisions", "W3", "--mode", "ptq") == 0
    (gone,) = (cell for cell in content(out)["cells"] if cell["state"] != "done")
    assert (gone["name"], gone["state"], gone["metrics"]) == ("ptq_W4_seed0", "missing", None)
    (tmp_path / "away").rename(out / "cells/ptq_W4_seed0")
    assert sweep(config, out, "--precisions", "W3", "--mode", "ptq") == 0
    assert {cell["state"] for cell in content(out)["cells"]} == {"done"}


def test_a_cell_that_fails_is_told_and_the_others_go_on(config, tmp_path, capsys, monkeypatch):
    out, finite = tmp_path / "sweep", loop._stop_if_not_finite

    def stop(losses, step, run):
        finite({"loss": float("nan")} if "W3" in str(run.path) else losses, step, run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_stop_if_not_finite", stop)
        assert sweep(config, out, "--precisions", "W4", "W3", "W2") == 2
    error = capsys.readouterr().err
    assert "error: 1 of 4 cells failed: qat_W3_seed0" in error
    cells = {cell["name"]: cell for cell in content(out)["cells"]}
    assert [cell["state"] for cell in cells.values()] == ["done", "done", "failed", "done"]
    assert cells["qat_W3_seed0"]["error"].startswith("step 0: loss is nan")
    assert "qat_W3_seed0: step 0: loss is nan" in (out / "sweep.md").read_text()
    assert sweep(config, out, "--precisions", "W4", "W3", "W2") == 0
    assert {cell["state"] for cell in content(out)["cells"]} == {"done"}


def nothing_runs(sweep, cells):
    for cell in cells:
        yield cell, "not run"


def test_settings_of_a_precision_stand_in_the_commands_of_its_cells(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sweep_bits.ENGINES, "local", nothing_runs)
    at = ("--at", "W2", "train.lr=0.25", "train.ema=0.5", "--at", "W2", "train.epochs=3")
    assert sweep(config, tmp_path / "out", "--precisions", "W4", "W2", "--mode", "qat", "ptq", *at) == 2
    commands = {cell["name"]: cell["command"] for cell in content(tmp_path / "out")["cells"]}
    assert [name for name, command in commands.items() if "train.lr" in command] == ["qat_W2_seed0"]
    assert "--set train.lr=0.25 train.ema=0.5 train.epochs=3 " in commands["qat_W2_seed0"]


def test_another_recipe_is_refused_before_anything_changes(config, tmp_path, capsys, monkeypatch):
    out, files = tmp_path / "out", lambda: {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setitem(sweep_bits.ENGINES, "local", nothing_runs)
    assert sweep(config, out, "--precisions", "W4") == 2
    whole = one_cell.Sweep(str(config), (), out)
    for cell in plan_cells([Precision(4)], ["qat"], [0]):
        whole.run(cell).start(dump_config(whole.config_of(cell)))
    before = files()
    capsys.readouterr()
    for arguments, name in (
        (("W2", "--set", "train.lr=0.25"), "float_seed0: must have the config that it was begun with, got "),
        (("W4", "--at", "W4", "train.lr=0.25"), "qat_W4_seed0: must have the config that it was begun with"),
    ):
        assert sweep(config, out, "--precisions", *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line
        assert "train.lr 0.25 (was 0.01)" in line
        assert files() == before
    assert sweep(config, out, "--precisions", "W2") == 2
    assert {cell["name"]: cell["error"] for cell in content(out)["cells"]}["qat_W4_seed0"] == "not run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precisions", "W9"), "format 'lbw' has no 9-bit weights"),
        (("--precisions", "four"), "precision must be 'float' or like W4"),
        (("--precisions", "W4", "W4"), "precisions: must be different, got W4 twice"),
        (("--precisions", "W4", "--ratios", "-1"), "quantizer.weight.ratio: must be greater than 0"),
        (("--precisions", "W4", "--set", "train.epoch=1"), "train.epoch: unknown key; closest: 'epochs'"),
        (("--precisions", "W4", "--output", "/proc/no/such"), "--output: /proc/no/such cannot be made"),
        (
            ("--precisions", "W4", "W3", "--at", "W2", "train.lr=1"),
            "--at: must be a precision of the qat cells (W4, W3), got W2",
        ),
        (
            ("--precisions", "W4", "--mode", "ptq", "--at", "W4", "train.lr=1"),
            "of the qat cells (none), got W4",
        ),
        (
            ("--precisions", "W4", "--at", "W4"),
            "--at W4: must have a setting such as train.lr=0.002, got none",
        ),
        (("--precisions", "W4", "--at", "W4", "train.epoch=1"), "train.epoch: unknown key"),
    ],
)
def test_what_is_impossible_is_one_line_and_leaves_nothing(config, tmp_path, capsys, arguments, message):
    out = tmp_path / "sweep"
    assert sweep(config, out, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not out.exists()


def test_a_full_disk_is_one_line(config, tmp_path, capsys):
    (tmp_path / "sweep").write_text("a file is in the way")
    assert sweep(config, tmp_path / "sweep", "--precisions", "W4") == 2
    assert "error: --output" in capsys.readouterr().err


def test_a_signal_stops_the_sweep_and_not_only_its_cell(config, tmp_path, capsys, monkeypatch):
    begun = []

    def interrupted(config, run, resume):
        begun.append(run.path.name)
        raise Interrupted(signal.SIGTERM, "interrupted at step 7, saved; continue with --resume")

    monkeypatch.setattr(one_cell, "train_run", interrupted)
    assert sweep(config, tmp_path / "sweep", "--precisions", "W4", "W2", "--mode", "qat") == 143
    assert begun == ["float_seed0"]
    assert capsys.readouterr().err == "float_seed0: interrupted, saved; the same command goes on\n"


@pytest.mark.slow
def test_a_sweep_killed_at_any_moment_ends_with_the_same_metrics(config, tmp_path):
    arguments = [
        sys.executable, "-m", "lbdet.cli", "sweep-bits", "--config", str(config), "--precisions", "W4", "W2",
        "--mode", "qat", "ptq", "--set", "train.max_steps=6", "train.epochs=9", "train.checkpoint_steps=1",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(output) -> subprocess.Popen:
        return subprocess.Popen(
            [*arguments, "--output", str(output)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )

    assert start(whole).wait(300) == 0
    for seconds, signum in (
        (8, signal.SIGKILL),
        (11, signal.SIGTERM),
        (14, signal.SIGINT),
        (17, signal.SIGKILL),
    ):
        process = start(parts)
        time.sleep(seconds)
        process.send_signal(signum)
        process.wait()
    assert start(parts).wait(300) == 0
    assert results(parts) == results(whole)


@pytest.mark.slow
def test_ray_gives_the_same_results_as_local(config, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed; pip install 'lbdet[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for engine in ("local", "ray"):
        out = tmp_path / engine
        assert sweep(config, out, "--precisions", "W4", "--mode", "qat", "ptq", "--engine", engine) == 0
    assert results(tmp_path / "ray") == results(tmp_path / "local")
