"""`sensitivity.py` as its user runs it."""

from __future__ import annotations

import json

import pytest
import yaml

from lbdet.build import build
from lbdet.cli import sensitivity
from lbdet.config import load_config
from lbdet.convert import model_bytes
from lbdet.engine.task import DetectionTask


def run(config, output, *arguments) -> int:
    return sensitivity.main(["--config", str(config), "--output", str(output), "--images", "2", *arguments])


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


def test_a_second_call_measures_only_what_is_missing(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(config, out, "--precisions", "W4") == 0
    before = (out / "sensitivity.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, "evaluate", lambda *a: pytest.fail("measured again"))
        assert run(config, out, "--precisions", "W4") == 0
    assert run(config, out, "--precisions", "W4", "W3") == 0
    after = (out / "sensitivity.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 2 * len(before.splitlines())


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
def test_what_cannot_be_is_one_line(config, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert run(config, out, "--precisions", "W4") == 0
    capsys.readouterr()
    assert run(config, out, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
