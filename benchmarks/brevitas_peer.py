"""What mAP has Brevitas, trained by the same loop from the same weights, data and teacher?

    python -m benchmarks.brevitas_peer --config configs/ssdlite320_voc_subset_w4.yaml --bits 4 \
        --output runs/brevitas_w4

The config's detector is built in float and every convolution and linear layer replaced by Brevitas' with
uniform weights: a learned scale a channel, found by the least squared error at first
(`Int8WeightPerChannelFloatMSE`). Everything else is what the config says: optimizer, updates, augmentation,
guidance. Of the config's own quantizer and schedule nothing is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.step import replace_layers
from lbdet.build import build, build_guidance, build_settings, build_task, build_train_set, read_data
from lbdet.cli import add_settings, exit_code
from lbdet.config import Config, dump_config, load_config
from lbdet.data.records import spread_images
from lbdet.engine.finish import summary
from lbdet.engine.memory import keep_freed_memory
from lbdet.engine.progress import say
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.train import train

FLOAT = ["schedule={name: constant, target: float}", "quantizer.overrides={}"]


def train_peer(config: Config, bits: int, run: RunFolder, resume: bool) -> None:
    """Train and evaluate; metrics.json comes last. A finished run is left alone."""
    from brevitas.quant import Int8WeightPerChannelFloatMSE

    run.refuse(resume)
    if run.finished:
        say(f"{run.path}: is finished already; nothing to do")
        return
    keep_freed_memory()
    train_set, val = build_train_set(config), read_data(config.data, config.data.val)
    built, task, settings = build(config, train_set.data.classes), build_task(config), build_settings(config)
    guidance = build_guidance(config, built)  # the teacher is a copy of what is still float
    model = built.model
    layers = replace_layers(model, weight_quant=Int8WeightPerChannelFloatMSE, weight_bit_width=bits)
    say(f"{layers} layers are Brevitas' with {bits}-bit weights")
    model.to(memory_format=torch.channels_last)
    with run.lock():
        run.start(dump_config(config))
        schedule = config.schedule.build(config.seed)
        steps = train(model, task, train_set, val, schedule, settings, run, config.seed, guidance)
        measured, _ = task.evaluate(model, spread_images(val, config.eval.max_images), config.eval.batch_size)
        metrics = {"precision": f"brevitas W{bits}", "steps": steps, "seed": config.seed} | measured
        run.write_json("metrics.json", metrics)
        say(summary(task, metrics))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, train, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--bits", required=True, type=int, metavar="N", help="of weights")
    add_settings(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="RUN")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    options = parser.parse_args(arguments)

    def work() -> None:
        config = load_config(options.config, [*FLOAT, *options.settings])
        train_peer(config, options.bits, RunFolder(options.output), options.resume)

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
