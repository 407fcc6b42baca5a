"""Compile `native.c` where it runs, once for a machine, and load it.

The library is kept in `$XDG_CACHE_HOME/lbdet` (else `~/.cache/lbdet`) as `KEY-DIGEST.so`. KEY stands for
source, flags, compiler and the instructions of this machine: a home that machines share holds one for each.
DIGEST is the file's: one that was cut short is never loaded. It gets its name when it is complete: several
processes may start at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ["-std=c99", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
"""None changes values: `-fopenmp-simd` reorders only the sums that say so in the source"""
_SECONDS = 60
"""within which a compiler must be done; it takes about one"""

log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled `native.c`, found or made at the first call.

    Returns:
        None without a C compiler (`$CC`, cc, gcc or clang), without a folder of the user's own to keep it in,
        where the compiler or the loader fails, and where the environment says `LBDET_NATIVE=0`.
    """
    if os.environ.get("LBDET_NATIVE") == "0" or os.name != "posix":
        return None
    try:
        return _find_or_build()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.debug("native.c is not used: %s", error)
        return None


def _find_or_build() -> ctypes.CDLL:
    command, told = _command()
    key = _digest(SOURCE.read_bytes() + "\0".join(command).encode() + told)
    folder = _cache_folder()
    for path in folder.glob(f"{key}-*.so"):
        if path.stem == f"{key}-{_digest(path.read_bytes())}":
            return ctypes.CDLL(str(path))
    return ctypes.CDLL(str(_build(command, folder, key)))


def _command() -> tuple[list[str], bytes]:
    """Return the compiler with its flags, and what it predefines: its version, and a name for each set of
    instructions that the machine has.
    """
    for tuned in (["-march=native"], []):
        command = [*_compiler(), *FLAGS, *tuned]
        asked = [*command, "-dM", "-E", "-x", "c", os.devnull]
        told = subprocess.run(asked, capture_output=True, timeout=_SECONDS)
        if told.returncode == 0:
            return command, told.stdout
    raise OSError(f"{command[0]} does not understand {' '.join(FLAGS)}")


def _compiler() -> list[str]:
    """Return `$CC`, or the first compiler there is."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for words in map(shlex.split, names):
        if words and shutil.which(words[0]):
            return words
    raise FileNotFoundError(f"no C compiler, looked for {', '.join(names)}")


def _build(command: list[str], folder: Path, key: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "native.so"
        subprocess.run(
            [*command, "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"],
            check=True, capture_output=True, timeout=_SECONDS,
        )  # fmt: skip
        return made.rename(folder / f"{key}-{_digest(made.read_bytes())}.so")


def _cache_folder() -> Path:
    """Return the folder, made for the user alone.

    Raises:
        PermissionError: someone else could put a library of theirs there.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lbdet"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder}: must belong to this user and be writable by no other")
    return folder


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
