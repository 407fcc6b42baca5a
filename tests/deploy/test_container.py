"""A container is a safetensors file, and every change of it is refused in one line, whoever made it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lbdet.deploy import container
from lbdet.errors import UserError

TENSORS = {  # few: tests go through all bytes of the file
    "weight": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "half": torch.tensor([1.5, -0.0]).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "größe": torch.tensor([-1], dtype=torch.int8),
}
METADATA = {"architecture": "ssd_tiny", "config": 'a: "b"\n'}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "model.lbw"
    container.write(path, TENSORS, METADATA)
    return path


def seal(path: Path, content: bytes) -> None:
    """Write bytes with the SHA-256 that belongs to them in place of their last 32."""
    path.write_bytes(content[:-32] + hashlib.sha256(content[:-32]).digest())


def entry(dtype: str, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def forge(path: Path, header: Any, data: bytes = b"") -> None:
    """Write a header and data, with a right hash of all and an entry for it where the header is a dict."""
    if isinstance(header, dict):
        metadata = {"format": container.FORMAT, "version": container.VERSION}
        last = {"packed.sha256": entry("U8", [32], len(data), len(data) + 32)}
        header = json.dumps({"__metadata__": metadata} | last | header).encode()
    seal(path, len(header).to_bytes(8, "little") + header + data + bytes(32))


def refusal(path: Path) -> str:
    """Return the message with which a file is refused, without its path."""
    with pytest.raises(UserError) as error:
        container.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "; " in message
    assert len(message) < 700
    return message.removeprefix(f"{path}: ")


def test_tensors_and_text_come_back(whole: Path) -> None:
    metadata, tensors = container.read(whole)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert all(tensors[name].dtype == value.dtype for name, value in TENSORS.items())
    assert tensors["half"].view(torch.int16).tolist() == TENSORS["half"].view(torch.int16).tolist()


def test_any_safetensors_reader_opens_it(whole: Path) -> None:
    with safe_open(whole, framework="pt") as file:
        assert set(file.keys()) == {*TENSORS, "packed.sha256"}
        assert file.metadata() == METADATA | {"format": "lbdet.packed", "version": "1"}
    read = load_file(whole)
    assert all(torch.equal(read[name], value) for name, value in TENSORS.items())
    digest = hashlib.sha256(whole.read_bytes()[:-32]).digest()
    assert bytes(read["packed.sha256"].tolist()) == digest


def test_every_tensor_is_aligned_to_its_dtype(whole: Path) -> None:
    size = int.from_bytes(whole.read_bytes()[:8], "little")
    assert size % 8 == 0
    header = json.loads(whole.read_bytes()[8 : 8 + size])
    for name, value in TENSORS.items():
        assert header[name]["data_offsets"][0] % value.element_size() == 0


def test_the_same_content_gives_the_same_bytes_in_any_order_and_layout(tmp_path: Path) -> None:
    turned = dict(reversed(TENSORS.items())) | {"weight": TENSORS["weight"].t().contiguous().t()}
    sizes = [container.write(tmp_path / name, t, METADATA) for name, t in (("a", TENSORS), ("b", turned))]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sizes == [(tmp_path / "a").stat().st_size] * 2


@pytest.mark.parametrize("first", [0, *(pytest.param(bit, marks=pytest.mark.slow) for bit in range(1, 8))])
def test_a_flipped_bit_anywhere_is_noticed(first: int, whole: Path) -> None:
    content = whole.read_bytes()
    for i in range(len(content)):  # of each byte another bit; in eight runs all
        changed = bytearray(content)
        changed[i] ^= 1 << (first + i) % 8
        whole.write_bytes(changed)
        refusal(whole)


def test_a_file_cut_short_anywhere_is_refused(whole: Path) -> None:
    content = whole.read_bytes()
    for size in range(len(content)):
        whole.write_bytes(content[:size])
        refusal(whole)


@pytest.mark.parametrize("more", [b"\0", b" ", bytes(32), b"x" * 1000])
def test_bytes_behind_the_end_are_refused(more: bytes, whole: Path) -> None:
    content = whole.read_bytes()
    whole.write_bytes(content + more)
    assert refusal(whole).startswith(f"must have {len(content)} bytes, got {len(content) + len(more)}")
    seal(whole, content + more)
    refusal(whole)


def test_a_hash_that_was_made_to_fit_lets_no_other_error_through(whole: Path) -> None:
    content = whole.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for i in range(header):
        changed = bytearray(content)
        changed[i] = (content[i] ^ 1, 0, 0x22, 0x5C, 0x7B, 0xFF)[i % 6]
        seal(whole, bytes(changed))
        with contextlib.suppress(UserError):
            container.read(whole)


ONE = bytes(4)
HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "absurd shape": (
        {"a": entry("F32", [1 << 30, 1 << 17], 0, 1 << 49)},
        b"",
        "must be a packed model, got a header with a mistake at 'a.data_offsets.1'",
    ),
    "more than the file holds": (
        {
            "a": entry("F32", [1 << 40], 0, 1 << 42),
            "packed.sha256": entry("U8", [32], 1 << 42, (1 << 42) + 32),
        },
        b"",
        "must have 43980465",
    ),
    "product beyond everything": (
        {"a": entry("F32", [1 << 47] * 8, 0, 4)},
        ONE,
        "tensors must have a known dtype and size, got 'F32' [140737488355328, ",
    ),
    "nothing of an absurd size": (
        {"a": entry("F32", [0, 1 << 47, 1 << 47], 0, 0)},
        b"",
        "tensors must have a known dtype and size, got 'F32' [0, ",
    ),
    "shape of another size": (
        {"a": entry("F32", [2], 0, 4)},
        ONE,
        "tensors must follow each other without gaps",
    ),
    "negative shape": (
        {"a": entry("F32", [-1, -1], 0, 4)},
        ONE,
        "must be a packed model, got a header with a mis",
    ),
    "fraction": (
        {"a": entry("F32", [1.0], 0, 4)},
        ONE,
        "must be a packed model, got a header with a mistake at",
    ),
    "truth": (
        {"a": entry("F32", [True], 0, 4)},
        ONE,
        "must be a packed model, got a header with a mistake at",
    ),
    "text": (
        {"a": entry("F32", "1", 0, 4)},
        ONE,
        "must be a packed model, got a header with a mistake at 'a.shap",
    ),
    "many dimensions": (
        {"a": entry("F32", [1] * 9, 0, 4)},
        ONE,
        "must be a packed model, got a header with a mi",
    ),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}},
        ONE,
        "must be a packed mod",
    ),
    "more keys": (
        {"a": entry("F32", [1], 0, 4) | {"x": 1}},
        ONE,
        "must be a packed model, got a header with a mis",
    ),
    "no keys": (
        {"a": {}},
        ONE,
        "must be a packed model, got a header with a mistake at 'a.dtype': Field required",
    ),
    "no entry": ({"a": None}, ONE, "must be a packed model, got a header with a mistake at 'a'"),
    "other dtype": (
        {"a": entry("F8_E4M3", [4], 0, 4)},
        ONE,
        "tensors must have a known dtype and size, got 'F8_E4M3",
    ),
    "overlap": (
        {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)},
        ONE,
        "tensors must follow each other",
    ),
    "gap": (
        {"a": entry("U8", [3], 1, 4)},
        ONE,
        "tensors must follow each other without gaps, got one at 1 to 4",
    ),
    "backwards": (
        {"a": entry("U8", [4], 4, 0)},
        ONE,
        "tensors must follow each other without gaps, got one at 4 t",
    ),
    "hash elsewhere": (
        {"packed.sha256": entry("U8", [32], 0, 32), "z": entry("U8", [4], 32, 36)},
        ONE,
        "must end with 'packed.sha256', got another last tensor",
    ),
    "hash of another shape": (
        {"packed.sha256": entry("U8", [4, 8], 0, 32)},
        b"",
        "must end with 'packed.sha256'",
    ),
    "other format": (
        {"__metadata__": {"format": "pt"}},
        b"",
        "must be a packed model, got another safetensors file",
    ),
    "metadata of numbers": (
        {"__metadata__": {"format": 1}},
        b"",
        "must be a packed model, got a header with a mis",
    ),
    "a list": (b"[]", b"", "must be a packed model, got a header that is no JSON"),
    "no JSON": (b"{", b"", "must be a packed model, got a header that is no JSON"),
    "no text": (b"\xff\xfe{}", b"", "must be a packed model, got a header that is no JSON"),
    "a key twice": (b'{"a":{},"a":{}}', b"", "must be a packed model, got a header that is no JSON"),
    "depth": (b'{"a":' * 100_000, b"", "must be a packed model, got a header that is no JSON"),
    "a long number": (b'{"a":' + b"9" * 10_000 + b"}", b"", "must be a packed model, got a header"),
    "lines": ({"a\nb": None}, b"", "must be a packed model, got a header with a mistake at 'a\\nb'"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_at_once_whatever_its_hash(name: str, tmp_path: Path) -> None:
    header, data, message = HEADERS[name]
    path = tmp_path / "model.lbw"
    forge(path, header, data)
    start = time.process_time()
    assert refusal(path).startswith(message)
    assert time.process_time() - start < 1


def test_a_well_made_file_of_another_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.lbw"
    forge(path, {"z": entry("I16", [1], 3, 5), "b": entry("U8", [3], 0, 3)}, b"\1\2\3\4\5")
    _, tensors = container.read(path)
    assert tensors["z"].tolist() == [0x0504]  # not aligned in the file
    assert tensors["b"].tolist() == [1, 2, 3]


def test_another_version_is_refused_by_its_number(whole: Path) -> None:
    forge(whole, {"__metadata__": {"format": container.FORMAT, "version": "2"}})
    assert refusal(whole) == "must be of format version 1, got '2'; read it with the lbdet that wrote it"


def test_the_length_of_the_header_is_no_reason_to_allocate(tmp_path: Path) -> None:
    path = tmp_path / "model.lbw"
    for length in (1 << 62, 1 << 40, 9):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        assert refusal(path).startswith("must be a packed model, got a file cut short or of another kind")


def write_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)


def write_pickle(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "write, message",
    [
        (write_safetensors, "must be a packed model, got another safetensors file; pack a model first"),
        (write_pickle, "must be a packed model, got a file cut short or of another kind"),
        (Path.touch, "must be a packed model, got a file cut short or of another kind"),
        (Path.mkdir, "a packed model must be a file, got a directory; give its path"),
        (lambda path: None, "a packed model must be a file, got no such file; give its path"),
    ],
)
def test_what_is_no_packed_model_is_refused(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.lbw"
    write(path)
    assert refusal(path).startswith(message)


def test_what_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x/model\.lbw: cannot be written: No such file or directory"):
        container.write(tmp_path / "x" / "model.lbw", TENSORS, METADATA)
    complex_numbers: dict[str, Tensor] = {"a": torch.zeros(2, dtype=torch.complex64)}
    with pytest.raises(UserError, match=r"a: must be one of F64, .*, got torch\.complex64; convert it"):
        container.write(tmp_path / "model.lbw", complex_numbers, METADATA)
    assert list(tmp_path.iterdir()) == []
