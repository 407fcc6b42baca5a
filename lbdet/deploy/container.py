"""A safetensors file that knows when it is damaged: it ends with the SHA-256 of all bytes before that.

    8 bytes   N, little endian
    N bytes   JSON: "__metadata__", a map of text to text, and each tensor's dtype, shape and offsets; spaces
    the rest  the tensors without gaps: wide dtypes first, so that each is aligned; "packed.sha256" last

Any safetensors reader opens it. This one reads files of unknown origin: nothing is allocated before the sizes
that the header claims are checked against the size of the file, and nothing in the file is executed. A hash
is no signature: who changes a file on purpose can write its new hash as well.

Reference: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from lbdet.errors import UserError
from lbdet.files import write_atomically

FORMAT, VERSION = "lbdet.packed", "1"
RESERVED = "packed."
"""what names of tensors begin with that are none of the model's"""
_SHA256 = RESERVED + "sha256"
_MAX_HEADER = 16 << 20
_MAX_ELEMENTS = 1 << 48
DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "F16": torch.float16,
    "BF16": torch.bfloat16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_Offset = Annotated[int, Field(strict=True, ge=0, lt=_MAX_ELEMENTS)]


@dataclass(frozen=True)
class _Entry:
    """One tensor of the header."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    dtype: Annotated[str, Field(strict=True, max_length=8)]
    shape: Annotated[list[_Offset], Field(max_length=8)]
    data_offsets: Annotated[list[_Offset], Field(min_length=2, max_length=2)]


_ENTRIES = TypeAdapter(dict[str, _Entry])
_METADATA = TypeAdapter(dict[str, str], config=ConfigDict(strict=True))


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write tensors and metadata, atomically and always in the same order; return the size of the file.

    Raises:
        UserError: a dtype that safetensors does not have, or a file that cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": VERSION, **metadata}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = _described(dtype_name(name, tensors[name]), tensors[name].shape, start, end)
    header[_SHA256] = _described("U8", (32,), end, end + 32)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write_all(temporary: Path) -> None:
        digest = hashlib.sha256()
        with open(temporary, "wb") as file:
            for block in (len(text).to_bytes(8, "little"), text, *(octets(tensors[name]) for name in order)):
                digest.update(block)
                file.write(block)
            file.write(digest.digest())

    write_atomically(path, write_all)
    return 8 + len(text) + end + 32


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a file that is whole, on the CPU, without format, version and hash.

    Raises:
        UserError: there is no such file, it is damaged, of another version, or no packed model.
    """
    if not path.is_file():
        found = "a directory" if path.is_dir() else "no such file"
        raise UserError(f"{path}: a packed model must be a file, got {found}; give its path")
    try:
        with open(path, "rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def dtype_name(name: str, tensor: Tensor) -> str:
    """Return how safetensors calls a tensor's dtype.

    Raises:
        UserError: it does not know it.
    """
    if tensor.dtype not in NAMES:
        raise UserError(f"{name}: must be one of {', '.join(DTYPES)}, got {tensor.dtype}; convert it")
    return NAMES[tensor.dtype]


def octets(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, little endian, row by row; a view where it lies so on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def parse_json(text: str | bytes) -> Any:
    """Read JSON in which no key stands twice.

    Raises:
        ValueError: it is not.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def first_error(error: ValidationError) -> str:
    """Return the place and the reason of the first mistake, short and in a line."""
    mistake = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, mistake['loc']))!a:.120}: {mistake['msg']:.120}"


def _described(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _read(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    length = file.read(8)
    header_size = int.from_bytes(length, "little")
    if size < 8 or header_size > min(_MAX_HEADER, size - 8):
        raise _damaged(path, "must be a packed model", "a file cut short or of another kind")
    text = file.read(header_size)
    metadata, entries = _parse(path, text)
    position = 0
    for entry in entries.values():
        start, end = entry.data_offsets
        if start != position or end - start != _size(path, entry):
            raise _damaged(path, "tensors must follow each other without gaps", f"one at {start} to {end}")
        position = end
    if size - 8 - header_size != position:
        raise _damaged(path, f"must have {8 + header_size + position} bytes", str(size))
    if list(entries)[-1:] != [_SHA256] or entries[_SHA256].shape != [32]:
        raise _damaged(path, f"must end with {_SHA256!r}", "another last tensor")
    data = memoryview(file.read(position))
    digest = hashlib.sha256(length + text)
    digest.update(data[:-32])
    if digest.digest() != data[-32:]:
        raise _damaged(path, "must have the SHA-256 that it ends with", "changed bytes")
    return metadata, dict(_tensors(data, entries))


def _parse(path: Path, text: bytes) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Return metadata and the tensors' entries in the order of their data."""
    try:
        header = parse_json(text.decode())
        if not isinstance(header, dict):
            raise ValueError("no object")
        metadata = _METADATA.validate_python(header.pop("__metadata__", {}))
        entries = _ENTRIES.validate_python(header)
    except ValidationError as error:
        raise _damaged(
            path, "must be a packed model", f"a header with a mistake at {first_error(error)}"
        ) from None
    except ValueError:
        raise _damaged(path, "must be a packed model", "a header that is no JSON") from None
    if metadata.pop("format", None) != FORMAT:
        raise UserError(f"{path}: must be a packed model, got another safetensors file; pack a model first")
    version = metadata.pop("version", None)
    if version != VERSION:
        raise UserError(
            f"{path}: must be of format version {VERSION}, got {version!a:.20}; "
            "read it with the lbdet that wrote it"
        )
    return metadata, dict(sorted(entries.items(), key=lambda item: item[1].data_offsets))


def _size(path: Path, entry: _Entry) -> int:
    """Return how many bytes a tensor takes."""
    if entry.dtype not in DTYPES or math.prod(max(1, n) for n in entry.shape) > _MAX_ELEMENTS:
        raise _damaged(path, "tensors must have a known dtype and size", f"{entry.dtype!a} {entry.shape}")
    return math.prod(entry.shape) * DTYPES[entry.dtype].itemsize


def _tensors(data: memoryview, entries: Mapping[str, _Entry]) -> Iterator[tuple[str, Tensor]]:
    for name, entry in entries.items():
        start, end = entry.data_offsets
        if name == _SHA256:
            continue
        if start == end:
            yield name, torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        else:  # a copy: it can be written to, and is aligned whatever the offsets
            flat = torch.frombuffer(bytearray(data[start:end]), dtype=DTYPES[entry.dtype])
            yield name, flat.reshape(entry.shape)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _damaged(path: Path, rule: str, got: str) -> UserError:
    return UserError(f"{path}: {rule}, got {got}; copy or pack it anew")
