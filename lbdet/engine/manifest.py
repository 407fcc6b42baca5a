"""What was a run made with? Versions, machine and a fingerprint of its data, for who wants to repeat it."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lbdet.data.labelled import LabelledData
from lbdet.data.records import DetectionData
from lbdet.engine import distributed

PACKAGES = (
    "lbdet",
    "torch",
    "torchvision",
    "numpy",
    "albumentations",
    "pycocotools",
    "opencv-python-headless",
    "pillow",
)


def manifest(config: str, seed: int, train: Any, val: Any) -> dict[str, Any]:
    """Return the content of manifest.json.

    Args:
        config: the resolved config's text.
        train, val: the data sets of the run.
    """
    cuda = torch.cuda.is_available()
    return {
        "commit": _commit(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "seed": seed,
        "data": {"train": fingerprint(train), "val": fingerprint(val)},
        "machine": {
            "system": platform.platform(), "processor": platform.processor() or platform.machine(),
            "processes": distributed.world_size(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
    }  # fmt: skip


def fingerprint(data: DetectionData | LabelledData) -> dict[str, Any]:
    """Return the number of images, and a hash of classes, names and annotations; pixels do not count."""
    digest = hashlib.sha256(repr(data.classes).encode())
    for part in _parts(data):
        digest.update(hashlib.sha256(part).digest())
    return {"images": len(data), "sha256": digest.hexdigest()}


def other_data(recorded: Mapping[str, Any], data: DetectionData | LabelledData) -> str:
    """Return what differs between recorded and present data of one split, in a line; "" if nothing does.

    Raises:
        KeyError, TypeError, ValueError: `recorded` is no fingerprint.
    """
    found = fingerprint(data)
    if found == recorded:
        return ""
    return (
        f"the data differ from those of the run: {found['images']} images, hash {found['sha256'][:12]}, "
        f"then {recorded['images']:d}, {recorded['sha256']:.12s}"
    )


def _parts(data: DetectionData | LabelledData) -> Iterator[bytes]:
    if isinstance(data, LabelledData):
        yield data.labels.tobytes()
        return
    for record in data.records:
        yield record.id.encode()
        for array in (record.boxes, record.labels, record.difficult):
            yield array.tobytes()


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the source tree that runs, with "+" where files differ; None without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
            ).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")
