"""`sensitivity.py`: which layers break at few bits? One at a time is quantized, without training.

What each loses and saves goes to DIR as JSON lines, a table and a picture; a second call measures only what
is missing. With --budget a mixture of widths that fits is suggested, ready for `quantizer.overrides`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from lbdet.build import Built, build, build_task, load_run, read_data
from lbdet.cli import add_settings, exit_code
from lbdet.config import Config, dump_config, load_config
from lbdet.convert import check_width, model_bytes, quantized_layers, set_float
from lbdet.data.files import MAX_JSON, read_json, read_text
from lbdet.data.records import spread_images
from lbdet.engine import distributed
from lbdet.engine.finish import calibrate
from lbdet.engine.progress import say
from lbdet.errors import UserError
from lbdet.files import write_atomically, write_text
from lbdet.precision import FLOAT, Precision
from lbdet.report.sensitivity import draw_sensitivity
from lbdet.sweep.sensitivity import Record, Units, measure_units, overrides, suggest, units_of

_RECORD = TypeAdapter(Record)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, measure what is missing, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="sensitivity.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", help="a folder that training left")
    source.add_argument("--config", metavar="FILE", help="the config's weights without training")
    add_settings(parser)
    parser.add_argument("--precisions", nargs="+", required=True, metavar="W4|W4A8")
    parser.add_argument("--by", choices=("block", "layer"), default="block")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="of data.val; default 200")
    parser.add_argument("--budget", type=int, metavar="BYTES", help="suggest widths for a model of this size")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    return exit_code(partial(_sensitivity, parser.parse_args(argv)))


def _sensitivity(args: argparse.Namespace) -> None:
    distributed.refuse_many("sensitivity.py")
    if args.run and args.settings:
        raise UserError(f"--set: a run keeps its config, got {args.settings[0]!r}; use --config")
    if args.images < 1:
        raise UserError(f"--images: must be at least 1, got {args.images}")
    precisions = [Precision.parse(text) for text in args.precisions]
    if FLOAT in precisions:
        raise UserError("--precisions: must have bits, got float; it is what the others are compared with")
    config = load_config(Path(args.run, "config.yaml") if args.run else args.config, args.settings)
    val = read_data(config.data, config.data.val)
    built = load_run(args.run) if args.run else build(config, val.classes)
    for name, layer in quantized_layers(built.model).items():
        for precision in precisions:
            check_width(layer.weight_quantizer, layer.activation_quantizer, precision, name)
    units = units_of(built.model, args.by)
    facts = {"by": args.by, "images": args.images, **_model_facts(config, args.run)}
    known = _known(args.output, facts, units)
    records = known + _measure(built, units, precisions, val, args, known)
    order = {unit: i for i, unit in enumerate(units)}
    records.sort(key=lambda r: order[r.unit])
    _write(args, built, records)
    if args.budget is not None:
        set_float(built.model)
        chosen = suggest(
            [r for r in records if r.precision in map(str, precisions)], model_bytes(built.model), args.budget
        )
        text = yaml.safe_dump({"overrides": overrides(chosen, units)}, sort_keys=False)
        write_text(args.output / "overrides.yaml", text)
        say(f"\nfor {args.budget} bytes, to be put under `quantizer` ({args.output}/overrides.yaml):\n")
        say(text)


def _model_facts(config: Config, run: str | None) -> dict[str, Any]:
    """Return what the measured model is made from: its whole config, and the content of its weights files."""
    model = config.model
    names = [f"{run}/model.safetensors"] if run else [model.weights, model.weights_backbone]
    files = [Path(name) for name in names if name and os.path.isfile(name)]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return {"config": yaml.safe_load(dump_config(config)), "weights": hashes}


def _measure(
    built: Built,
    units: Units,
    precisions: Sequence[Precision],
    val: Any,
    args: argparse.Namespace,
    known: list[Record],
) -> list[Record]:
    task, config = build_task(built.config), built.config
    data = spread_images(val, args.images)
    key = task.headline[0][1]
    train = read_data(config.data, config.data.train) if any(p.act_bits for p in precisions) else None

    def score() -> float:
        return task.evaluate(built.model, data, config.eval.batch_size)[0][key] or 0.0

    def ranges(names: Sequence[str]) -> None:
        calibrate(built.model, task, train, config.train.calibration_images, names=names)

    found = []
    for record in measure_units(built.model, units, precisions, score, ranges, known):
        say(f"{record.unit} at {record.precision}: {record.lost:+.4f} lost, {record.saved} bytes saved")
        found.append(record)
        with open(args.output / "sensitivity.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
    return found


def _known(output: Path, facts: dict[str, Any], units: Units) -> list[Record]:
    """Return what an earlier call measured; the folder is made.

    Raises:
        UserError: it measured something else, its files are damaged, or the folder cannot be made.
    """
    path, lines = output / "facts.json", output / "sensitivity.jsonl"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be used: {error.strerror}") from None
    try:
        texts = read_text(lines, MAX_JSON).splitlines() if lines.exists() else []
        records = [_RECORD.validate_json(text) for text in texts]
    except (OSError, ValueError):
        raise UserError(f"{lines}: is damaged; remove it to measure again") from None
    others = any(record.unit not in units for record in records)
    if others or (path.exists() and read_json(path) != facts):
        raise UserError(f"--output: {output} holds another measurement; give another folder")
    write_text(path, json.dumps(facts, indent=1) + "\n")
    return records


def _write(args: argparse.Namespace, built: Built, records: Sequence[Record]) -> None:
    name = build_task(built.config).headline[0][0]
    rows = [f"| {r.unit} | {r.precision} | {r.lost:+.4f} | {r.saved} |" for r in records]
    head = [f"| {args.by} | precision | {name} lost | bytes saved |", "|---|---|---|---|"]
    write_text(args.output / "sensitivity.md", "\n".join([*head, *rows]) + "\n")
    figure = draw_sensitivity([astuple(r) for r in records], name)
    write_atomically(
        args.output / "sensitivity.png", lambda file: figure.savefig(file, format="png", dpi=120)
    )
    worst = sorted(records, key=lambda r: -r.lost)[:10]
    say(f"\nmost sensitive, of {len(records)} (all in {args.output}/sensitivity.md and .png):")
    for r in worst:
        say(f"  {r.lost:+.4f} {name} lost, {r.saved:>8} bytes saved: {r.unit} at {r.precision}")
