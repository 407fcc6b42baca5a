"""`prepare_voc_subset.py`: make datasets/voc_subset from the official VOC2012."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lbdet.cli import exit_code
from lbdet.data.subset import make_subset
from lbdet.data.voc import download_voc
from lbdet.engine.progress import say
from lbdet.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, make the subset, and return the exit code."""
    parser = argparse.ArgumentParser(prog="prepare_voc_subset.py", description=__doc__)
    parser.add_argument(
        "--voc", required=True, metavar="FOLDER", help="holds VOCdevkit/VOC2012, or is to hold it"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch VOC2012 (2 GB) into --voc first, MD5 checked"
    )
    parser.add_argument("--ids", default="datasets", metavar="FOLDER", help="of voc_subset_{train,val}.txt")
    parser.add_argument(
        "--output", default="datasets/voc_subset", metavar="FOLDER", help="new; default: datasets/voc_subset"
    )
    args = parser.parse_args(argv)
    return exit_code(partial(_prepare, args))


def _prepare(args: argparse.Namespace) -> None:
    if args.download:
        download_voc(args.voc, "2012")
    year = next(
        (
            f
            for f in (Path(args.voc, "VOCdevkit/VOC2012"), Path(args.voc, "VOC2012"), Path(args.voc))
            if (f / "JPEGImages").is_dir()
        ),
        None,
    )
    if year is None:
        raise UserError(
            f"--voc: must hold VOCdevkit/VOC2012/JPEGImages, got {args.voc!r}; --download fetches it"
        )
    splits = {split: _ids(Path(args.ids, f"voc_subset_{split}.txt")) for split in ("train", "val")}
    say(f"{args.output}: {make_subset(year, splits, args.output)} images")


def _ids(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"--ids: {path} does not exist; it is part of lbdet's repository")
    return path.read_text().split()
