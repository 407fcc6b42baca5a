"""`export.py`: turn a run into a packed file or one for an inference engine, and check what it finds.

What was checked stands beside the file, in parity.json. The exit code is 3 where the file loses more than
--max-drop points against torch, or where the engine computes a layer in float that the file has as int8.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lbdet.build import Built, build_task, load_run, read_data
from lbdet.cli import exit_code
from lbdet.data.records import spread_images
from lbdet.deploy.certify import describe, pack
from lbdet.deploy.codes import code_parity
from lbdet.deploy.engines import ENGINES, float_layers
from lbdet.deploy.entropy import code_sizes, size_summary
from lbdet.deploy.export import ACT_BITS, place, quantize_inputs, trace
from lbdet.deploy.parity import parity
from lbdet.deploy.torch_engine import TorchEngine
from lbdet.deploy.verdict import MAX_DROP, judge, summary, write_report
from lbdet.engine.progress import say
from lbdet.errors import UserError
from lbdet.precision import Precision

SUFFIXES = {"packed": ".lbw", "onnx": ".onnx", "openvino": ".xml"}
CODE_IMAGES = 2
"""of the images of parity whose codes are compared layer by layer"""
ONLY_PACKED = ("entropy", "fold_batch_norm")
ONLY_ENGINES = ("float_weights", "allow_float_layers")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, export, check, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="RUN", help="a folder that training left")
    parser.add_argument("--format", required=True, choices=SUFFIXES, help="whose file is written")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help=".lbw, .onnx, or .xml for OpenVINO"
    )
    parser.add_argument(
        "--parity-images", type=int, metavar="N",
        help="compare with torch on N images of data.val; default: those that the run was evaluated on",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-images", type=int, metavar="N",
        help="give a run without activation bits 8-bit inputs, with ranges from N training images",
    )  # fmt: skip
    parser.add_argument(
        "--max-drop", type=float, default=100 * MAX_DROP, metavar="POINTS",
        help="of mAP or top-1 against torch that is no fault; default 0.3",
    )  # fmt: skip
    packed = parser.add_argument_group("packed")
    packed.add_argument("--fold-batch-norm", action="store_true", help="into scales and biases: smaller")
    packed.add_argument("--entropy", action="store_true", help="code with ANS, and tell the codes' entropy")
    engines = parser.add_argument_group("onnx and openvino")
    engines.add_argument(
        "--float-weights", action="store_true", help="weights that do not fit int8 become float32"
    )
    engines.add_argument(
        "--allow-float-layers", action="store_true", help="only tell of layers that the engine runs in float"
    )
    return exit_code(partial(_export, parser.parse_args(argv)))


def _export(args: argparse.Namespace) -> None:
    _check(args)
    built = load_run(args.run)
    built.model.cpu().eval()
    config, task = built.config, build_task(built.config)
    val = read_data(config.data, config.data.val)
    val = spread_images(val, args.parity_images or config.eval.max_images)
    if not len(val):
        raise UserError(f"data.val: must hold images to compare on, got none in {config.data.val}")
    if args.calibration_images:
        train = read_data(config.data, config.data.train)
        quantize_inputs(built.model, task, train, args.calibration_images)
    facts = describe(built.model, config.model.name, built.classes, val, config.model.image_size)
    write = _packed if args.format == "packed" else _engine
    engine, codes = write(args, built, task, val, facts)
    report = {
        "engine": engine.name,
        "precision": facts["precision"],
        "bytes": _size(args.output),
        "int8_layers": len(engine.facts["int8_layers"]),
        "float_layers": float_layers(engine),
        **parity(built.model, engine, task, val),
        "codes": codes,
    }
    write_report(args.output, report)
    for line in summary(args.output, report):
        say(line)
    for line in judge(args.output, report, args.max_drop / 100, args.allow_float_layers):
        say(line)


def _packed(args: argparse.Namespace, built: Built, _: Any, val: Any, facts: dict[str, Any]) -> Any:
    target = built.config.schedule.target
    if args.calibration_images:
        target = Precision(target.weight_bits, ACT_BITS)
    packed = pack(built.model, args.output, facts, target, args.fold_batch_norm, args.entropy)
    say(str(packed))
    same = "up to float32's rounding where batch norm is folded" if packed.folded else "bit for bit"
    say(f"{args.output}: read back, every weight is as it was, {same}")
    if args.entropy:
        say(size_summary(code_sizes(built.model)))
    return TorchEngine(args.output), {}


def _engine(args: argparse.Namespace, built: Built, task: Any, val: Any, facts: dict[str, Any]) -> Any:
    suffix, size = args.output.suffix, built.config.model.image_size
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        trace(built.model, source, facts, args.float_weights)
        place(source, args.output)
        codes = code_parity(built.model, source, suffix, task, val, size, CODE_IMAGES)
    return ENGINES[suffix](args.output), codes


def _size(output: Path) -> int:
    """Return the bytes of a file, with its .bin where it has one."""
    files = [output, output.with_suffix(".bin")] if output.suffix == ".xml" else [output]
    return sum(file.stat().st_size for file in files)


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that could not work, before anything is read."""
    suffix = SUFFIXES[args.format]
    if args.output.suffix != suffix:
        raise UserError(f"--output: must end in {suffix} for {args.format}, got {args.output}")
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        raise UserError(f"--output: must be a file in a folder that exists, got {args.output}")
    for name in ONLY_ENGINES if args.format == "packed" else ONLY_PACKED:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: is not for {args.format}; leave it out")
    if not 0 <= args.max_drop <= 100:
        raise UserError(f"--max-drop: must lie in [0, 100], got {args.max_drop}")
    for name in ("calibration_images", "parity_images"):
        count = getattr(args, name)
        if count is not None and count < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {count}")
