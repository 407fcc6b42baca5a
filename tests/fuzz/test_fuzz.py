"""Ten thousand damaged files of every kind: each gives a result or one clear error, within bounds.

A case is a function of (kind, SEED, number). `FUZZ_SEED=1 pytest -m slow tests/fuzz` tries other ones;
`pytest tests/fuzz -k 'one_case' --case 'coco json:17'` is spelled `FUZZ_CASE='coco json:17'`.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzz.guards import WATCH, bounded_address_space, forget_peak, in_time, peak
from fuzz.kinds import KINDS, Kind, assert_clear

from lbdet.errors import UserError

SEED = int(os.environ.get("FUZZ_SEED", "0"))
QUICK = 200

CASE, _, NUMBER = os.environ.get("FUZZ_CASE", "").partition(":")

on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def prepared(kind: Kind, tmp_path: Path) -> tuple[Path, list[bytes]]:
    """Make the folder of a kind; read every seed once, so that later cases import nothing."""
    folder = tmp_path / "case"
    folder.mkdir()
    kind.prepare(folder)
    seeds = list(kind.seeds(tmp_path))
    for seed in seeds:
        (folder / kind.place).write_bytes(seed)
        outcome(kind, folder)
    return folder, seeds


def outcome(kind: Kind, folder: Path) -> str:
    """Read the file of a folder and check the result; return the error's text, or "" where there is none."""
    try:
        result: Any = kind.read(folder)
        kind.check(result)
    except UserError as error:
        assert_clear(str(error), str(folder))
        return str(error)
    return ""


def content(kind: Kind, seeds: list[bytes], number: int) -> bytes:
    return kind.mutate(Random(f"{kind.name}/{SEED}/{number}"), seeds)


def run(kind: Kind, tmp_path: Path, numbers: range) -> None:
    folder, seeds = prepared(kind, tmp_path)
    before = forget_peak()
    with bounded_address_space():
        for number in numbers:
            data = content(kind, seeds, number)
            (folder / kind.place).write_bytes(data)
            try:
                with WATCH.watching(None if kind.writes is None else folder / kind.writes), in_time():
                    outcome(kind, folder)
                assert peak() - before <= kind.memory, f"{(peak() - before) >> 20} MiB"
            except BaseException:
                print(f"FUZZ_SEED={SEED} FUZZ_CASE='{kind.name}:{number}': {data[:300]!r}")
                raise


@on_linux
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_damaged_file_gives_a_result_or_one_clear_error(kind: Kind, tmp_path: Path) -> None:
    run(kind, tmp_path, range(QUICK))


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_so_do_ten_thousand(kind: Kind, tmp_path: Path) -> None:
    run(kind, tmp_path, range(QUICK, kind.cases))


@on_linux
@pytest.mark.skipif(not CASE, reason="no FUZZ_CASE='kind:number'")
def test_one_case(tmp_path: Path) -> None:
    (kind,) = (kind for kind in KINDS if kind.name == CASE)
    run(kind, tmp_path, range(int(NUMBER), int(NUMBER) + 1))
