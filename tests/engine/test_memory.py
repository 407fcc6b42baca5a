"""A step's memory is asked for once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lbdet.engine import memory

FAULTS = """
import resource
import torch
from lbdet.engine.memory import keep_freed_memory

print(keep_freed_memory())
for step in range(12):
    if step == 8:  # the first ones come to terms with small tensors in between
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(12_000_000) for _ in range(3)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(not hasattr(os, "confstr") or sys.platform != "linux", reason="glibc's malloc")


def faults(**environment: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    out = subprocess.check_output([sys.executable, "-c", FAULTS], env=clean | environment, text=True)
    done, pages = out.split()
    return done, int(pages)


@glibc
def test_a_step_finds_the_memory_of_those_before() -> None:
    done, pages = faults()
    assert done == "True"
    left_alone, pages_as_usual = faults(MALLOC_ARENA_MAX="2")  # what the environment says stays
    assert left_alone == "False"
    assert pages < pages_as_usual / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert not memory.keep_freed_memory()
