"""Which readers are fuzzed, with what, and what they may return."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from fuzz import corpus
from fuzz.mutate import (
    Mutation,
    as_json,
    by_jpeg_segment,
    by_png_chunk,
    by_tree,
    by_xml_tree,
    bytewise,
    mixed,
    mutate_bytes,
    mutate_tree,
)

from lbdet.config import dump_config, load_config
from lbdet.config.schema import Config
from lbdet.data.classification import read_npz
from lbdet.data.coco import read_coco
from lbdet.data.images import read_image
from lbdet.data.labelled import LabelledData
from lbdet.data.records import DetectionData
from lbdet.data.subset import make_subset
from lbdet.data.tiny_imagenet import read_tiny_imagenet
from lbdet.data.voc import read_voc
from lbdet.deploy.packed import PackedModel, load_packed
from lbdet.engine.checkpoint import load_checkpoint
from lbdet.errors import UserError
from lbdet.models.weights import Weights, load_into, load_weights

MB = 1 << 20


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it lies, who reads it and what that may take."""

    name: str
    place: str
    """of the file, in the folder of the kind"""
    seeds: Callable[[Path], Sequence[bytes]]
    mutate: Mutation
    read: Callable[[Path], Any]
    """from the folder of the kind to what it holds"""
    check: Callable[[Any], None]
    """asserts what every result must be"""
    prepare: Callable[[Path], None] = field(default=lambda folder: None)
    """makes what lies beside the file"""
    memory: int = 64 * MB
    """bytes by which resident memory may peak above what it was; files have at most 1 MiB"""
    cases: int = 10_000
    writes: str | None = None
    """the folder that the reader may write to"""


def make_devkit(folder: Path) -> None:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "JPEGImages/a.jpg").write_bytes(corpus.encoded("RGB", "JPEG", (100, 80)))
    (folder / "Annotations/a.xml").write_text(corpus.an_annotation(corpus.an_object()))
    (folder / "ImageSets/Main/train.txt").write_text("a\n")


def make_coco(folder: Path) -> None:
    (folder / "images/sub").mkdir(parents=True)
    (folder / "images/a.jpg").touch()
    (folder / "images/sub/b.jpg").touch()


def check_detection(data: DetectionData) -> None:
    assert len({record.id for record in data.records}) == len(data.records)
    for record in data.records:
        n = len(record.labels)
        assert record.id.encode()
        assert record.boxes.shape == (n, 4)
        assert (record.boxes.dtype, record.labels.dtype, record.difficult.dtype) == (
            np.float32, np.int64, bool,
        )  # fmt: skip
        assert 0 < record.width * record.height < 1 << 31
        assert np.isfinite(record.boxes).all()
        assert (record.boxes[:, :2] < record.boxes[:, 2:]).all(), record
        assert (record.boxes >= 0).all()
        assert (record.boxes[:, 2:] <= [record.width, record.height]).all()
        assert ((record.labels >= 1) & (record.labels <= len(data.classes))).all()


def check_labelled(data: LabelledData) -> None:
    assert len(data.labels) == len(data.images) > 0
    assert data.labels.dtype == np.int64
    assert ((data.labels >= 0) & (data.labels < len(data.classes))).all()
    assert all(name.encode() for name in data.classes)
    for index in range(min(3, len(data))):
        try:
            check_image(data.image(index))
        except UserError as error:
            assert_clear(str(error), "")


def check_image(image: np.ndarray) -> None:
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert image.size > 0


def check_config(config: Config) -> None:
    text = dump_config(config)
    assert len(text) < 4 * MB


def check_weights(weights: Weights) -> None:
    for tensor in weights.tensors.values():
        assert type(tensor) in (torch.Tensor, torch.nn.Parameter)
        assert tensor.device.type == "cpu"
        assert tensor.layout == torch.strided
        assert tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    assert all(isinstance(name, str) for name in weights.classes or ())
    load_into(corpus.tiny_model(), weights)


def check_packed(model: PackedModel) -> None:
    for tensor in model.tensors.values():
        assert bool(torch.isfinite(tensor).all())
    for found in model.inputs.values():
        assert found.scale is None or 0 < found.scale < math.inf


def check_checkpoint(found: tuple[dict[str, Any], str]) -> None:
    assert {"networks", "step", "total_steps"} <= found[0].keys()


_RULES = (
    ", got ",
    "must",
    "not ",
    "cannot",
    "no ",
    "unknown",
    "given",
    "expected",
    "found",
    "could",
    "twice",
)


def assert_clear(message: str, where: str) -> None:
    """Assert `<where>: <rule>, got <value>; <remedy>` loosely: short printable lines that name the file."""
    lines = message.split("\n")
    assert len(lines) <= 40, message[:2000]
    for line in lines:
        assert line.isprintable(), repr(line)
        assert 8 < len(line) <= 1200, line[:300] + f"... ({len(line)})"
    assert ": " in lines[0], message
    assert where in lines[0], (where, message)
    assert any(word in message for word in _RULES), message
    assert "Traceback" not in message
    assert "object at 0x" not in message


def read_both_ways(folder: Path) -> np.ndarray:
    read_image(folder / "x.png")
    return read_image(folder / "x.png", exif=True)


def both_splits(folder: Path) -> list[LabelledData]:
    return [read_tiny_imagenet(folder / "x.zip", split) for split in ("train", "val")]


def check_both(splits: list[LabelledData]) -> None:
    for data in splits:
        check_labelled(data)


def subset(folder: Path) -> int:
    output = folder / "written" / "out"
    if output.exists():
        for path in sorted(output.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        output.rmdir()
    return make_subset(folder, {"train": ["a"]}, output)


def sealed(data: bytes) -> bytes:
    """Give a packed file the hash of its bytes."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def by_header(seal: Callable[[bytes], bytes]) -> Mutation:
    """Mutate the JSON header of a safetensors file, the JSON in its metadata too."""

    def mutate(rng: Random, seeds: Sequence[bytes]) -> bytes:
        data = rng.choice(seeds)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        metadata = header.get("__metadata__", {})
        key = rng.choice([*metadata, ""])
        if key and rng.random() < 0.7:
            try:
                metadata[key] = json.dumps(mutate_tree(rng, json.loads(metadata[key])))
            except ValueError:
                metadata[key] = mutate_bytes(rng, metadata[key].encode(), ()).decode("latin-1")
        else:
            header = mutate_tree(rng, header)
        text = as_json(header)
        return seal(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return mutate


def by_sealed_bytes(rng: Random, seeds: Sequence[bytes]) -> bytes:
    return sealed(mutate_bytes(rng, rng.choice(seeds), _WORDS["json"]))


def by_pickle_ops(rng: Random, member: bytes) -> bytes:
    """Mutate one argument or opcode of a pickle, or any bytes of another member."""
    try:
        places = [place for _, _, place in pickletools.genops(member) if place is not None]
    except Exception:  # a member that is no pickle
        return mutate_bytes(rng, member, ())
    i = rng.choice(places)
    return member[:i] + mutate_bytes(rng, member[i : i + 12], _WORDS["pickle"]) + member[i + 12 :]


def by_table(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """Mutate the cells of a CSV table."""
    rows = mutate_tree(rng, list(csv.reader(io.StringIO(rng.choice(seeds).decode()))))
    text = io.StringIO()
    rows = [row if isinstance(row, list) else [row] for row in rows] if isinstance(rows, list) else [[rows]]
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


_WORDS: dict[str, list[bytes]] = {
    "xml": [
        b"<!ENTITY a 'b'>", b"&a;", b"&#0;", b"&#x110000;", b"<![CDATA[", b"]]>", b"<!--", b"<object>",
        b"</object>", b"<bndbox>", b"1e309", b"-1", b"99999999999", b'<!DOCTYPE a SYSTEM "file:///etc/passwd">',
        b"\xff\xfe", b"encoding='utf-7'", b"encoding='zlib'", b"<?xml version='1.1'?>", b"<a xmlns:b='c'>",
    ],
    "json": [
        b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null", b"true", b'"id": 7, ', b"{", b"[", b"]", b"}",
        b'"\\ud800"', b'"\\u0000"', b"9" * 400, b"[" * 2000, b'{"a":' * 2000, b"1.0", b"-1",
        b'"bbox": [1,2,3,',
    ],
    "yaml": [
        b"!!python/object:os.system ", b"!!python/name:os.system ", b"!!binary ", b"!!timestamp ", b"!!set ",
        b"&a ", b"*a", b"<<: ", b"? ", b"- ", b": ", b"\n---\n", b"%YAML 9.9\n", b"|\n  x", b"{", b"[",
        b"[" * 2000, b"\t", b".inf", b".nan", b"0x" + b"f" * 5000, b"1:2:3", b"2001-99-99", b"~", b"\x00",
        b"W99999999999", b"999999999", b"A", b"cycles: 1000000000", b"\xc2\x85", b"\xe2\x80\xae",
    ],
    "pickle": [
        b"cos\nsystem\n", b"cbuiltins\nbytearray\n", b"c_codecs\nencode\n", b"ctorch\nTensor\n", b"R", b".",
        b"\x81", b"b", b"(", b"t", b"Q", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\x7f" * 8, b"ctorch\nload\n",
        b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_qtensor\n", b"}", b"]", b"N",
    ],
    "image": [
        b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xe1",
        b"Exif\0\0",
        b"II*\0", b"MM\0*", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"iCCP", b"\x89PNG\r\n\x1a\n", b"GIF89a",
    ],
    "zip": [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\7", b"\x93NUMPY\1\0", b"'descr': '|O'", b"(" * 300],
}  # fmt: skip

SELECTION = b"split,wnid,name,file\ntrain,n1,cat,a.JPEG\ntrain,n2,dog,b.JPEG\nval,n1,cat,a.JPEG\n"


def make_selection(folder: Path) -> None:
    image = corpus.encoded("RGB", "JPEG", (4, 4))
    (folder / "images.zip").write_bytes(corpus.zipped({"a.JPEG": image, "b.JPEG": image}))


def _split_lists(_: Path) -> list[bytes]:
    return [b"a\n", b"\xef\xbb\xbfa  1\r\nb -1\n\n", b"a\n" + b"b -1\n" * 20]


def _read_weights(name: str) -> Callable[[Path], Weights]:
    return lambda folder: load_weights(str(folder / name))


_ZIP = mixed(bytewise(_WORDS["zip"]), corpus.rezipped(partial(mutate_bytes, words=_WORDS["zip"])))
_PICKLE = mixed(bytewise(_WORDS["pickle"]), corpus.rezipped(by_pickle_ops), corpus.rezipped(by_pickle_ops))

KINDS = (
    Kind(
        "voc xml", "Annotations/a.xml", lambda _: corpus.annotations(),
        mixed(bytewise(_WORDS["xml"]), lambda rng, _: by_xml_tree(rng, corpus.parsable_annotations())),
        lambda folder: read_voc(folder, ["train"], corpus.CLASSES), check_detection, make_devkit,
    ),
    Kind(
        "voc split", "ImageSets/Main/train.txt", _split_lists, bytewise([b"..", b"/", b"\\", b" 1", b"\xff"]),
        lambda folder: read_voc(folder, ["train"], corpus.CLASSES), check_detection, make_devkit,
    ),
    Kind(
        "coco json", "x.json", lambda _: corpus.coco_files(),
        mixed(bytewise(_WORDS["json"]), by_tree(json.loads), by_tree(json.loads)),
        lambda folder: read_coco(folder / "images", folder / "x.json"), check_detection, make_coco,
    ),
    Kind(
        "yaml config", "x.yaml", lambda _: corpus.configs(),
        mixed(bytewise(_WORDS["yaml"]), lambda rng, _: as_json(mutate_tree(rng, rng.choice(corpus.CONFIGS)))),
        lambda folder: load_config(folder / "x.yaml"), check_config,
    ),
    Kind(
        "safetensors", "x.safetensors", lambda _: corpus.safetensors_files(),
        mixed(bytewise(_WORDS["json"]), by_header(bytes)),
        _read_weights("x.safetensors"), check_weights,
    ),
    Kind(
        "pickled weights", "x.pth", lambda _: corpus.pickles(), _PICKLE,
        _read_weights("x.pth"), check_weights,
    ),
    Kind(
        "checkpoint", "checkpoint.pt", lambda _: corpus.checkpoints(), _PICKLE,
        lambda folder: load_checkpoint(folder / "checkpoint.pt"), check_checkpoint,
    ),
    Kind(
        "packed model", "x.lbw", corpus.packed_files,
        mixed(bytewise(_WORDS["json"]), by_sealed_bytes, by_header(sealed), by_header(sealed)),
        lambda folder: load_packed(folder / "x.lbw"), check_packed,
    ),
    Kind(
        "image", "x.png", lambda _: corpus.image_files(),
        mixed(bytewise(_WORDS["image"]), by_png_chunk, by_jpeg_segment),
        read_both_ways, check_image, memory=1536 * MB,
    ),
    Kind(
        "npz", "x.npz", lambda _: corpus.npz_files(), _ZIP,
        lambda folder: read_npz(folder / "x.npz", "train"), check_labelled,
    ),
    Kind(
        "tiny imagenet zip", "x.zip", lambda _: corpus.tiny_imagenet_files(), _ZIP,
        both_splits, check_both,
    ),
    Kind(
        "tiny imagenet table", "labels.csv", lambda _: [SELECTION],
        mixed(bytewise([b'"', b",", b"\0"]), by_table),
        lambda folder: read_tiny_imagenet(folder, "train"), check_labelled, make_selection,
    ),
    Kind(
        "subset xml", "Annotations/a.xml", lambda _: corpus.annotations(),
        mixed(bytewise(_WORDS["xml"]), lambda rng, _: by_xml_tree(rng, corpus.parsable_annotations())),
        subset, lambda count: None, make_devkit, cases=2_000, writes="written",
    ),
)  # fmt: skip
