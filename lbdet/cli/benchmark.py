"""`benchmark.py`: how fast is a run's model in each engine, and how much memory does it take?"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lbdet.build import Built, build_task, load_run, read_data
from lbdet.cli import exit_code
from lbdet.data.records import spread_images
from lbdet.deploy.benchmark import ENGINES, chosen_engines
from lbdet.deploy.benchmark_run import Options, available_cores, run_benchmark
from lbdet.deploy.benchmark_stats import table
from lbdet.deploy.certify import describe, pack
from lbdet.deploy.parity import raw_images
from lbdet.engine.progress import say
from lbdet.errors import UserError
from lbdet.files import write_text


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, measure, and return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="a folder that training left")
    parser.add_argument(
        "--engines",
        nargs="+",
        metavar="ENGINE",
        help=f"default: all that are installed of {', '.join(ENGINES)}",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of each engine; default: all cores")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="time the network on N images, too")
    parser.add_argument("--images", type=int, default=10, metavar="N", help="of data.val; default 10")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="rounds; default 10")
    parser.add_argument(
        "--warmup", type=int, default=2, metavar="N", help="untimed calls before each round; default 2"
    )
    parser.add_argument(
        "--calibration-images", type=int, metavar="N",
        help="give a run without activation bits 8-bit inputs, with ranges from N training images",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="for benchmark.json and .md; default: RUN")
    return exit_code(partial(_benchmark, parser.parse_args(argv)))


def _benchmark(args: argparse.Namespace) -> None:
    _check(args)
    from lbdet.deploy.export import quantize_inputs  # needs onnx and openvino

    engines = chosen_engines(args.engines)
    output = args.output or Path(args.run)
    built = load_run(args.run)
    built.model.cpu().eval()
    config = built.config
    val = spread_images(read_data(config.data, config.data.val), args.images)
    if not len(val):
        raise UserError(f"data.val: must hold images to time, got none in {config.data.val}")
    if args.calibration_images:
        train = read_data(config.data, config.data.train)
        quantize_inputs(built.model, build_task(config), train, args.calibration_images)
    facts = describe(built.model, config.model.name, built.classes, val, config.model.image_size)
    images = [np.ascontiguousarray(image) for image in raw_images(val, config.model.image_size)]
    options = Options(args.threads or available_cores(), args.repeats, args.warmup, args.batch)
    report = {
        "run": str(args.run),
        **run_benchmark(built.model, images, facts, engines, options),
        "packed_size": _packed_size(built, facts),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be made: {error.strerror}") from None
    shown = summary(report)
    write_text(output / "benchmark.json", json.dumps(report, indent=1) + "\n")
    write_text(output / "benchmark.md", shown + "\n")
    say("\n" + shown)


def summary(report: dict[str, Any]) -> str:
    """Return a report for people, in Markdown."""
    model, options, engines = report["model"], report["options"], report["engines"]
    lines = [
        f"{model['architecture']} {model['precision']}, {options['images']} images x {options['repeats']} "
        f"rounds, {options['threads']} threads, {report['machine']['cpu']}",
        "",
        table(engines, report["base"], options["batch"]),
        "",
    ]
    for name, facts in engines.items():
        if "skipped" in facts:
            lines.append(f"{name}: skipped, {facts['skipped']}")
        elif "int8_layers" in facts:
            in_int8 = facts["int8_layers"] - len(facts["float_layers"])
            lines.append(f"{name}: {in_int8} of {facts['int8_layers']} layers run in int8")
    lines.append(f"packed file: {report['packed_size'] / 1e6:.2f} MB")
    return "\n".join(lines)


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments and systems that could not work, before anything is read."""
    if platform.system() == "Windows":  # which cannot stop processes
        raise UserError("benchmark: must be run on Linux or macOS, got Windows; WSL is Linux, too")
    least = {
        "--threads": 1,
        "--batch": 1,
        "--images": 1,
        "--repeats": 1,
        "--warmup": 0,
        "--calibration-images": 1,
    }
    for option, low in least.items():
        value = getattr(args, option[2:].replace("-", "_"))
        if value is not None and value < low:
            raise UserError(f"{option}: must be at least {low}, got {value}")
    for package in ("onnx", "openvino"):
        if find_spec(package) is None:
            raise UserError(f"benchmark: needs {package}, which is not installed; pip install -e '.[deploy]'")


def _packed_size(built: Built, facts: dict[str, Any]) -> int:
    """Return the bytes of the packed file, with batch norm folded."""
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder, "model.lbw"), built.config.schedule.target
        return pack(built.model, path, facts, target, fold=True).size
