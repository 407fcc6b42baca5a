"""Small valid files of every kind, made by code: what is mutated."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

from lbdet.convert import Override, WeightFormat, calibrate_activations, quantize_model
from lbdet.deploy.pack import pack_model
from lbdet.precision import Precision

CLASSES = ("cat", "dog", "person")


def an_object(name: str = "cat", box: tuple[Any, ...] = (11, 21, 30, 40), more: str = "") -> str:
    corners = "".join(f"<{t}>{v}</{t}>" for t, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def an_annotation(*objects: str, width: object = 100, height: object = 80) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><folder>x</folder><filename>a.jpg</filename>{size}{''.join(objects)}</annotation>"


def annotations() -> list[bytes]:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    hard = "<truncated>1</truncated><difficult>1</difficult>"
    texts = [
        an_annotation(),
        an_annotation(an_object(), an_object("dog", (1, 1, 100, 80), hard)),
        an_annotation(an_object("person", ("45.7", 20, "60.2", 20), part)),
    ]
    comment = texts[1].replace("<size>", "<!-- a --><?b c?><![CDATA[d]]><size>")
    return [
        *(text.encode() for text in texts),
        b"\xef\xbb\xbf" + texts[0].encode(),
        ('<?xml version="1.0" encoding="UTF-16"?>' + texts[1]).encode("utf-16"),
        b'<?xml version="1.0" encoding="ISO-8859-1"?>' + texts[1].replace("dog", "cät").encode("latin-1"),
        b'<?xml version="1.0"?><!DOCTYPE annotation>\n' + comment.encode(),
    ]


def parsable_annotations() -> list[bytes]:
    return annotations()[:3]


COCO: Mapping[str, Any] = {
    "info": {"year": 2017},
    "images": [
        {"id": 7, "file_name": "sub/b.jpg", "width": 100, "height": 80, "license": 1},
        {"id": 3, "file_name": "a.jpg", "width": 50, "height": 40},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 9, "bbox": [10, 20, 5.5, 6], "iscrowd": 0, "area": 33.0},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0, 0, 100.4, 80], "iscrowd": 1},
        {"id": 3, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 0], "segmentation": [[1, 2, 3, 4]]},
    ],
    "categories": [{"id": 9, "name": "dog", "supercategory": "x"}, {"id": 4, "name": "cat"}],
}


def coco_files() -> list[bytes]:
    text = json.dumps(COCO)
    named = json.loads(text.replace('"id": 7', '"id": "a7"').replace('"image_id": 7', '"image_id": "a7"'))
    one = {**COCO, "annotations": [], "images": COCO["images"][1:]}
    return [text.encode(), json.dumps(named, indent=1).encode(), json.dumps(one).encode()]


CONFIGS: tuple[Mapping[str, Any], ...] = (
    {
        "model": {"name": "ssd_tiny"},
        "data": {"name": "voc", "root": "r", "train": ["t"], "val": ["v"], "classes": ["cat", "dog"]},
        "schedule": {"target": "W4"},
    },
    {
        "model": {"name": "resnet18", "image_size": 64},
        "data": {"name": "npz", "root": "r", "train": ["t"], "val": ["v"]},
        "schedule": {"name": "cyclic", "start": "W8A8", "target": "W4A4", "cycles": 2},
        "quantizer": {"weight": {"format": "uniform"}, "overrides": {"fc": {"precision": "W8A8"}}},
    },
    {
        "model": {"name": "ssd_tiny", "batch_norm": "frozen"},
        "data": {"name": "coco", "root": "r", "train": ["t"], "val": ["v"], "classes": "coco80"},
        "schedule": {"name": "progressive",
                     "through": ["W6", "W5"], "target": "W4", "shares": [0.5, 0.2, 0.3]},
        "quantizer": {"weight": {"format": "lbw", "solver": "semi", "ratio": 0.7}, "keep_float": ["head.*"]},
        "guidance": {"name": "joint", "logits": 1, "features": 0.5, "taps": ["backbone"]},
        "train": {"epochs": 2, "lr": 1e-3, "ema": 0.9, "lr_milestones": [0.5]},
        "seed": 3,
    },
)  # fmt: skip


def configs() -> list[bytes]:
    block = b"""# a comment
model:   {name: ssd_tiny}
data:
  name: voc
  root: r
  train: ["2012:train"]
  val:
    - v
  classes: voc20
schedule: {name: two_stage, target: W4A8, share: 0.25}
train: {lr: 5.0e-4, amp: false}
"""
    return [block, *(json.dumps(config).encode() for config in CONFIGS)]


def tiny_model() -> nn.Sequential:
    """Two layers whose weights the seeds hold."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Linear(2, 2))


def safetensors_files() -> list[bytes]:
    state = dict(tiny_model().state_dict())
    odd = {"a": torch.zeros(0, 3), "b": torch.ones(3).half(), "c": torch.tensor([True]), "d": torch.tensor(1)}
    return [save(state), save(state, {"classes": '["cat", "dog"]', "architecture": "x"}), save(odd)]


def saved(content: object, **options: Any) -> bytes:
    """Return what torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def pickles() -> list[bytes]:
    state = tiny_model().state_dict()
    return [
        saved(state),
        saved({"model": state, "epoch": 3}),
        saved(dict(state), _use_new_zipfile_serialization=False),
    ]


def checkpoints() -> list[bytes]:
    optimizer = torch.optim.AdamW(tiny_model().parameters()).state_dict()
    state = {"networks": [tiny_model().state_dict()], "step": 3, "total_steps": 9, "optimizers": [optimizer]}
    return [saved(state)]


def packed_files(folder: Path) -> list[bytes]:
    contents = []
    for precision, options in (
        ("W4A4", {"fold_batch_norm": True}),
        ("W2", {}),
    ):
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).eval()
        quantize_model(
            model, precision, overrides=[Override("2", Precision(2, None), WeightFormat("uniform"))]
        )
        if "A" in precision:
            calibrate_activations(model, lambda: [torch.rand(1, 1, 4, 4)])
        pack_model(model, folder / "seed.lbw", "toy", ["a"], precision, **options)
        contents.append((folder / "seed.lbw").read_bytes())
    (folder / "seed.lbw").unlink()
    return contents


def encoded(mode: str, kind: str, size: tuple[int, int] = (12, 10), **options: Any) -> bytes:
    """Return an image file of a mode and format."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise).convert("L" if mode.startswith("I") else mode)
    if mode.startswith("I"):
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_files() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "PNG", save_all=True, append_images=frames[1:])
    return [
        *(encoded(mode, "PNG") for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "I;16")),
        *(encoded(mode, "JPEG") for mode in ("RGB", "L", "CMYK")),
        encoded("RGB", "JPEG", progressive=True, exif=exif, icc_profile=b"x" * 200, comment=b"hello"),
        encoded("RGB", "PNG", exif=exif, icc_profile=b"x" * 200),
        encoded("RGB", "PNG", size=(1, 1)),
        animated.getvalue(),
    ]


def npz_files() -> list[bytes]:
    arrays = {
        "classes": np.array(["cat", "dog"]),
        "x_train": np.zeros((3, 4, 5, 3), np.uint8),
        "y_train": np.array([0, 1, 1]),
    }
    files = []
    for write, x in ((np.savez, arrays["x_train"]), (np.savez_compressed, arrays["x_train"][..., 0])):
        file = io.BytesIO()
        write(file, **(arrays | {"x_train": x}))
        files.append(file.getvalue())
    return files


def zipped(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tiny_imagenet_members() -> dict[str, bytes]:
    image = encoded("RGB", "JPEG", size=(4, 4))
    return {
        "tiny/wnids.txt": b"n1\nn2\n",
        "tiny/words.txt": b"n1\tcat, tabby\nn2\tdog\nn3\tx\n",
        "tiny/train/n1/images/a.JPEG": image,
        "tiny/train/n2/images/b.JPEG": image,
        "tiny/val/val_annotations.txt": b"c.JPEG\tn1\t0\t0\nd.JPEG\tn2\t0\t0\n",
        "tiny/val/images/c.JPEG": image,
        "tiny/val/images/d.JPEG": image,
    }


def tiny_imagenet_files() -> list[bytes]:
    members = tiny_imagenet_members()
    return [zipped(members), zipped(members, zipfile.ZIP_STORED)]


def rezipped(change: Callable[[Any, bytes], bytes]) -> Callable[[Any, Any], bytes]:
    """Mutate one member of an archive, and write the archive anew with right checksums."""

    def mutate(rng: Any, seeds: Any) -> bytes:
        data = rng.choice([seed for seed in seeds if seed.startswith(b"PK")])
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
            stored = archive.infolist()[0].compress_type == zipfile.ZIP_STORED
        name = rng.choice(list(members))
        if rng.random() < 0.15:
            members[rng.choice((name + "x", "../" + name, "/" + name, "x\0y"))] = members.pop(name)
        elif rng.random() < 0.1:
            members.pop(name)
        else:
            members[name] = change(rng, members[name])
        return zipped(members, zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED)

    return mutate
