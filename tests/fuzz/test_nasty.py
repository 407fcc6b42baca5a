"""Files written by hand to do harm, and odd ones that are right: what each reader says to them."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import corpus
from fuzz.corpus import an_annotation, an_object, encoded, saved, zipped
from fuzz.guards import WATCH, bounded_address_space, forget_peak, in_time, peak
from fuzz.kinds import KINDS, sealed
from fuzz.mutate import as_png
from fuzz.test_fuzz import on_linux, outcome, prepared

READ = ""
"""instead of a part of the message: the file is read"""
EITHER = None
"""versions of Python differ"""
DAMAGED = "got a damaged file or one with code or objects"
UNREADABLE = "is no readable checkpoint"
NO_SAFETENSORS = "must be a safetensors file"
BYTEARRAY = b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x17\x85R"
BY_NAME = {kind.name: kind for kind in KINDS}


class Payload:
    """What would make a folder where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


LAUGHS = "<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{k} '{f'&a{k - 1};' * 10}'>" for k in range(1, 12))


def coco(**changes: Any) -> bytes:
    """Change the first image or annotation: `image_width=...`, `annotation_bbox=...`."""
    content = json.loads(json.dumps(corpus.COCO))
    for name, value in changes.items():
        part, _, key = name.partition("_")
        content[f"{part}s"][0][key] = value
    return json.dumps(content).encode()


def config(**changes: Any) -> bytes:
    return json.dumps({**corpus.CONFIGS[0], **changes}).encode()


def cyclic(**changes: Any) -> bytes:
    return config(schedule={"name": "cyclic", "start": "W5", "target": "W4", **changes})


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", more: Any = ()) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return as_png([(b"IHDR", header), *more, (b"IDAT", zlib.compress(data)), (b"IEND", b"")])


def recompressed(data: bytes, name: str, content: bytes) -> bytes:
    """Replace a member of a file of torch by a compressed one."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (full,) = (member for member in members if member.endswith(name))
    return zipped(members | {full: content})


def pickled(code: bytes) -> bytes:
    """Return a file of torch whose pickle is `code`."""
    return zipped(
        {"archive/data.pkl": b"\x80\x02" + code + b".", "archive/version": b"3\n"}, zipfile.ZIP_STORED
    )


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    known = {"classes": np.array(["a"]), "x_train": np.zeros((1, 2, 2), np.uint8), "y_train": np.array([0])}
    np.savez(file, **(known | arrays))
    return file.getvalue()


def npz_with(**members: bytes) -> bytes:
    """Write some members of an archive by hand."""
    with zipfile.ZipFile(io.BytesIO(npz())) as archive:
        known = {info.filename: archive.read(info) for info in archive.infolist()}
    return zipped(known | {f"{name}.npy": content for name, content in members.items()})


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def header(dtype: str, *shape: int, data: bytes = b"x") -> bytes:
    return npy(str({"descr": dtype, "fortran_order": False, "shape": shape}), data)


def claiming(archive: bytes, name: str, size: int) -> bytes:
    """Let an archive's directory say that a member has `size` bytes."""
    changed = bytearray(archive)
    at = changed.rindex(name.encode()) - 46
    changed[at + 24 : at + 28] = struct.pack("<I", size)
    return bytes(changed)


GROWTH = b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1tR"
OTHER_DTYPES = ("F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "U16", "U32", "U64", "C64", "X9")
SELECTED = corpus.tiny_imagenet_members()
DEEP = 100_000
OBJECTS = 5_000

File = bytes | Callable[[], bytes]
"""large ones are made when they are needed"""
FILES: dict[str, dict[str, tuple[File, str | None]]] = {
    "voc xml": {
        "billion laughs": (
            f"<!DOCTYPE x [{LAUGHS}]><annotation>&a11;</annotation>".encode(),
            "EntitiesForbidden",
        ),
        "external entity": (
            b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>',
            "EntitiesForbidden",
        ),
        "parameter entity": (
            b'<!DOCTYPE x [<!ENTITY % a SYSTEM "http://localhost:9/x"> %a;]><annotation/>',
            "EntitiesForbidden",
        ),
        "external definition": (
            b'<!DOCTYPE x SYSTEM "http://localhost:9/x.dtd">' + corpus.annotations()[1], READ,
        ),
        "deep": (b"<a>" * DEEP + b"</a>" * DEEP, "must have a <size>, got none"),
        "deep object": (
            an_annotation("<object>" + "<a>" * DEEP + "</a>" * DEEP + "</object>").encode(),
            "must have a <name>, got none",
        ),
        "large": (lambda: b"<a>" + b" " * (4 << 20) + b"</a>", "got a file of more than 4096 KiB"),
        "many classes": (
            lambda: an_annotation(*(an_object(f"class {k}") for k in range(OBJECTS))).encode(),
            f"{OBJECTS} problems",
        ),
        "long class": (an_annotation(an_object("x" * 100_000)).encode(), "class must be one of"),
        "long number": (an_annotation(width="9" * 5000).encode(), "<size> must be positive integers"),
        "large number": (an_annotation(width=10**9).encode(), "<size> must be positive integers"),
        "large image": (an_annotation(width=10**8).encode(), "image must have 1 to 89478485 pixels"),
        "exponent": (an_annotation(an_object(box=(1, 1, "1e999", 2))).encode(), "xmax must be a number"),
        "nan": (an_annotation(an_object(box=(1, "nan", 2, 2))).encode(), "ymin must be a number"),
        "nothing left in float32": (
            an_annotation(an_object(box=("100.99999999", 1, "100.99999999", 9))).encode(),
            "box must lie inside the image",
        ),
        "other digits": (an_annotation(width="١٠٠").encode(), READ),
        "superscript": (an_annotation(width="²").encode(), "<size> must be positive integers"),
        "no file": (b"", "must be plain XML, got no element found"),
        "nul": (corpus.annotations()[1].replace(b"cat", b"c\0t"), "must be plain XML"),
        "other encoding": (b"<?xml version='1.0' encoding='utf-7'?><annotation/>", "must be plain XML"),
        "codec that is no encoding": (b"<?xml version='1.0' encoding='zlib'?><a/>", "must be plain XML"),
        "not what it says": (b"<?xml version='1.0' encoding='utf-16'?><annotation/>", "must be plain XML"),
        "namespace": (corpus.annotations()[1].replace(b"<annotation", b"<annotation xmlns='x'"), "<size>"),
    },
    "voc split": {
        "nul": (b"a\0\n", "must name a file without a folder"),
        "folder": (b"../Annotations/a\n", "must name a file without a folder"),
        "utf-16": ("a\n".encode("utf-16"), "train.txt must be UTF-8 text"),
        "long line": (b"x" * (1 << 20), "must have an image xxx"),
        "order mark": (b"\xef\xbb\xbfa\n", READ),
    },
    "coco json": {
        "deep": (b'{"images":' + b"[" * DEEP + b"]" * DEEP + b"}", "must be JSON, got maximum recursion"),
        "long number": (coco().replace(b"100", b"9" * 10_000), "must be JSON"),
        "large number": (coco(image_width=10**400), "image must have 1 to 89478485 pixels"),
        "large coordinate": (coco(annotation_bbox=[1, 2, 10**400, 3]), "bbox must be four numbers"),
        "nan": (coco(annotation_bbox=[1, 2, float("nan"), 3]), "bbox must be four numbers"),
        "infinity": (coco(annotation_bbox=[1, 2, float("inf"), 3]), "bbox must be four numbers"),
        "truth": (coco(annotation_bbox=[True, 2, 3, 3]), "bbox must be four numbers"),
        "true width": (coco(image_width=True), "width must be a positive integer, got True"),
        "key twice": (coco().replace(b'"width": 100', b'"width": 9, "width": 100'), "the key 'width' twice"),
        "order mark": (b"\xef\xbb\xbf" + coco(), READ),
        "utf-16": (coco().decode().encode("utf-16"), "must be JSON in UTF-8"),
        "surrogate": (coco(image_file_name="\ud800"), "file_name must be valid Unicode, got '\\ud800'"),
        "number and text": (coco(annotation_category_id="nine"), "category_id must be the id"),
        "ids that read the same": (coco(image_id="3"), "id must be unique, got 3 again"),
        "folder above": (coco(image_file_name="../x.json"), "file_name must stay inside"),
        "absolute": (coco(image_file_name="/etc/passwd"), "file_name must stay inside"),
        "long name": (coco(image_file_name="x/" * 5000), "file_name must exist in"),
        "nul": (coco(image_file_name="a\0/b"), "file_name must exist in"),
        "nothing left in float32": (coco(annotation_bbox=[99.9999999, 1, 0.9, 3]), "bbox must lie inside"),
    },
    "yaml config": {
        "python object": (b"!!python/object/apply:os.mkdir [harm]", "tags are not allowed"),
        "python name": (b"a: !!python/name:os.mkdir", "tags are not allowed"),
        "aliases": (
            b"a: &a [x]\n" + b"".join(b"b%d: [*a, *a]\n" % k for k in range(9)), "aliases are not allowed",
        ),
        "truth that is none": (b"a: !!bool maybe", "tags are not allowed"),
        "time that is none": (b"a: !!timestamp v", "tags are not allowed"),
        "merge": (b"a: {<<: {b: 1}}", "could not determine a constructor"),
        "deep flow": (b"[" * DEEP, "line 1, column 21: values must not be nested so deeply"),
        "deep block": (b"- " * DEEP, "values must not be nested so deeply"),
        "deep mapping": (b"{a: " * 50_000, "values must not be nested so deeply"),
        "large": (b"a: " + b"x" * (1 << 18), "cannot be read: a file of more than 256 KiB"),
        "sixties": (b"seed: 1" + b":1" * 20_000, "seed: must be"),
        "hexadecimal": (b"seed: 0x" + b"f" * 10_000, "seed: must be"),
        "many unknown keys": (b"".join(b"k%d: 1\n" % k for k in range(5_000)), "more"),
        "key twice": (b"a: 1\na: 2", "key 'a' stands twice"),
        "other key": (b"1: 2", "keys must be texts, got 1"),
        "nul": (b"a: \0", "is not YAML: unacceptable character"),
        "utf-16": ("a: b".encode("utf-16"), "is not YAML: 'utf-8' codec can't decode"),
        "two documents": (b"a: 1\n---\nb: 2", "expected a single document"),
        "impossible date": (b"seed: 2001-99-99", "is not YAML: month must be in 1..12"),
        "wide": (cyclic(start="W999999999"), "must have at most 32 bits"),
        "often": (cyclic(cycles=10**12), "cycles: must be less than"),
        "long width": (config(schedule={"target": "W" + "9" * 5000}), "must be 'float' or like W4"),
        "infinite": (corpus.configs()[0].replace(b"5.0e-4", b".inf"), "train.lr: must be"),
        "order mark": (b"\xef\xbb\xbf" + config(), READ),
    },
    "safetensors": {
        "header of 2^63": (safetensors(b"{}", length=1 << 63), NO_SAFETENSORS),
        "header of a tebibyte": (safetensors(b"{}", length=1 << 40), NO_SAFETENSORS),
        "overlap": (
            safetensors({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)), NO_SAFETENSORS,
        ),
        "negative": (safetensors({"a": entry("U8", [-1, -4], 0, 4)}, bytes(4)), NO_SAFETENSORS),
        "product beyond everything": (
            safetensors({"a": entry("F32", [1 << 62, 1 << 62], 0, 4)}, bytes(4)), NO_SAFETENSORS,
        ),
        "nothing of an absurd size": (
            safetensors({"a": entry("F32", [0, 1 << 62], 0, 0)}), "weights must",
        ),
        "deep metadata": (
            safetensors({"__metadata__": {"classes": "[" * DEEP}, "a": entry("U8", [1], 0, 1)}, b"x"),
            "metadata 'classes' must be a JSON list of names",
        ),
        "long number in metadata": (
            safetensors({"__metadata__": {"classes": "[" + "9" * 9000}, "a": entry("U8", [1], 0, 1)}, b"x"),
            "metadata 'classes' must be a JSON list of names",
        ),
        "surrogate": (
            safetensors({"__metadata__": {"classes": '["\\ud800"]'}, "a": entry("U8", [1], 0, 1)}, b"x"),
            "metadata 'classes' must be a JSON list of names",
        ),
        **{
            f"dtype {name}": (safetensors({"a": entry(name, [2], 0, size)}, bytes(size)), "must be")
            for name in OTHER_DTYPES for size in [16 if name in ("U64", "C64") else 2]
        },
        "pickle": (saved({}), NO_SAFETENSORS),
    },
    "pickled weights": {
        "payload": (saved({"a": Payload()}), DAMAGED),
        "payload in the old format": (
            saved({"a": Payload()}, _use_new_zipfile_serialization=False), DAMAGED,
        ),
        "plain pickle": (pickle.dumps({"a": Payload()}), DAMAGED),
        "bomb in a member": (
            lambda: recompressed(saved({"a": torch.zeros(9)}), "data/0", bytes(100 << 20)), DAMAGED,
        ),
        "bytearray": (pickled(BYTEARRAY), DAMAGED),
        "old bytearray": (
            pickled(BYTEARRAY.replace(b"builtins", b"__builtin__")), DAMAGED,
        ),
        "growing text": (pickled(GROWTH), DAMAGED),
        "repeated": (saved({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}), "must be a state dict of"),
        "sparse": (saved({"a": torch.eye(3).to_sparse()}), "must be a state dict of tensors"),
        "without values": (saved({"a": torch.empty(9, device="meta")}), "must be a state dict of tensors"),
        "complex": (saved({"a": torch.zeros(2, dtype=torch.complex64)}), "keys missing"),
        "a list": (saved([torch.zeros(1)]), "weights must be a state dict, got list"),
        "nested": (saved({"model": {"model": {}}}), "must be a state dict of tensors, got dict at 'model'"),
        "nothing": (saved({}), "weights must hold tensors, got none"),
        "infinite": (
            saved(dict(corpus.tiny_model().state_dict()) | {"2.bias": torch.tensor([1.0, torch.inf])}),
            "weights must be finite",
        ),
        "text": (b"hello", DAMAGED),
    },
    "checkpoint": {
        "payload": (saved({"networks": Payload(), "step": 1, "total_steps": 2}), UNREADABLE),
        "bomb": (lambda: recompressed(corpus.checkpoints()[0], "data/0", bytes(100 << 20)), UNREADABLE),
        "bytearray": (pickled(BYTEARRAY), UNREADABLE),
        "old format": (saved({"networks": 1}, _use_new_zipfile_serialization=False), UNREADABLE),
        "other content": (saved({"a": 1}), "is no checkpoint of a run"),
    },
    "packed model": {
        "header of 2^63": (safetensors(b"{}", length=1 << 63), "got a file cut short"),
        "negative": (sealed(safetensors({"a": entry("U8", [-4], 0, 4)}, bytes(36))), "header with a mistake"),
        "deep": (sealed(safetensors(b'{"a":' * DEEP, bytes(32))), "a header that is no JSON"),
        "pickle": (saved({}), "must be a packed model"),
    },
    "image": {
        "100000x100000": (png(100_000, 100_000), "image must have 1 to 89478485 pixels"),
        "2^31": (png(2**31 - 1, 1), "image must have 1 to 89478485 pixels"),
        "a side too long": (png(1 << 25, 1), "image must have 1 to 89478485 pixels, got 33554432x1"),
        "the largest": (lambda: png(9400, 9500, 1, 0, bytes(9500 * 1176)), READ),
        "zero": (png(0, 0), "must"),
        "zero height": (png(5, 0), "must"),
        "no data": (png(50, 50), "must be a whole JPEG or PNG image"),
        "too much data": (png(2, 2, data=bytes(1 << 20)), READ),
        "1x1": (encoded("RGB", "PNG", (1, 1)), READ),
        "16 bits": (encoded("I;16", "PNG"), READ),
        "cmyk": (encoded("CMYK", "JPEG"), READ),
        "animated": (corpus.image_files()[-1], READ),
        "truncated": (encoded("RGB", "JPEG", (64, 64))[:-900], "must be a whole JPEG or PNG image, got"),
        "text bomb": (
            png(1, 1, data=b"\0abc", more=[(b"zTXt", b"a\0\0" + zlib.compress(bytes(9 << 20)))]),
            "got Decompressed data too large",
        ),
        "profile bomb": (
            png(1, 1, data=b"\0abc", more=[(b"iCCP", b"a\0\0" + zlib.compress(bytes(9 << 20)))]),
            "got Decompressed data too large",
        ),
        "gif": (encoded("P", "GIF"), "got another kind of file"),
        "tiff": (encoded("RGB", "TIFF"), "got another kind of file"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\nx run", "got another kind of file"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "got another kind of file"),
    },
    "npz": {
        "pickle": (npz(classes=np.array([Payload()], object)), "Object arrays cannot be loaded"),
        "plain pickle": (pickle.dumps(Payload()), "must be a whole .npz file of plain arrays"),
        "one array": (header("|u1", 1), "must be a whole .npz"),
        "claims 4 GiB": (claiming(npz(), "x_train.npy", 2**32 - 2), "got arrays of more than 4 GiB"),
        "header claims more": (
            npz_with(x_train=header("|u1", 99999, 99999, 9)),
            "got an array of uint8 [99999, 99999, 9] in",
        ),
        "long text": (
            npz_with(classes=header("<U99999999", 1)),
            "got an array of <U99999999 [1] in",
        ),
        "negative": (
            npz_with(x_train=header("|u1", -1, 4)), "must be",
        ),
        "code in the header": (npz_with(x_train=npy("__import__('os').mkdir('harm')")), "must be a whole"),
        "no text": (
            npz_with(classes=header("<U1", 1, data=b"\xff\xff\xff\x7f")),
            "must be",
        ),
        "surrogate": (npz(classes=np.array(["\ud800"])), "classes must be valid Unicode"),
        "folder above": (zipped({"../classes.npy": npy("{}")}), "must hold classes, x_train, y_train"),
        "fortran order": (npz(x_train=np.asfortranarray(np.ones((1, 3, 2), np.uint8))), READ),
        "other byte order": (npz(y_train=np.array([0], ">i8")), READ),
        "not a number": (npz(y_train=np.array([np.nan])), "y_train must be whole numbers"),
        "large label": (npz(y_train=np.array([2**64 - 1], np.uint64)), "y_train must lie in 0..0"),
    },
    "tiny imagenet zip": {
        "folder above": (zipped({**SELECTED, "../../harm": b"x", "tiny/../../harm": b"x"}), READ),
        "bomb": (lambda: zipped({**SELECTED, "tiny/words.txt": b"x" * (17 << 20)}), "17825792 bytes"),
        "claims 4 GiB": (
            claiming(zipped(SELECTED), "tiny/train/n1/images/a.JPEG", 2**32 - 2), "bytes to unpack",
        ),
        "claims less": (claiming(zipped(SELECTED), "tiny/train/n1/images/a.JPEG", 9), "fetch it anew"),
        "two lists": (zipped({**SELECTED, "x/wnids.txt": b""}), "must hold one wnids.txt, got 2"),
        "bzip2": (zipped(SELECTED, zipfile.ZIP_BZIP2), "another compression than deflate"),
        "lzma": (zipped(SELECTED, zipfile.ZIP_LZMA), "another compression than deflate"),
        "nothing": (zipped({}), "must hold one wnids.txt, got 0"),
        "no names": (zipped({**SELECTED, "tiny/words.txt": b"n1\t\nn2\t , x\n"}), READ),
    },
    "tiny imagenet table": {
        "nul": (b"split,wnid,name,file\ntrain,n\0,cat,a.JPEG\n", EITHER),
        "folder above": (b"split,wnid,name,file\ntrain,n1,cat,../a.JPEG\n", "image must exist, got none"),
        "long field": (b"split,wnid,name,file\ntrain,n1," + b"x" * 200_000 + b",a.JPEG\n", "must be a table"),
        "other columns": (b"a,b\n1,2\n", "must have columns split, wnid, name, file"),
    },
    "subset xml": {
        "no number": (an_annotation(an_object(box=("x", 1, 2, 3))).encode(), "xmin must be a number"),
        "nan": (an_annotation(an_object(box=("nan", 1, 2, 3))).encode(), "xmin must be a number, got 'nan'"),
        "infinite": (an_annotation(an_object(box=("1e999", 1, 2, 3))).encode(), "xmin must be a number"),
        "entity": (b"<!DOCTYPE x [<!ENTITY a 'b'>]><annotation>&a;</annotation>", "EntitiesForbidden"),
    },
}  # fmt: skip
LARGE = ("image", "the largest")
CASES = [
    pytest.param(kind, name, marks=[pytest.mark.slow] * ((kind, name) == LARGE))
    for kind, files in FILES.items()
    for name in files
]


@on_linux
@pytest.mark.parametrize(("kind_name", "name"), CASES)
def test_a_nasty_file_does_no_harm(
    kind_name: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, (data, expected) = BY_NAME[kind_name], FILES[kind_name][name]
    monkeypatch.chdir(tmp_path)
    folder, _ = prepared(kind, tmp_path)
    data = data if isinstance(data, bytes) else data()
    (folder / kind.place).write_bytes(data)
    before = forget_peak()
    watching = WATCH.watching(None if kind.writes is None else folder / kind.writes)
    with bounded_address_space(), watching, in_time():
        message = outcome(kind, folder)
    assert peak() - before <= kind.memory + 64 * len(data)
    assert expected is EITHER or (expected in message if expected else message == READ), message
    assert not (tmp_path / "harm").exists()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def an_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "nothing")


def a_folder(path: Path) -> None:
    path.mkdir()


@on_linux
@pytest.mark.parametrize("make", [a_pipe, an_endless_device, a_link_to_itself, a_link_to_nothing, a_folder])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_no_file_is_refused_instead_of_waited_for(
    kind: Any, make: Callable[[Path], None], tmp_path: Path
) -> None:
    folder, _ = prepared(kind, tmp_path)
    (folder / kind.place).unlink()
    make(folder / kind.place)
    with bounded_address_space(1 << 30), in_time(5):
        assert outcome(kind, folder)
