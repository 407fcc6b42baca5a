"""Files are whole or not there."""

from __future__ import annotations

import os

import pytest

from lbdet.errors import UserError
from lbdet.files import write_atomically, write_text


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="file: cannot be written: No space left on device"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def die(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, die)
    assert path.read_text() == "old"


def test_text_is_written_in_utf_8_whatever_the_locale(tmp_path):
    write_text(tmp_path / "file", "größer\n")
    assert (tmp_path / "file").read_bytes() == "größer\n".encode()
