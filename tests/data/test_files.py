"""Files of unknown origin are read whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lbdet.data.files import open_regular, read_bytes, read_text, reason


def test_a_file_of_the_limit_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(2048))
    assert len(read_bytes(tmp_path / "x", 2048)) == 2048
    with pytest.raises(OSError, match="a file of more than 1 KiB"):
        read_bytes(tmp_path / "x", 2047)


def test_devices_are_refused_also_behind_links(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "x", tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


def test_text_loses_its_byte_order_mark_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfa\r\nb\xc3\xa9")
    assert read_text(tmp_path / "x", 99) == "a\r\nb\u00e9"
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "x", 99)


def test_a_reason_is_short_and_never_empty() -> None:
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
    assert reason(MemoryError()) == "MemoryError"
    assert reason(ValueError(f"bad {object()}")) == "bad <object>"
