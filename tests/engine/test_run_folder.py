"""The folder of a run: who may write into it, and what of the log is kept."""

from __future__ import annotations

import json
import os

import pytest
import torch
from fuzz.guards import in_time
from safetensors import safe_open
from torch import nn

from lbdet.engine.run_folder import RunFolder
from lbdet.errors import UserError


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_new_folder_is_refused_to_nobody_and_not_made(run):
    run.refuse(resume=False)
    run.refuse(resume=True)
    assert not run.path.exists()


def test_a_run_is_continued_only_where_that_is_asked_for(run):
    run.start("seed: 0\n")
    run.refuse(resume=True)
    with pytest.raises(
        UserError, match="holds a run already; give --resume to continue it, or another --output"
    ):
        run.refuse(resume=False)


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.json"])
def test_the_remains_of_a_run_without_a_config_are_neither_continued_nor_taken_for_finished(run, name):
    run.path.mkdir()
    (run.path / name).write_text("{}")
    with pytest.raises(UserError, match="holds a run already"):
        run.refuse(resume=False)
    with pytest.raises(UserError, match=r"must have its config\.yaml to be resumed"):
        run.refuse(resume=True)


def test_a_folder_of_other_files_is_taken(run):
    run.path.mkdir()
    (run.path / "notes.txt").write_text("mine")
    run.refuse(resume=False)
    run.start("seed: 0\n")
    assert run.config.read_text() == "seed: 0\n"


def test_only_metrics_finish_a_run(run):
    run.start("seed: 0\n")
    run.write_json("coverage.json", [])
    assert not run.finished
    run.write_json("metrics.json", {})
    assert run.finished


def test_the_log_forgets_what_comes_after_a_step_and_lines_cut_short(run):
    run.start("")
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 0.5})
    run.log({"step": 2, "voc07_map": 0.1})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    run.forget_log_after(2)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}, {"step": 2, "voc07_map": 0.1}]


def test_the_log_forgets_lines_that_are_none(run):
    run.start("")
    path = run.path / "metrics.jsonl"
    bad = [b"[" * 100_000, b"[1]", b'{"step": null}', b'{"step": 1e999}', b'"\xff"', b"7", b"", b"\xff\xfe"]
    path.write_bytes(b"\n".join([b'{"step": 1}', *bad, b'{"step": 2}']))
    run.forget_log_after(2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_log_that_cannot_be_read_is_told(run):
    run.start("")
    os.mkfifo(run.path / "metrics.jsonl")
    with in_time(5), pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read, got not a regular"):
        run.forget_log_after(2)


def test_a_log_that_cannot_be_written_is_told(run):
    run.start("")
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: Is a directory"):
        run.log({"step": 1})


def test_a_model_file_names_its_architecture_classes_and_precision_and_takes_any_strides(run):
    run.start("")
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    run.save_model(model, "ssd_tiny", ("a", "b"), "W4")
    with safe_open(run.model, "pt") as file:
        assert file.metadata() == {"architecture": "ssd_tiny", "classes": '["a", "b"]', "precision": "W4"}
        assert torch.equal(file.get_tensor("weight"), model.weight)


def test_without_a_checkpoint_there_is_none_to_load(run):
    run.start("")
    assert run.load_checkpoint() is None


def in_a_child(work) -> int:
    """Return the exit code of a forked process: 0, or 1 where `work` raised UserError."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except UserError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def take(run) -> None:
    with run.lock():
        pass


def test_a_folder_that_a_process_writes_is_refused_to_others_until_it_ends(run):
    with run.lock():
        assert in_a_child(lambda: take(run)) == 1
        assert [file.name for file in run.path.iterdir()] == [".lock"]
    assert list(run.path.iterdir()) == []
    assert in_a_child(lambda: take(run)) == 0


def test_the_processes_that_a_run_has_started_do_not_keep_its_folder(run):
    ready, done = os.pipe(), os.pipe()
    with run.lock():
        pid = os.fork()
        if pid == 0:
            os.write(ready[1], b"1")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    assert in_a_child(lambda: take(run)) == 0
    os.write(done[1], b"1")
    os.waitpid(pid, 0)


def test_a_crash_frees_the_folder(run):
    with pytest.raises(RuntimeError), run.lock():
        raise RuntimeError
    with run.lock():
        pass


def test_a_run_that_does_not_write_changes_nothing_and_reads(run, tmp_path):
    run.start("a: 1")
    other = RunFolder(run.path, writes=False)
    before = sorted(run.path.iterdir())
    with other.lock(), run.lock():
        other.start("b: 2")
        other.log({"step": 1})
        other.forget_log_after(0)
        other.save_checkpoint({"networks": [], "step": 1, "total_steps": 1})
        other.save_model(nn.Linear(1, 1), "x", ["y"], "float")
        other.write_json("metrics.json", {})
    assert sorted(run.path.iterdir()) == before
    assert other.config.read_text() == "a: 1"
    RunFolder(tmp_path / "new", writes=False).start("")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="file/run: cannot be made"),
        RunFolder(tmp_path / "file" / "run").lock(),
    ):
        pass
