"""`sensitivity.py` as its user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lbdet.build import build
from lbdet.cli import sensitivity
from lbdet.cli.sensitivity import _known
from lbdet.config import load_config
from lbdet.convert import model_bytes
from lbdet.engine.task import DetectionTask
from lbdet.errors import UserError
from tests.conftest import write_config


def run(config, output, *arguments) -> int:
    return sensitivity.main(["--config", str(config), "--output", str(output), "--images", "2", *arguments])


@pytest.fixture(scope="module")
def measured_once(tmp_path_factory, devkit) -> tuple[Path, Path]:
    """A config, and the folder of a call that measured its blocks at W4; not to be changed."""
    folder = tmp_path_factory.mktemp("measured")
    config = write_config(folder, devkit)
    assert run(config, folder / "out", "--precisions", "W4") == 0
    return config, folder / "out"


@pytest.fixture
def measured(measured_once, tmp_path) -> tuple[Path, Path]:
    """The same, to be changed."""
    config, out = measured_once
    return config, shutil.copytree(out, tmp_path / "out")


def test_it_leaves_a_table_a_picture_and_overrides_that_fit_the_budget(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(config, out, "--precisions", "W4", "W2A8", "--budget", "300000") == 0
    records = [json.loads(line) for line in (out / "sensitivity.jsonl").read_text().splitlines()]
    assert {r["precision"] for r in records} == {"W4", "W2A8"}
    assert (out / "sensitivity.png").stat().st_size > 10_000
    assert len((out / "sensitivity.md").read_text().splitlines()) == 2 + len(records)
    assert "most sensitive" in capsys.readouterr().out
    suggested = yaml.safe_load((out / "overrides.yaml").read_text())["overrides"]
    changed = load_config(config, [f"quantizer.overrides={json.dumps(suggested)}"])
    assert model_bytes(build(changed).model) <= 300_000


def test_a_second_call_measures_only_what_is_missing(measured, monkeypatch):
    config, out = measured
    before = (out / "sensitivity.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, "evaluate", lambda *a: pytest.fail("measured again"))
        assert run(config, out, "--precisions", "W4") == 0
    assert run(config, out, "--precisions", "W4", "W3") == 0
    after = (out / "sensitivity.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 2 * len(before.splitlines())


def test_a_config_or_weights_of_other_content_are_another_measurement(measured_once, tmp_path, devkit):
    facts, run = sensitivity._model_facts, tmp_path / "run"
    config = load_config(measured_once[0])
    assert facts(load_config(measured_once[0]), None) == facts(config, None)
    assert facts(load_config(measured_once[0], ["seed=1"]), None) != facts(config, None)
    run.mkdir()
    (run / "model.safetensors").write_bytes(b"one")
    weights = load_config(measured_once[0], [f"model.weights={run}/model.safetensors"])
    before = [facts(config, str(run)), facts(weights, None)]
    assert before == [facts(config, str(run)), facts(weights, None)]
    (run / "model.safetensors").write_bytes(b"two")
    assert all(
        old != new for old, new in zip(before, [facts(config, str(run)), facts(weights, None)], strict=True)
    )


def test_a_changed_config_file_is_refused(measured, capsys):
    config, out = measured
    text = config.read_text()
    config.write_text(text.replace("seed: 0", "seed: 1") if "seed:" in text else f"{text}\nseed: 1\n")
    try:
        assert run(config, out, "--precisions", "W4") == 2
    finally:
        config.write_text(text)
    assert "holds another measurement; give another folder" in capsys.readouterr().err


UNITS = {"stem": ("stem.0",)}
RECORD = b'{"unit": "stem", "precision": "W4", "lost": 0.1, "saved": 3}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sensitivity.jsonl", b"[" * 100_000, "sensitivity.jsonl: is damaged; remove it to measure again"),
        ("sensitivity.jsonl", b"[]", "sensitivity.jsonl: is damaged"),
        ("sensitivity.jsonl", RECORD + RECORD[:20], "sensitivity.jsonl: is damaged"),
        ("sensitivity.jsonl", RECORD.replace(b"0.1", b'"x"'), "sensitivity.jsonl: is damaged"),
        ("sensitivity.jsonl", b"\xff", "sensitivity.jsonl: is damaged"),
        ("sensitivity.jsonl", RECORD.replace(b"stem", b"head"), "holds another measurement"),
        ("facts.json", b"[" * 100_000, "facts.json: must be JSON, got maximum recursion"),
        ("facts.json", b"[]", "holds another measurement"),
        ("facts.json", b"\xff", "facts.json: must be JSON in UTF-8"),
    ],
)  # fmt: skip
def test_damaged_files_of_an_earlier_call_are_told_in_one_line(tmp_path, name, content, message):
    (tmp_path / "sensitivity.jsonl").write_bytes(RECORD)
    assert _known(tmp_path, {"a": 1}, UNITS) == _known(tmp_path, {"a": 1}, UNITS)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        _known(tmp_path, {"a": 1}, UNITS)
    assert len(str(error.value).splitlines()) == 1
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precisions", "float"), "--precisions: must have bits, got float"),
        (("--precisions", "W9"), "format 'lbw' has no 9-bit weights"),
        (("--precisions", "W4", "--images", "0"), "--images: must be at least 1, got 0"),
        (("--precisions", "W4", "--by", "layer"), "holds another measurement"),
        (("--precisions", "W4", "--budget", "1"), "--budget: must be at least"),
    ],
)
def test_what_cannot_be_is_one_line(measured, capsys, arguments, message):
    assert run(*measured, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
