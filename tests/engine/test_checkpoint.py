"""Files are whole or not there, and reading one runs no code."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch

from lbdet.engine.checkpoint import load_checkpoint, save_checkpoint
from lbdet.errors import UserError

STATE = {"networks": [{"model": {"a": torch.arange(1000.0)}, "optimizer": {}}], "step": 3, "total_steps": 9}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    loaded, remark = load_checkpoint(path)
    assert remark == ""
    saved, expected = loaded.pop("networks"), STATE["networks"]
    assert torch.equal(saved[0]["model"].pop("a"), expected[0]["model"]["a"])
    assert saved == [{"model": {}, "optimizer": {}}]
    assert loaded == {key: value for key, value in STATE.items() if key != "networks"}
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_says_so(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    save_checkpoint(path, {**STATE, "step": 4})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.previous.pt", "checkpoint.pt"]
    content = path.read_bytes()
    assert load_checkpoint(path)[0]["step"] == 4
    for damaged in (
        b"",
        content[:-30],
        content[: len(content) // 2] + b"?" + content[len(content) // 2 + 1 :],
    ):
        path.write_bytes(damaged)
        state, remark = load_checkpoint(path)
        assert state["step"] == 3
        assert remark.startswith(f"{path}: is no readable checkpoint")
        assert remark.endswith("; checkpoint.previous.pt, the one before, is taken")


def test_a_flipped_bit_in_any_tensor_is_found(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    content = path.read_bytes()
    start = content.index(STATE["networks"][0]["model"]["a"].numpy().tobytes())
    for offset in range(0, 4000, 97):
        changed = bytearray(content)
        changed[start + offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        with pytest.raises(UserError, match="is no readable checkpoint"):
            load_checkpoint(path)


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes(b"?")
    with pytest.raises(UserError, match=r"checkpoint\.previous\.pt: is no readable checkpoint"):
        load_checkpoint(path)


def test_the_checkpoint_before_is_kept_where_files_cannot_be_linked(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(1, "no links here")))
    for step in (1, 2, 3):
        save_checkpoint(path, {**STATE, "step": step})
    path.write_bytes(b"")
    assert load_checkpoint(path)[0]["step"] == 2


@pytest.mark.parametrize("length", [0, 1, 100, 1000, -1, -100])
def test_a_checkpoint_cut_short_is_told(tmp_path, length):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"is no readable checkpoint .*; remove it to start the run again"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"text", b"\x80\x04.", b"PK\x03\x04", b"\0" * 64, b"(lp0\n.", b"\x80\x02}q\0."]
)
def test_a_file_that_is_no_checkpoint_is_told(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint\.pt: is no .*checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("state", [{"networks": []}, [1, 2], torch.zeros(2)])
def test_a_file_of_something_else_is_told(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    with pytest.raises(UserError, match="is no checkpoint of a run; remove it to start the run again"):
        load_checkpoint(path)


class Evil:
    """Run a command when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_does_not_run(tmp_path, save):
    path = tmp_path / "checkpoint.pt"
    save({**STATE, "evil": Evil(str(tmp_path / "was_here"))}, path)
    with pytest.raises(UserError, match="is no readable checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "was_here").exists()


def test_a_checkpoint_with_compressed_members_is_refused_before_they_are_unpacked(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=r"checkpoint.pt: is no readable checkpoint \(ValueError\)"):
        load_checkpoint(path)
