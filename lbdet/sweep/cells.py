"""Which runs make a sweep? A cell is one run: a mode, a precision, a seed, and how its config differs.

mode      starts from                updates
float     model.weights              the config's
qat       model.weights              as many
ptq       the float cell's weights   none: ranges of activations are calibrated
ptq+bn    the float cell's weights   none; batch norm is corrected too (`train.correct_bn`)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lbdet.errors import UserError
from lbdet.precision import FLOAT, Precision

MODES = ("qat", "ptq", "ptq+bn")
CORRECT_BN = 256
"""training images of ptq+bn"""
_PLAIN = ("guidance=null", "quantizer.overrides={}")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    mode: str
    """"float" or one of MODES"""
    precision: Precision
    seed: int
    ratio: float | None = None
    """of the semi-analytical solver; None = the config's solver"""

    @property
    def name(self) -> str:
        """The folder's name: qat_W4_seed0."""
        ratio = "" if self.ratio is None else f"_ratio{self.ratio:g}"
        precision = "" if self.mode == "float" else f"_{self.precision}"
        return f"{self.mode}{precision}{ratio}_seed{self.seed}"

    @property
    def series(self) -> str:
        """The line of the curve that the cell belongs to."""
        return self.mode if self.ratio is None else f"{self.mode} semi"

    def settings(self, folder: Path) -> list[str]:
        """Return what `--set` changes in the sweep's config, for cells that lie in `folder`."""
        seed = [f"seed={self.seed}"]
        target = f"schedule={{name: constant, target: {self.precision}}}"
        if self.mode == "float":
            return [target, *_PLAIN, *seed]
        semi = ["quantizer.weight.solver=semi", f"quantizer.weight.ratio={self.ratio}"]
        ratio = [] if self.ratio is None else semi
        if self.mode == "qat":
            return [f"schedule.target={self.precision}", *ratio, *seed]
        weights = folder / Cell("float", FLOAT, self.seed).name / "model.safetensors"
        correct = CORRECT_BN if self.mode == "ptq+bn" else 0
        return [
            target, "guidance=null", f"model.weights={json.dumps(str(weights), ensure_ascii=False)}",
            "model.weights_backbone=null", "model.weights_classes=null", "train.max_steps=0",
            "train.recalibrate_bn=0", f"train.correct_bn={correct}", *ratio, *seed,
        ]  # fmt: skip


def plan_cells(
    precisions: Sequence[Precision], modes: Sequence[str], seeds: Sequence[int], ratios: Sequence[float] = ()
) -> list[Cell]:
    """Return all cells of a sweep, those that others start from first.

    The float cell of every seed is always among them. The widths have the config's solver, or with `ratios`
    the semi-analytical one at each ratio.

    Raises:
        UserError: a mode, seed, width or ratio that stands twice, or an unknown mode.
    """
    for name, values in (("modes", modes), ("seeds", seeds), ("precisions", precisions), ("ratios", ratios)):
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise UserError(f"{name}: must be different, got {twice[0]} twice")
    floats = [Cell("float", FLOAT, seed) for seed in seeds]
    return floats + [
        Cell(mode, precision, seed, ratio)
        for seed in seeds
        for mode in modes
        for precision in precisions
        if precision != FLOAT
        for ratio in (ratios or (None,))
    ]
