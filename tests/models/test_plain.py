"""A file of torch is read without running code, and takes no more memory than it has bytes."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lbdet.models.plain import load_plain

CONTENT = {"a": torch.arange(5.0), "b": [1, None, "x"]}


class Harm:
    """What would make a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def pickled(path: Path, code: bytes) -> None:
    rewrite(path, {"archive/data.pkl": b"\x80\x02" + code + b".", "archive/version": b"3\n"})


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_and_plain_data_come_back(archive: bool, tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "x", _use_new_zipfile_serialization=archive)
    found = load_plain(tmp_path / "x", checksums=archive)
    assert torch.equal(found["a"], CONTENT["a"])
    assert found["b"] == CONTENT["b"]


@pytest.mark.parametrize("archive", [True, False])
def test_an_object_with_code_is_refused(archive: bool, tmp_path: Path) -> None:
    torch.save({"a": Harm(tmp_path / "harm")}, tmp_path / "x", _use_new_zipfile_serialization=archive)
    with pytest.raises(Exception, match="mkdir"):
        load_plain(tmp_path / "x")
    assert not (tmp_path / "harm").exists()


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "x")
    rewrite(tmp_path / "x", members_of(tmp_path / "x"), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="members must be stored as they are"):
        load_plain(tmp_path / "x")


@pytest.mark.parametrize("name", ["builtins\nbytearray", "__builtin__\nbytearray", "_codecs\nencode"])
def test_functions_that_make_much_of_little_are_refused(name: str, tmp_path: Path) -> None:
    pickled(tmp_path / "x", f"c{name}\n".encode() + b"\x8a\x05\0\0\0\0\x17\x85R")
    with pytest.raises(ValueError, match="plain data must not call"):
        load_plain(tmp_path / "x")


def test_they_are_refused_in_the_old_format_too(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"a": 1, "b": bytearray(b"x")}, file, _use_new_zipfile_serialization=False)
    (tmp_path / "x").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="plain data must not call"):
        load_plain(tmp_path / "x")


def test_checksums_are_checked_where_asked_for(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    value = CONTENT["a"].numpy().tobytes()
    (tmp_path / "x").write_bytes(data.replace(value, bytes(len(value))))
    load_plain(tmp_path / "x")
    with pytest.raises(Exception, match=r"CRC|checksums"):
        load_plain(tmp_path / "x", checksums=True)
    torch.save(CONTENT, tmp_path / "x", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="must be an archive"):
        load_plain(tmp_path / "x", checksums=True)
