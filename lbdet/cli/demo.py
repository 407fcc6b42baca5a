"""`lbdet demo`: how many bits does a small detector need?

On rendered pictures, in minutes, with nothing downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lbdet.cli import add_settings, exit_code
from lbdet.cli.visualize import visualize
from lbdet.config import load_config
from lbdet.data.files import read_json
from lbdet.engine.progress import say
from lbdet.engine.run_folder import RunFolder
from lbdet.errors import UserError
from lbdet.experiment import train_run

FINE_TUNE = ("train.epochs=6", "train.lr=1.0e-3", "train.warmup_steps=10")
PICTURES = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the demo, and return the exit code."""
    parser = argparse.ArgumentParser(prog="lbdet demo", description=__doc__)
    parser.add_argument(
        "--config",
        default="configs/demo_shapes.yaml",
        metavar="FILE",
        help="default: configs/demo_shapes.yaml",
    )
    parser.add_argument(
        "--output", default="runs/demo", metavar="FOLDER", help="of the runs and pictures; default: runs/demo"
    )
    add_settings(parser)
    args = parser.parse_args(argv)
    return exit_code(partial(_demo, args.config, Path(args.output), args.settings))


def _demo(config_path: str, output: Path, settings: Sequence[str]) -> None:
    """Train at float, quantize the result to 4 and 2 bits with training, compare, draw;
    a second call only reports.
    """
    runs = {name: RunFolder(output / name) for name in ("float", "W4", "W2")}
    for name, run in runs.items():
        say(f"== {name} ==")
        start = () if name == "float" else (f"model.weights={runs['float'].model}", *FINE_TUNE)
        where = (f"schedule.target={name}", f"data.root={output / 'shapes'}")
        train_run(load_config(config_path, (*where, *start, *settings)), run, resume=True)
    val = output / "shapes" / "VOC2012"
    names = (val / "ImageSets" / "Main" / "val.txt").read_text().split()[:PICTURES]
    images = [str(val / "JPEGImages" / f"{name}.jpg") for name in names]
    for name in ("W4", "W2"):
        visualize(
            str(runs[name].path), images, output / f"pictures_{name}_against_float", str(runs["float"].path)
        )
    metrics = {name: read_json(run.path / "metrics.json") for name, run in runs.items()}
    try:
        shown = table(metrics)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise UserError(
            f"{output}: each metrics.json must be what a run leaves, got something else; remove the folder"
        ) from None
    say(f"\n{shown}")
    say(f"pictures: {output}/pictures_W4_against_float, {output}/pictures_W2_against_float")


def table(metrics: dict[str, dict[str, Any]]) -> str:
    """Return mAP and bytes of each precision as aligned text; the first one is the reference of the sizes."""
    reference = next(iter(metrics.values()))["model_bytes"]
    lines = [
        f"{'precision':<10} {'VOC 11-point mAP':>16} {'VOC area mAP':>13} {'COCO mAP':>9} "
        f"{'bytes':>10} {'smaller':>8}"
    ]
    for name, m in metrics.items():
        maps = f"{m['voc07_map']:>16.3f} {m['voc_area_map']:>13.3f} {m['coco_map']:>9.3f}"
        lines.append(f"{name:<10} {maps} {m['model_bytes']:>10,} {reference / m['model_bytes']:>7.1f}x")
    return "\n".join(lines)
