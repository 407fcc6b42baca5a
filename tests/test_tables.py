"""The tables that people read say what the measured files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tools import tables

ROW = {"name": "a row", "runs": "runs/a_seed?.json"}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    for seed, top1 in enumerate((0.7505, 0.7600, 0.7490)):
        metrics = {"top1": top1, "model_bytes": 79364}
        (tmp_path / f"runs/a_seed{seed}.json").write_text(json.dumps(metrics))
    return tmp_path


def test_readme_and_experiments_are_what_the_results_say() -> None:
    assert tables.main(["--check"]) == 0


def test_a_row_shows_mean_range_and_every_seed(results: Path) -> None:
    columns = {
        "run": "name",
        "mean": "mean top1",
        "to": "range top1",
        "all": "each top1",
        "kB": "kB model_bytes",
    }
    assert tables.render({"columns": columns, "rows": [ROW]}, results) == (
        "| run | mean | to | all | kB |\n"
        "|---|---|---|---|---|\n"
        "| a row | .753 | .749, .760 | .751 .760 .749 | 79 |\n"
    )


def test_one_seed_has_no_range(results: Path) -> None:
    table = {"columns": {"to": "range top1"}, "rows": [ROW | {"runs": "runs/a_seed0.json"}]}
    assert tables.render(table, results).endswith("|  |\n")


def test_a_row_without_a_file_is_an_error(results: Path) -> None:
    with pytest.raises(SystemExit, match="'runs/b\\*' matches no file"):
        tables.render({"columns": {"top-1": "mean top1"}, "rows": [ROW | {"runs": "runs/b*"}]}, results)


def test_a_column_may_show_other_runs_and_is_empty_where_a_row_has_none(results: Path) -> None:
    columns = {"top-1": "mean top1 others"}
    rows = [ROW, ROW | {"others": "runs/a_seed1.json"}]
    assert tables.render({"columns": columns, "rows": rows}, results).splitlines()[2:] == ["|  |", "| .760 |"]


def test_a_column_may_show_one_of_several_precisions(tmp_path: Path) -> None:
    cells = [{"precision": "W4", "voc07_map": 0.4}, {"precision": "W2", "voc07_map": 0.2}]
    (tmp_path / "a.json").write_text(json.dumps(cells))
    table = {"columns": {"W2": "each W2:voc07_map"}, "rows": [{"runs": "a.json"}]}
    assert tables.render(table, tmp_path).endswith("| .200 |\n")


def test_a_table_that_was_edited_by_hand_is_told_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tables.ROOT / "results", tmp_path / "results")
    original = (tables.ROOT / "README.md").read_text()
    edited = original.replace("| float | .757 |", "| float | .800 |")
    assert edited != original
    (tmp_path / "README.md").write_text(edited)
    (tmp_path / "EXPERIMENTS.md").write_text("")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out == "README.md: is not what results/ says\n"
    assert (tmp_path / "README.md").read_text() == edited
    assert tables.main([]) == 0
    assert (tmp_path / "README.md").read_text() == original
