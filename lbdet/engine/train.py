"""The training loop: the only place where format, schedule and data meet. It reads straight down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from lbdet.convert import (
    quantization_losses,
    scheduled_layers,
    set_precision,
    set_scheduled_precision,
    settle,
    uncalibrated,
)  # fmt: skip
from lbdet.data.augment import derive_seed
from lbdet.data.labelled import LabelledTrainSet
from lbdet.data.loader import Target, TrainSet, train_batches
from lbdet.data.records import spread_images
from lbdet.engine import distributed
from lbdet.engine.finish import calibrate
from lbdet.engine.optim import (
    average_start,
    average_update,
    build_optimizer,
    clipped_parameters,
    moving_statistics,
)  # fmt: skip
from lbdet.engine.phases import enter_phase
from lbdet.engine.progress import say, track
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.settings import TrainSettings
from lbdet.engine.signals import Interrupted, noted_signals
from lbdet.engine.task import Task
from lbdet.engine.tensorboard import scalars
from lbdet.errors import NumericsError, UserError, joined
from lbdet.guidance import Guidance
from lbdet.nn.batch_norm import freeze_batch_norm, set_training_mode
from lbdet.precision import Plan
from lbdet.schedules import Schedule

LOG_EVERY = 20
IMAGES_ON_THE_WAY = 200


@dataclass(frozen=True)
class Trained:
    """A network and its optimizer: the student, and a teacher that learns with it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def train(
    model: nn.Module,
    task: Task,
    train_set: TrainSet | LabelledTrainSet,
    val: Any,
    schedule: Schedule,
    settings: TrainSettings,
    run: RunFolder,
    seed: int,
    guidance: Guidance | None = None,
    blocks: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Train `model` in place, from the run's checkpoint where there is one, until it is to be evaluated.

    Of several processes (`lbdet.engine.distributed`) each computes the gradients of its share of a batch; all
    call this with equal arguments, and one of them with a run that writes.

    Args:
        blocks: block -> its layers, for stochastic precision, see `lbdet.convert.find_blocks`.

    Returns:
        The number of optimizer updates that the whole training has.

    Raises:
        NumericsError: a loss that is not finite.
        Interrupted: SIGINT or SIGTERM came; the checkpoint is that of the last finished update.
        UserError: a damaged image, or a checkpoint of another length of training or model.
    """
    total, per_epoch = settings.total_steps(len(train_set)), settings.updates_per_epoch(len(train_set))
    layers, blocks = scheduled_layers(model), blocks or {}
    for precision in schedule.precisions():  # every parameter that a plan can ask for exists from now on
        set_scheduled_precision(model, precision)
    networks = [_trained(m, settings) for m in (model, *(guidance.trained if guidance else ()))]
    average = average_start(model) if settings.ema else None
    start = _resume(run, networks, average, total)
    for network in networks:
        distributed.same_state(network.model)
    before = schedule.plan(start - 1, total, layers, blocks) if start else None
    batches = train_batches(
        train_set,
        settings.batch_size,
        seed,
        start * settings.accumulate,
        total * settings.accumulate,
        settings.workers,
        distributed.rank(),
        distributed.world_size(),
    )

    board = run.path / "tensorboard" if run.writes else None
    epoch_losses: list[float] = []
    with noted_signals() as received, scalars(board, start) as show:
        for step in track(range(start, total), total - start, "train"):
            plan = schedule.plan(step, total, layers, blocks)
            batch_norm = settings.batch_norm_at(step, total)
            if before is None or plan.phase != before.phase:
                ranges = partial(
                    calibrate, model, task, train_set.data, settings.calibration_images, batch_norm == "train"
                )
                enter_phase(model, before, plan, settings.phase_change, networks[0].optimizer, ranges)
                average = average_start(model) if settings.ema else None
            before = plan
            set_precision(model, plan.precision)
            for network in networks:
                set_training_mode(network.model, batch_norm)
            torch.manual_seed(_model_seed(seed, step))
            rate = settings.lr_at(step, total, plan.span)
            losses = _update(networks, task, guidance, rate, batches, settings, step, run)
            epoch_losses.append(losses["loss"])
            if average is not None and settings.ema:
                average_update(average, model, settings.ema, step - plan.span.start)

            done = step + 1
            if done % LOG_EVERY == 0 or done == total:
                record = {"step": done, "epoch": step // per_epoch, "lr": rate, **losses}
                run.log(record)
                show(record)
            if done % per_epoch == 0:
                say(f"epoch {done // per_epoch}: step {done}/{total}, mean loss {fmean(epoch_losses):.3f}")
                epoch_losses.clear()
                if settings.eval_every_epochs and (done // per_epoch) % settings.eval_every_epochs == 0:
                    record = {"step": done} | _evaluate_on_the_way(model, plan, task, average, val)
                    run.log(record)
                    show(record)
            signum = distributed.largest(received[0] if received else 0)
            if signum or done == total or done % (settings.checkpoint_steps or per_epoch) == 0:
                _stop_if_weights_not_finite(networks, done, run)
                run.save_checkpoint(_state(networks, average, done, total))
            if signum:
                distributed.largest(0)  # none leaves before the checkpoint is written
                raise Interrupted(signum, f"interrupted at step {done}, saved; continue with --resume")

    if average is not None:
        model.load_state_dict(average)
    set_precision(model, schedule.plan(max(total - 1, 0), total, layers, blocks).precision)
    if uncalibrated(model):  # nothing was trained
        calibrate(model, task, train_set.data, settings.calibration_images)
    return total


def _model_seed(seed: int, step: int) -> int:
    """Return the seed of dropout and of the samplers of Faster R-CNN, which is each rank's own."""
    rank = distributed.rank()
    return derive_seed("model", seed, step, rank) if rank else derive_seed("model", seed, step)


def _trained(model: nn.Module, settings: TrainSettings) -> Trained:
    if settings.batch_norm == "frozen":
        freeze_batch_norm(model)
    optimizer = build_optimizer(
        model, settings.optimizer, settings.lr, settings.weight_decay, settings.momentum
    )
    return Trained(model, optimizer)


def _update(
    networks: Sequence[Trained],
    task: Task,
    guidance: Guidance | None,
    rate: float,
    batches: Iterator[tuple[list[Tensor], list[Target]]],
    settings: TrainSettings,
    step: int,
    run: RunFolder,
) -> dict[str, float]:
    """Make one update of every network, the student first, from `accumulate` batches; return mean losses."""
    student = networks[0].model
    device = next(student.parameters()).device
    for network in networks:
        for group in network.optimizer.param_groups:
            group["lr"] = rate
        network.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, float] = {}
    for _ in range(settings.accumulate):
        images, targets = next(batches)
        targets = [{k: v.to(device) for k, v in target.items()} for target in targets]
        task_losses = partial(task.losses, images=images, targets=targets)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp), _told_at(step, run):
            losses = task_losses(student) | quantization_losses(student)
            losses |= guidance.losses(task_losses) if guidance is not None else {}
        loss = torch.stack(list(losses.values())).sum()
        values = distributed.average([float(value.detach()) for value in (loss, *losses.values())])
        for name, value in zip(("loss", *losses), values, strict=True):
            sums[name] = sums.get(name, 0.0) + value / settings.accumulate
        _stop_if_not_finite(sums, step, run)
        (loss / settings.accumulate).backward()
    distributed.average_gradients(
        [p for network in networks for p in network.model.parameters()],
        [tensor for network in networks for tensor in moving_statistics(network.model)],
    )
    for network in networks:
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(clipped_parameters(network.model), settings.clip_norm)
        network.optimizer.step()
    settle(student)
    return sums


@contextmanager
def _told_at(step: int, run: RunFolder) -> Iterator[None]:
    """Add step and remedy to what a quantizer says of weights that are not finite."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"step {step}: {error}; {_remedy(run)}") from None


def _stop_if_not_finite(losses: Mapping[str, float], step: int, run: RunFolder) -> None:
    if math.isfinite(losses["loss"]):
        return
    parts = ", ".join(f"{name}={value:.4g}" for name, value in losses.items() if name != "loss")
    raise NumericsError(f"step {step}: loss is {losses['loss']} ({parts}); {_remedy(run)}")


def _stop_if_weights_not_finite(networks: Sequence[Trained], step: int, run: RunFolder) -> None:
    """Keep the last good checkpoint good: a finite loss can still have an update that overflows."""
    states = [network.model.state_dict().items() for network in networks]
    bad = [name for state in states for name, value in state if not value.isfinite().all()]
    if bad:
        raise NumericsError(
            f"step {step}: {bad[0]} and {len(bad) - 1} other tensors are not finite; {_remedy(run)}"
        )


def _remedy(run: RunFolder) -> str:
    saved = f"last good checkpoint: {run.checkpoint}" if run.checkpoint.exists() else "no checkpoint yet"
    return f"{saved}; a smaller train.lr may help"


def _evaluate_on_the_way(
    model: nn.Module, plan: Plan, task: Task, average: Mapping[str, Tensor] | None, val: Any
) -> dict[str, Any]:
    """Evaluate at the phase's target the averaged weights where there are some, else the model's."""
    set_precision(model, plan.target)
    trained = average_start(model)
    if average is not None:
        model.load_state_dict(average)
    metrics, _ = task.evaluate(model, spread_images(val, IMAGES_ON_THE_WAY), 8)
    model.load_state_dict(trained)
    name, key = task.headline[0]
    say(f"  {name} {metrics[key] or 0:.3f} on {metrics['images']} images")
    return {key: metrics[key] for key in (*(key for _, key in task.headline), "images")}


def _state(
    networks: Sequence[Trained], average: dict[str, Tensor] | None, step: int, total: int
) -> dict[str, Any]:
    states = [{"model": n.model.state_dict(), "optimizer": n.optimizer.state_dict()} for n in networks]
    return {"networks": states, "average": average, "step": step, "total_steps": total}


def _resume(
    run: RunFolder, networks: Sequence[Trained], average: dict[str, Tensor] | None, total: int
) -> int:
    """Load the run's checkpoint, if there is one; return the first step that is left to do."""
    state = distributed.first(run.load_checkpoint)
    if state is None:
        run.forget_log_after(0)  # a run that died before its first checkpoint has left lines
        return 0
    if state["total_steps"] != total:
        raise UserError(
            f"{run.checkpoint}: training has {state['total_steps']} steps, "
            f"the config and data now give {total}; "
            "resume with the data and settings that the run began with"
        )
    try:
        for network, saved in zip(networks, state["networks"], strict=True):
            network.model.load_state_dict(saved["model"])
            network.optimizer.load_state_dict(saved["optimizer"])
        for name, value in (average or {}).items():
            value.copy_(state["average"][name])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = joined(error)[:200]
        raise UserError(
            f"{run.checkpoint}: is a checkpoint of another model or optimizer: {reason}"
        ) from None
    run.forget_log_after(state["step"])
    say(f"resumed at step {state['step']}/{total}")
    return state["step"]
