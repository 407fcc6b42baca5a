"""`check_data.py`: read a whole data set and name every problem by file and object.

Errors are what the loader refuses, warnings what it loads but somebody should look at. Exit code: 0 = no
errors; 2 = errors, or a data set that cannot be read at all.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from pydantic import ValidationError

from lbdet.build import named_classes, read_data
from lbdet.cli import add_settings, exit_code
from lbdet.config import DataConfig, load_config
from lbdet.data import DATASETS, LABELLED_DATASETS
from lbdet.data.check import (
    WARNINGS,
    Check,
    check_detection,
    check_labelled,
    clean_coco,
    clean_lists,
    found_classes,
    in_both,
)
from lbdet.data.classification import scan_image_folder
from lbdet.data.coco import scan_coco
from lbdet.data.files import check_root
from lbdet.data.images import read_image
from lbdet.data.labelled import LabelledData
from lbdet.data.problems import Problem, Scan
from lbdet.data.voc import scan_voc
from lbdet.engine.progress import say
from lbdet.errors import UserError, closest, one_line
from lbdet.files import write_atomically, write_text
from lbdet.report.sheet import Tile, contact_sheet

TILES = 48
"""pictures on the sheet, those with errors first"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, check, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="check_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="check data.train and data.val of a config")
    source.add_argument(
        "--data", metavar="NAME", help=f"one of {', '.join(_names())}; needs --root and --split"
    )
    add_settings(parser)
    parser.add_argument("--root", metavar="FOLDER", help="as data.root of a config")
    parser.add_argument("--split", nargs="+", metavar="SPLIT", help="as data.train of a config")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="voc20, coco80, a file or names; default: all that occur"
    )
    parser.add_argument(
        "--other-classes", choices=("error", "ignore"), help="what is not among --classes (default error)"
    )
    parser.add_argument(
        "--input-size", type=int, default=320, metavar="PIXELS",
        help="side of the detector's input; boxes under 2 pixels there are reported (default 320)",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, help="write problems.json and sheet.png into it"
    )
    parser.add_argument(
        "--cleaned", action="store_true",
        help="also write lists of the images without errors: .txt for voc, .json for coco",
    )  # fmt: skip
    return exit_code(partial(_check, parser.parse_args(argv)))


def _check(args: argparse.Namespace) -> None:
    data, groups = _sections(args)
    if args.cleaned and (args.output is None or data.name in LABELLED_DATASETS):
        raise UserError(
            "--cleaned: needs --output and a data set for detection; remove the named files yourself"
        )
    if args.cleaned:
        _refuse_own_lists(args.output, data, groups)
    if args.input_size < 1:
        raise UserError(f"--input-size: must be at least 1, got {args.input_size}")
    check_root(data.root)
    checks: dict[str, Check] = {}
    for group, splits in groups.items():
        checks[group] = _check_splits(data, splits, args.input_size)
        _report(group, checks[group])
    shared = in_both(checks) if data.name not in LABELLED_DATASETS else []
    for found in shared:
        say(f"warning: {_line(found)}")
    if args.output is not None:
        _write(args.output, data, groups, checks, shared, args.cleaned)
    errors = sum(len(check.errors) for check in checks.values())
    if errors:
        files = len({found.image or found.where for check in checks.values() for found in check.errors})
        where = (
            f"; see {args.output / 'problems.json'}" if args.output else "; --output FOLDER writes them down"
        )
        raise UserError(f"{data.root}: data must have no errors, got {errors} in {files} places{where}")


def _names() -> list[str]:
    return [*DATASETS, *LABELLED_DATASETS]


def _sections(args: argparse.Namespace) -> tuple[DataConfig, dict[str, list[str]]]:
    """Return which data set is meant, and its splits by group."""
    if args.config:
        others = {"root": args.root, "classes": args.classes, "other_classes": args.other_classes}
        for key, value in others.items():
            if value:
                option = key.replace("_", "-")
                raise UserError(f"--{option}: is for --data, got it with --config; use --set data.{key}=...")
        data = load_config(args.config, args.settings).data
        groups = {"train": data.train, "val": data.val} if not args.split else _named(args.split)
        return data, groups
    if args.settings:
        raise UserError(
            f"--set: is for --config, got {args.settings[0]!r} with --data; use the other options"
        )
    if not args.root or not args.split:
        raise UserError("--data: needs --root and --split, got only some of them")
    if args.data not in _names():
        raise UserError(
            f"--data: must be one of {', '.join(_names())}, got {args.data!r}{closest(args.data, _names())}"
        )
    classes = args.classes[0] if args.classes and len(args.classes) == 1 else args.classes
    try:
        data = DataConfig(
            name=args.data, root=args.root, train=args.split, val=args.split, classes=classes,
            other_classes=args.other_classes or "error",
        )  # fmt: skip
    except ValidationError as error:
        raise UserError(f"--data: {one_line(str(error))}") from None
    return data, _named(args.split)


def _named(splits: list[str]) -> dict[str, list[str]]:
    """Return splits as a group that is called as they are: 2012:train, or images:train.json, is train."""
    files = [Path(split.rpartition(":")[2]).name for split in splits]
    names = dict.fromkeys(file.removesuffix(".txt").removesuffix(".json") for file in files)
    return {"_".join(names): splits}


def _refuse_own_lists(output: Path, data: DataConfig, groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse to write lists where the splits' own lie, which might have the same name."""
    if output.resolve().parts[-2:] == ("ImageSets", "Main"):
        raise UserError(
            f"--output: must not be where a data set has its splits, got {output}; name another folder"
        )
    for split in chain.from_iterable(groups.values()):
        name = split.rpartition(":")[2]
        path = Path(data.root, name) if data.name == "coco" else Path(name)
        if path.suffix in (".txt", ".json") and path.resolve().parent == output.resolve():
            raise UserError(f"--output: must not be where the split's {path} is; name another folder")


def _check_splits(data: DataConfig, splits: Sequence[str], input_size: int) -> Check:
    if data.name == "imagefolder" and len(splits) == 1:
        classes = named_classes(data.classes, "classes") if data.classes else None
        return check_labelled(scan_image_folder(data.root, splits[0], classes), data.root)
    if data.name in LABELLED_DATASETS:
        found = read_data(data, splits)
        assert isinstance(found, LabelledData)
        return check_labelled(Scan(found, ()), data.root)
    if data.name == "coco":
        images, annotations = _coco_paths(data, splits)
        classes = named_classes(data.classes, "classes") if data.classes else None
        return check_detection(
            scan_coco(images, annotations, classes, data.other_classes), data.root, input_size
        )
    classes = named_classes(data.classes, "classes") if data.classes else found_classes(data.root, splits)
    return check_detection(scan_voc(data.root, splits, classes, data.other_classes), data.root, input_size)


def _coco_paths(data: DataConfig, splits: Sequence[str]) -> tuple[Path, Path]:
    if len(splits) != 1 or ":" not in splits[0]:
        raise UserError(f"split: of coco must be one images_folder:annotations.json, got {list(splits)}")
    images, annotations = splits[0].split(":", 1)
    return Path(data.root, images), Path(data.root, annotations)


def _line(found: Problem) -> str:
    return f"{one_line(found.where, 200)}: {one_line(found.rule)}"


def _report(group: str, check: Check) -> None:
    """Print every problem, then the tables."""
    for found in check.problems:
        say(f"{'warning' if found.kind in WARNINGS else 'error'}: {_line(found)}")
    total = sum(count.objects for count in check.classes)
    objects = "" if isinstance(check.data, LabelledData) else f", {total} objects"
    say(f"\n{group}: {len(check.data)} images{objects}, {len(check.classes)} classes")
    width = max(len("class"), *(len(count.name) for count in check.classes), 0)
    say(f"  {'class':{width}}  objects   share  images  difficult")
    for count in sorted(check.classes, key=lambda count: -count.objects):
        share = 100 * count.objects / max(total, 1)
        say(
            f"  {count.name:{width}}  {count.objects:7}  {share:5.1f}%  {count.images:6}  {count.difficult:9}"
        )
    occurring = [count.objects for count in check.classes if count.objects]
    if occurring:
        times = max(occurring) / min(occurring)
        say(f"  the most frequent class has {times:.0f} times the objects of the rarest")
    kinds = Counter(found.kind for found in check.problems)
    for kind, number in kinds.most_common():
        say(f"  {'warnings' if kind in WARNINGS else 'errors':8}  {kind:14} {number:6}")
    if not kinds:
        say("  no problems")


def _write(
    output: Path,
    data: DataConfig,
    groups: Mapping[str, Sequence[str]],
    checks: Mapping[str, Check],
    shared: Sequence[Problem],
    cleaned: bool,
) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made: {error.strerror}") from None
    content = {group: _as_json(check.problems) for group, check in checks.items()}
    _write_json(output / "problems.json", content | ({"both": _as_json(shared)} if shared else {}))
    tiles = _tiles([found for check in checks.values() for found in check.problems])
    if tiles:
        write_atomically(output / "sheet.png", partial(contact_sheet(tiles).save, format="PNG"))
    for group, check in checks.items() if cleaned else ():
        if data.name == "coco":
            path = output / f"{group}.json"
            _write_json(path, clean_coco(check, _coco_paths(data, groups[group])[1]))
            images = _coco_paths(data, groups[group])[0].relative_to(data.root)
            say(f"{group}: {images}:{path.resolve()} is the split without errors")
            continue
        for folder, names in clean_lists(check).items():
            year = Path(folder).name.removeprefix("VOC") if ":" in groups[group][0] else ""
            path = output / (f"{group}_{year}.txt" if year else f"{group}.txt")
            write_text(path, "".join(f"{name}\n" for name in names))
            split = f"{year}:{path}" if year else str(path)
            say(f"{group}: {split} is the split without errors, {len(names)} images")


def _as_json(problems: Sequence[Problem]) -> list[dict[str, object]]:
    return [
        {
            "level": "warning" if found.kind in WARNINGS else "error", "kind": found.kind,
            "where": found.where, "rule": found.rule, "image": found.image, "box": found.box,
        }
        for found in problems
    ]  # fmt: skip


def _write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _tiles(problems: Sequence[Problem]) -> list[Tile]:
    """Return a tile for each of the first images that have problems, those with errors first."""
    by_image: dict[str, list[Problem]] = {}
    for found in sorted(problems, key=lambda found: found.kind in WARNINGS):
        if found.image:
            by_image.setdefault(found.image, []).append(found)
    return [_tile(path, found) for path, found in list(by_image.items())[:TILES]]


def _tile(path: str, problems: Sequence[Problem]) -> Tile:
    boxed = [found for found in problems if found.box is not None]
    try:
        image = read_image(path)
    except UserError:
        image = None
    return Tile(
        image,
        boxes=[found.box for found in boxed if found.box is not None],
        names=[one_line(found.where.rpartition(": ")[2], 40) for found in boxed],
        lines=[Path(path).name, *(_line(found).removeprefix(f"{Path(path).name}: ") for found in problems)],
    )
