"""Read what `torch.save` wrote: tensors and plain data, no code, and not more than the file has bytes.

`weights_only=True` lets no code run. It does not bound memory: members of the archive may be compressed, and
a few allowed functions make much of little, such as `bytearray(10**11)`. Files of torch need neither.
"""

from __future__ import annotations

import os
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

_ZIP = b"PK\3\4"
_OLD_FORMAT = 5  # pickles in a file of torch before 1.6, the storages behind them
_GROWING = {"builtins bytearray", "__builtin__ bytearray", "_codecs encode"}
"""allowed functions whose result may be far larger than their argument"""


def load_plain(path: str | os.PathLike[str], checksums: bool = False) -> Any:
    """Return the content of a file of torch, on the CPU.

    Args:
        path: an archive, or a file in the format before torch 1.6.
        checksums: check every byte against the checksums (CRC-32) of the archive, which it must be then.

    Raises:
        Exception: whatever damaged bytes or a content of another kind lead to.
    """
    if not Path(path).is_file():
        raise FileNotFoundError("no such file")
    with open(path, "rb") as file:
        is_zip = file.read(4) == _ZIP
        file.seek(0)
        if is_zip:
            _check_archive(file, checksums)
        elif checksums:
            raise ValueError("must be an archive")
        else:
            for _ in range(_OLD_FORMAT):
                _check_pickle(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on types of storage and the like
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(file: IO[bytes], checksums: bool) -> None:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise ValueError("members must be stored as they are")
        if checksums and archive.testzip() is not None:
            raise ValueError("checksums must fit")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                with archive.open(entry) as member:
                    _check_pickle(member)


def _check_pickle(file: IO[bytes]) -> None:
    """Look through the opcodes of one pickle; nothing is made of them."""
    for _, argument, _ in pickletools.genops(file):
        if argument in _GROWING:
            raise ValueError(f"plain data must not call {argument}")
