"""`prepare_cifar10_10k.py`: make datasets/cifar10_10k from CIFAR-10: the first 1000 images of each class to
train on, the first 200 to test.

The published numbers were measured on other images, as many of each class, which came from a copy of CIFAR-10
in JPEG: do not expect them to the last digit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lbdet.cli import check_new_file, exit_code, write_new_file
from lbdet.data.classification import read_cifar
from lbdet.engine.progress import say

OUTPUT = Path("datasets/cifar10_10k/cifar10_10k_2k.npz")
PER_CLASS = {"train": 1000, "test": 200}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, make the file, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="prepare_cifar10_10k.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--cifar", required=True, metavar="FOLDER", help="holds cifar-10-batches-py, or is to hold it"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch CIFAR-10 (170 MB) into --cifar first, MD5 checked"
    )
    parser.add_argument("--output", default=OUTPUT, type=Path, metavar="FILE", help=f"new; default: {OUTPUT}")
    return exit_code(partial(_prepare, parser.parse_args(argv)))


def _prepare(args: argparse.Namespace) -> None:
    check_new_file(args.output, ".npz")
    arrays: dict[str, np.ndarray] = {}
    for split, count in PER_CLASS.items():
        data = read_cifar(args.cifar, "cifar10", split, args.download)
        chosen = first_of_each(data.labels, count)
        arrays |= {f"x_{split}": np.asarray(data.images)[chosen], f"y_{split}": data.labels[chosen]}
        arrays["classes"] = np.array(data.classes)
    write_new_file(args.output, partial(_save, arrays))
    say(f"{args.output}: {len(arrays['y_train'])} images to train on, {len(arrays['y_test'])} to test")


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the first `count` images of each class, sorted; int64."""
    return np.sort(np.concatenate([np.flatnonzero(labels == k)[:count] for k in np.unique(labels)]))


def _save(arrays: dict[str, np.ndarray], path: Path) -> None:
    with open(path, "wb") as file:  # for numpy would add a suffix to a path
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType] - arrays have other names
