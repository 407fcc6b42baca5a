"""Which runs make a sweep, and how their configs differ from the sweep's own."""

from __future__ import annotations

import pytest

from lbdet.config import load_config
from lbdet.errors import UserError
from lbdet.precision import FLOAT, Precision
from lbdet.sweep.cells import CORRECT_BN, Cell, plan_cells
from lbdet.sweep.run import Sweep

W4, W2 = Precision(4), Precision(2)


def test_every_seed_has_a_float_cell_and_they_come_first() -> None:
    cells = plan_cells([FLOAT, W4, W2], ["qat", "ptq"], [0, 1])
    assert [cell.name for cell in cells[:2]] == ["float_seed0", "float_seed1"]
    assert [cell.name for cell in cells[2:]] == [
        f"{mode}_{width}_seed{seed}" for seed in (0, 1) for mode in ("qat", "ptq") for width in ("W4", "W2")
    ]
    assert len({cell.name for cell in cells}) == len(cells)


def test_ratios_take_the_place_of_the_configs_solver() -> None:
    cells = plan_cells([W4], ["qat"], [0], [0.6, 0.75])
    assert [cell.name for cell in cells] == ["float_seed0", "qat_W4_ratio0.6_seed0", "qat_W4_ratio0.75_seed0"]
    assert [cell.series for cell in cells] == ["float", "qat semi", "qat semi"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([W4, W4], ["qat"], [0]), "precisions: must be different, got W4 twice"),
        (([W4], ["qat", "qat"], [0]), "modes: must be different, got qat twice"),
        (([W4], ["qat"], [1, 1]), "seeds: must be different, got 1 twice"),
        (([W4], ["qat"], [1], [0.5, 0.5]), "ratios: must be different, got 0.5 twice"),
    ],
)
def test_what_stands_twice_is_refused(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        plan_cells(*arguments)


EXTRA = (
    "guidance={logits: 1.0}",
    "quantizer.overrides={'head.*': {precision: W4}}",
    "train.correct_bn=8",
    "train.recalibrate_bn=9",
)


def configs(config, folder, *cells: Cell):
    sweep = Sweep(str(config), EXTRA, folder)
    return [sweep.config_of(cell) for cell in cells]


def test_the_float_cell_is_float_everywhere_and_has_no_teacher(config, tmp_path) -> None:
    (found,) = configs(config, tmp_path, Cell("float", FLOAT, 3))
    assert (found.schedule.target, found.guidance, found.quantizer.overrides, found.seed) == (
        FLOAT,
        None,
        {},
        3,
    )
    assert found.train == load_config(config, EXTRA).train


def test_a_qat_cell_differs_in_target_and_seed_only(config, tmp_path) -> None:
    (found,) = configs(config, tmp_path, Cell("qat", W2, 3))
    assert found == load_config(config, [*EXTRA, "schedule.target=W2", "seed=3"])


@pytest.mark.parametrize(("mode", "images"), [("ptq", 0), ("ptq+bn", CORRECT_BN)])
def test_a_ptq_cell_takes_the_float_cells_weights_and_trains_nothing(config, tmp_path, mode, images) -> None:
    folder = tmp_path / "with: odd #name 😀"
    (found,) = configs(config, folder, Cell(mode, W4, 1))
    assert found.model.weights == str(folder / "cells" / "float_seed1" / "model.safetensors")
    assert (found.train.max_steps, found.train.correct_bn, found.train.recalibrate_bn) == (0, images, 0)
    assert found.guidance is None
    assert found.quantizer == load_config(config, EXTRA).quantizer


def test_a_ratio_is_that_of_the_semi_analytical_solver(config, tmp_path) -> None:
    (found,) = configs(config, tmp_path, Cell("qat", W4, 0, 0.6))
    assert found.quantizer.weight.model_dump()["solver"] == "semi"
    assert found.quantizer.weight.model_dump()["ratio"] == 0.6


def test_settings_of_a_precision_are_for_its_qat_cells_and_come_after_those_of_all(config, tmp_path) -> None:
    sweep = Sweep(str(config), ("train.lr=0.5",), tmp_path, {W2: ["train.lr=0.25", "train.ema=0.5"]})
    cells = [Cell("qat", W2, 0), Cell("qat", W4, 0), Cell("ptq", W2, 0), Cell("float", FLOAT, 0)]
    found = [sweep.config_of(cell).train for cell in cells]
    assert [(train.lr, train.ema) for train in found] == [(0.25, 0.5), (0.5, None), (0.5, None), (0.5, None)]
    assert "--set train.lr=0.5 train.lr=0.25 train.ema=0.5 schedule.target=W2" in sweep.command_of(
        cells[0], "x"
    )


def test_a_width_that_the_format_does_not_have_is_told(config, tmp_path) -> None:
    with pytest.raises(UserError, match=r"schedule\.target: format 'lbw' has no 8-bit weights"):
        configs(config, tmp_path, Cell("qat", Precision(8, 8), 0))
