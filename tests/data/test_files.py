"""Files of unknown origin are read whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzz.guards import in_time

from lbdet.data.files import check_root, open_regular, read_bytes, read_json, read_text, reason
from lbdet.errors import UserError


def test_a_file_of_the_limit_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(2048))
    assert len(read_bytes(tmp_path / "x", 2048)) == 2048
    with pytest.raises(OSError, match="a file of more than 1 KiB"):
        read_bytes(tmp_path / "x", 2047)


def test_of_a_file_beyond_the_limit_no_more_is_read_than_that_shows_it(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    os.truncate(tmp_path / "x", 1 << 43)  # 8 TiB of nothing
    with pytest.raises(OSError, match="a file of more than 1 KiB"):
        read_bytes(tmp_path / "x", 1024)


def test_devices_are_refused_also_behind_links(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "x", tmp_path / "pipe", Path("/dev/null")):
        with in_time(5), pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


def test_text_loses_its_byte_order_mark_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfa\r\nb\xc3\xa9")
    assert read_text(tmp_path / "x", 99) == "a\r\nb\u00e9"
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "x", 99)


def test_json_is_read_as_it_is_and_its_nan_as_the_caller_says(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, null, "\xc3\xa9"], "b": [NaN, -Infinity]}')
    found = read_json(tmp_path / "x")
    assert found["a"] == [1, 2.5, None, "\u00e9"]
    assert str(found["b"]) == "[nan, -inf]"
    assert read_json(tmp_path / "x", parse_constant=str.lower)["b"] == ["nan", "-infinity"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be JSON, got Expecting value"),
        (b"[" * 100_000, "must be JSON, got maximum recursion depth"),
        (b'{"a":' * 100_000, "must be JSON, got maximum recursion depth"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "must be JSON, got the key 'c' twice in one object"),
        (b'{"%s": 1, "%s": 2}' % ((b"x" * 999,) * 2), f"must be JSON, got the key '{'x' * 56}... twice in"),
        (b"[" + b"9" * 5000 + b"]", "must be JSON, got "),
        (b"\xff", "must be JSON in UTF-8, got "),
        ('"\u00e9"'.encode("utf-16"), "must be JSON in UTF-8, got "),
        (b" " * (1 << 20), "cannot be read, got a file of more than 1023 KiB"),
        (None, "cannot be read, got No such file"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_told_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "x", (1 << 20) - 1)
    assert str(error.value).startswith(f"{tmp_path / 'x'}: {message}")
    assert len(str(error.value).splitlines()) == 1


def test_a_reason_is_short_and_never_empty() -> None:
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
    assert reason(MemoryError()) == "MemoryError"
    assert reason(ValueError(f"bad {object()}")) == "bad <object>"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("mine", "see datasets/README.md"),
        ("voc_subset", "make it with tools/prepare_voc_subset.py"),
        ("voc_subset/", "make it with tools/prepare_voc_subset.py"),
        ("cifar10_10k/cifar10_10k_2k.npz", "make it with tools/prepare_cifar10_10k.py"),
    ],
)
def test_a_data_set_that_is_not_there_is_told_with_how_to_get_it(
    tmp_path: Path, name: str, remedy: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_root(f"{tmp_path}/{name}")
    assert str(caught.value) == f"{tmp_path}/{name}: data set does not exist; {remedy}"
    check_root(tmp_path)
    assert (Path(__file__).parents[2] / remedy.split()[-1]).is_file()
