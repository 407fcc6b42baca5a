"""One config, one run folder: train what a config describes and evaluate it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from lbdet.build import (
    build,
    build_blocks,
    build_guidance,
    build_settings,
    build_task,
    build_train_set,
    check_batch_norm,
    check_processes,
    read_data,
)  # fmt: skip
from lbdet.config import Config, differences, dump_config, load_config
from lbdet.engine import distributed
from lbdet.engine.finish import correct, finish
from lbdet.engine.manifest import manifest
from lbdet.engine.memory import keep_freed_memory
from lbdet.engine.progress import say
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.train import train
from lbdet.errors import UserError


def train_run(config: Config, run: RunFolder, resume: bool) -> None:
    """Train what a config describes into a run folder and evaluate it;
    nothing happens if that was done already.

    Several processes (`lbdet.engine.distributed`) share the work; the first one alone uses the folder.
    """
    run = replace(run, writes=distributed.rank() == 0)
    is_done = partial(_is_done, config, run, resume)
    if distributed.first(is_done):
        say(f"{run.path}: is finished already; nothing to do")
        return
    keep_freed_memory()
    train_set, val = build_train_set(config), read_data(config.data, config.data.val)
    task, data = build_task(config), train_set.data
    if val.classes != data.classes:
        raise UserError(
            f"data.val: must have the classes of data.train, got {len(val.classes)} and {len(data.classes)} "
            "that are not the same; name them in data.classes"
        )
    check_processes(config, len(train_set))
    built = build(config, data.classes)
    check_batch_norm(config, built.model)
    guidance, blocks = build_guidance(config, built), build_blocks(config, built.model)
    schedule, settings = config.schedule.build(config.seed), build_settings(config)
    schedule.check(settings.total_steps(len(train_set)))
    with ExitStack() as held:
        distributed.first(lambda: held.enter_context(run.lock()))
        if distributed.first(is_done):  # another command may have been here meanwhile
            return
        run.start(dump_config(config))
        run.write_json("manifest.json", manifest(dump_config(config), config.seed, data, val))
        say(f"{len(train_set)} images to train on, {len(val)} to evaluate on; run folder {run.path}")
        if distributed.first(lambda: not run.checkpoint.exists()):
            correct(built.model, task, data, config.train.correct_bn)
        steps = train(
            built.model, task, train_set, val, schedule, settings, run, config.seed, guidance, blocks
        )
        if guidance is not None:
            guidance.close()
        finish(
            built.model, task, data, val, run,
            architecture=config.model.name,
            max_images=config.eval.max_images,
            batch_size=config.eval.batch_size,
            recalibrate_images=config.train.recalibrate_bn,
            keep_float=config.quantizer.keep_float,
            facts={"precision": str(config.schedule.target), "steps": steps, "seed": config.seed},
        )  # fmt: skip


def _is_done(config: Config, run: RunFolder, resume: bool) -> bool:
    """Check that a run may begin in its folder, or go on; return whether it has come to its end there."""
    run.refuse(resume)
    found = differences(load_config(run.config), config) if run.config.exists() else ""
    if found:
        raise UserError(
            f"{run.path}: must have the config that it was begun with, got {found}; "
            f"resume it with --config {run.config} and no --set"
        )
    return run.finished
