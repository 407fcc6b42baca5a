"""What the training loop is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lbdet.data.loader import steps_per_epoch
from lbdet.engine.optim import lr_factor
from lbdet.engine.phases import PhaseChange
from lbdet.errors import UserError


@dataclass(frozen=True)
class TrainSettings:
    """What the loop is told;
    the names are those of the config's `train` section, where they are explained.
    """

    epochs: int = 6
    max_steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 50
    lr_curve: str = "cosine"
    lr_milestones: Sequence[float] = (0.67, 0.89)
    clip_norm: float | None = None
    checkpoint_steps: int | None = None
    ema: float | None = None
    amp: bool = False
    workers: int = 1
    freeze_bn_after: float | None = None
    calibration_images: int = 64
    batch_norm: Literal["train", "frozen"] = "train"
    eval_every_epochs: int | None = None
    phase_change: PhaseChange = field(default_factory=PhaseChange)

    def updates_per_epoch(self, images: int) -> int:
        """Return the optimizer updates in an epoch of `images`.

        Raises:
            UserError: an epoch has too few batches for one.
        """
        batches = steps_per_epoch(images, self.batch_size)
        if batches < self.accumulate:
            raise UserError(
                f"train.accumulate: must be at most the {batches} batches of an epoch, got {self.accumulate}"
            )
        return batches // self.accumulate

    def total_steps(self, images: int) -> int:
        """Return the optimizer updates of the whole training."""
        steps = self.epochs * self.updates_per_epoch(images)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def batch_norm_at(self, step: int, total: int) -> Literal["train", "frozen"]:
        """Return batch norm's mode at a step: frozen from `freeze_bn_after`, a share of all steps, on."""
        late = self.freeze_bn_after is not None and step >= self.freeze_bn_after * total
        return "frozen" if late else self.batch_norm

    def lr_at(self, step: int, total: int, phase: range) -> float:
        """Return the learning rate at a step, whose phase is given."""
        if self.phase_change.restart_lr:
            step, total = step - phase.start, len(phase)
        factor = lr_factor(step, total, self.warmup_steps, self.lr_curve, self.lr_milestones)
        return self.lr * factor
