"""Which layer has which width when, and at which learning rate? The facts of a training that is to come.

All of them are asked of what the training loop asks too, the schedule and the settings:

    phase  updates     widths
    0      0..1169     W4       the scheduled layers; with stochastic precision some blocks are float for now
    1      1170..2339  W4A4
           always      W8A8     layers with a width of their own, and those that are kept float
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lbdet.engine.settings import TrainSettings
from lbdet.precision import FLOAT, Plan, Precision
from lbdet.schedules import Schedule

TEXT_COLUMNS = 100
_NAMES = 3  # how many of the layers of one width are listed


@dataclass(frozen=True)
class Timeline:
    """A training as it is planned."""

    schedule: Schedule
    settings: TrainSettings
    images: int
    """to train on"""
    layers: tuple[str, ...]
    """every convolution and linear layer, in the model's order"""
    fixed: Mapping[str, Precision]
    """the layers among them that no plan changes, with their width"""
    blocks: Mapping[str, Sequence[str]]
    """block -> its layers; empty unless precision is stochastic"""

    @property
    def total(self) -> int:
        """The optimizer updates of the whole training."""
        return self.settings.total_steps(self.images)

    @property
    def scheduled(self) -> list[str]:
        """The layers whose width a plan sets."""
        return [name for name in self.layers if name not in self.fixed]

    def epochs(self, step: int) -> float:
        """Return how many epochs the first `step` updates are."""
        return step / self.settings.updates_per_epoch(self.images)

    def plan(self, step: int) -> Plan:
        """Return the plan of a step."""
        return self.schedule.plan(step, self.total, self.scheduled, self.blocks)

    def phases(self) -> list[range]:
        """Return the steps of each phase; no phase without updates."""
        spans: list[range] = []
        while (start := spans[-1].stop if spans else 0) < self.total:
            spans.append(self.plan(start).span)
        return spans

    def rates(self) -> np.ndarray:
        """Return the learning rate at every step, float64 `[total]`."""
        rates = [self.settings.lr_at(step, self.total, span) for span in self.phases() for step in span]
        return np.array(rates, np.float64)

    def bits(self, steps: Iterable[int]) -> np.ndarray:
        """Return the widths of weights and of activations at some steps, int64 `[2, layers, steps]`;
        0 is float.
        """
        plans = [{**self.fixed, **self.plan(step).precision} for step in steps]
        found = [[(p[name].weight_bits or 0, p[name].act_bits or 0) for p in plans] for name in self.layers]
        return np.array(found, np.int64).reshape(len(self.layers), len(plans), 2).transpose(2, 0, 1)

    def quantized_blocks(self, step: int) -> int:
        """Return how many blocks have the width of their phase at a step; the others are float."""
        plan = self.plan(step)
        return sum(
            all(plan.precision[name] == plan.target[name] for name in names) for names in self.blocks.values()
        )

    def all_quantized_from(self) -> int:
        """Return the first step from which on every block has the width of its phase."""
        plans = ((step, self.plan(step)) for step in reversed(range(self.total)))
        return next((step + 1 for step, plan in plans if plan.precision != plan.target), 0)


def describe(timeline: Timeline, model: str) -> str:
    """Return the facts as text, at most 100 columns wide.

    Args:
        model: its name.
    """
    parts = [_wrapped([_headline(timeline, model)])]
    if timeline.total:
        parts.append(_aligned(_rows(timeline)) + _key(timeline))
    else:
        parts.append([f"nothing is trained: the scheduled layers have {_widths(timeline.plan(0))}"])
    parts.append(_wrapped(_always(timeline.fixed)))
    if len(timeline.phases()) > 1:
        parts.append(_wrapped([f"at a phase change: {_at_phase_change(timeline)}"]))
    return "\n\n".join("\n".join(part) for part in parts if part)


def _headline(timeline: Timeline, model: str) -> str:
    settings, blocks = timeline.settings, len(timeline.blocks)
    epochs = f"{timeline.epochs(timeline.total):.1f}".removesuffix(".0")
    in_blocks = f" in {blocks} blocks" if blocks else ""
    accumulated = f" x {settings.accumulate}" if settings.accumulate > 1 else ""
    return (
        f"{model}: {len(timeline.scheduled)} scheduled layers{in_blocks}; {timeline.images} images, "
        f"{timeline.total} updates, {epochs} epochs, batch {settings.batch_size}{accumulated}"
    )


def _rows(timeline: Timeline) -> list[list[str]]:
    """Return the cells of the table, a row a phase below the header."""
    rates, stochastic = timeline.rates(), bool(timeline.blocks)
    all_from = timeline.all_quantized_from() if stochastic else 0
    rows = [["phase", "updates", "epochs", "widths", "lr first", "highest", "last"]]
    rows[0] += ["blocks", "all from"] if stochastic else []
    for phase, span in enumerate(timeline.phases()):
        lr = rates[span.start : span.stop]
        epochs = [f"{timeline.epochs(step):.1f}" for step in (span.start, span.stop)]
        row = [str(phase), f"{span[0]}..{span[-1]}", "..".join(epochs), _widths(timeline.plan(span[0]))]
        row += [f"{rate:.2e}" for rate in (lr[0], lr.max(), lr[-1])]
        rows.append(row + (_stochastic_cells(timeline, span, all_from) if stochastic else []))
    return rows


def _stochastic_cells(timeline: Timeline, span: range, all_from: int) -> list[str]:
    if set(timeline.plan(span[0]).target.values()) == {FLOAT}:
        return ["-", "-"]
    first, last = (
        f"{timeline.quantized_blocks(step)}/{len(timeline.blocks)}" for step in (span[0], span[-1])
    )
    return [f"{first} -> {last}", str(max(all_from, span[0])) if all_from < span.stop else "-"]


def _key(timeline: Timeline) -> list[str]:
    if not timeline.blocks:
        return []
    text = "blocks: those quantized at the first and the last update; all from: the update from which all are"
    return _wrapped([text])


def _widths(plan: Plan) -> str:
    """Return what the phase trains for."""
    return ", ".join(dict.fromkeys(map(str, plan.target.values()))) or "-"


def _always(fixed: Mapping[str, Precision]) -> list[str]:
    """Return a line for each width of layers that no plan changes, float ones last."""
    groups: dict[Precision, list[str]] = {}
    for name, width in fixed.items():
        groups.setdefault(width, []).append(name)
    in_float = groups.pop(FLOAT, [])
    lines = [f"{width} always: {_listed(names)}" for width, names in groups.items()]
    return lines + ([f"float always ({len(in_float)}): {_listed(in_float)}"] if in_float else [])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {more} more" if more > 0 else "")


def _at_phase_change(timeline: Timeline) -> str:
    """Say what the training loop does where widths change."""
    settings, change = timeline.settings, timeline.settings.phase_change
    calibrated = f"calibrated on {min(settings.calibration_images, timeline.images)} images"
    ranges = {
        "calibrate": f"activation ranges of a new width are {calibrated}",
        "rescale": f"activation ranges are rescaled to the new width, or {calibrated} where there are none",
    }
    has_ranges = any(p.act_bits is not None for p in timeline.schedule.precisions())
    warmup = f", its {settings.warmup_steps} updates of warm-up too" if settings.warmup_steps else ""
    return "; ".join(
        [
            *([ranges[change.ranges]] if has_ranges else []),
            "momentum is " + ("reset" if change.reset_momentum else "kept"),
            "the learning rate " + (f"begins again{warmup}" if change.restart_lr else "goes on"),
        ]
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _wrapped(lines: Iterable[str]) -> list[str]:
    wrap = textwrap.TextWrapper(
        TEXT_COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [part for line in lines for part in wrap.wrap(line)]
