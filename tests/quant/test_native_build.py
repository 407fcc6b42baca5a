"""The C code is compiled once, by whoever comes first, and without it everything works as before."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lbdet.quant import lbw, native, native_build

LOAD = """
import pathlib, sys
from lbdet.quant import native_build
native_build.SOURCE = pathlib.Path(sys.argv[1])
print(native_build.library()._name)
"""
needs_compiler = pytest.mark.skipif(native_build.library() is None, reason="there is no C compiler")
library = native_build.library.__wrapped__
"""without the memory of the result"""


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that compiles at once, in place of native.c."""
    path = tmp_path / "small.c"
    path.write_text("int lbw(void) { return 7; }\n")
    monkeypatch.setattr(native_build, "SOURCE", path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of libraries, not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    return tmp_path / "home" / ".cache" / "lbdet"


def start(source: Path) -> subprocess.Popen[str]:
    """Load the library in a process of its own, which prints where it is."""
    return subprocess.Popen([sys.executable, "-c", LOAD, str(source)], stdout=subprocess.PIPE, text=True)


def loaded_by(process: subprocess.Popen[str]) -> Path:
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return Path(out.strip())


@needs_compiler
def test_the_library_does_what_the_source_says(cache: Path) -> None:
    found = library()
    assert found is not None
    assert found.lbw() == 7
    assert cache.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_processes_that_start_at_once_share_one_library(cache: Path, source: Path) -> None:
    processes = [start(source) for _ in range(3)]
    paths = {loaded_by(process) for process in processes}
    assert list(cache.iterdir()) == list(paths)


@needs_compiler
def test_a_damaged_library_is_made_anew(cache: Path, source: Path) -> None:
    path = loaded_by(start(source))
    whole = path.read_bytes()
    for damaged in (b"no library", whole[:5000], b""):
        path.unlink()
        path.write_bytes(damaged)
        assert loaded_by(start(source)) == path
        assert path.read_bytes() == whole


@needs_compiler
def test_a_library_that_is_there_is_not_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = library()
    monkeypatch.setattr(native_build, "_build", None)
    again = library()
    assert first is not None
    assert again is not None
    assert again._name == first._name


@needs_compiler
def test_other_source_flags_or_instructions_make_another_library(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert library()
    source.write_text(source.read_text() + "int more;\n")
    assert library()
    monkeypatch.setattr(native_build, "FLAGS", [*native_build.FLAGS, "-DOTHER"])
    assert library()
    command, told = native_build._command()
    assert b"__VERSION__" in told
    monkeypatch.setattr(native_build, "_command", lambda: (command, told + b"#define __AVX1024__ 1\n"))
    assert library()
    assert len({path.name.split("-")[0] for path in cache.iterdir()}) == len(list(cache.iterdir())) == 4


@needs_compiler
def test_flags_that_a_compiler_does_not_know_are_left_out_if_they_only_tune(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "cc"
    real = " ".join(native_build._compiler())
    plain.write_text(f'#!/bin/sh\ncase "$*" in *-march=native*) exit 1;; esac\nexec {real} "$@"\n')
    plain.chmod(0o700)
    monkeypatch.setenv("CC", str(plain))
    assert library()


def refused(caplog: pytest.LogCaptureFixture) -> str:
    """The one line of the log that says why there is no library."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, native_build.__name__):
        assert library() is None
    assert len(caplog.messages) == 1
    return caplog.messages[0]


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false", " "])
def test_without_a_compiler_that_works_there_is_none(
    compiler: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert refused(caplog).startswith("native.c is not used: ")


@needs_compiler
def test_a_source_that_does_not_compile_leaves_nothing_behind(
    cache: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source.write_text("int lbw(")
    assert "non-zero exit status" in refused(caplog)
    assert list(cache.iterdir()) == []


@needs_compiler
def test_a_folder_that_others_may_write_to_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    for mode in (0o770, 0o707):
        cache.chmod(mode)
        assert "must belong to this user and be writable by no other" in refused(caplog)
    cache.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: os.stat(cache).st_uid + 1)
    assert "must belong to this user and be writable by no other" in refused(caplog)


@needs_compiler
def test_a_folder_that_cannot_be_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "Not a directory" in refused(caplog)


def test_the_environment_can_turn_it_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBDET_NATIVE", "0")
    assert library() is None
    assert not cache.exists()


def test_without_it_values_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    expected = lbw.fake_quantize(weight, 4)
    monkeypatch.setattr(native, "_functions", lambda: None)
    assert torch.equal(lbw.fake_quantize(weight, 4), expected)
