"""A second call must ask of the cells that are there what the first one asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbdet.config import dump_config
from lbdet.errors import UserError
from lbdet.precision import Precision
from lbdet.sweep.cells import Cell
from lbdet.sweep.recipe import check_recipe
from lbdet.sweep.run import Sweep

CELL = Cell("qat", Precision(4), 0)


def begun(config: Path, folder: Path, *settings: str) -> None:
    """Leave what a cell leaves that was begun with these settings."""
    sweep = Sweep(str(config), settings, folder)
    sweep.run(CELL).start(dump_config(sweep.config_of(CELL)))


def test_the_same_settings_and_a_cell_without_a_config_pass(config: Path, tmp_path: Path) -> None:
    sweep = Sweep(str(config), ("train.lr=0.5",), tmp_path / "s")
    check_recipe(sweep, CELL)
    sweep.run(CELL).path.mkdir(parents=True)
    check_recipe(sweep, CELL)
    begun(config, tmp_path / "s", "train.lr=0.5")
    check_recipe(sweep, CELL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("train.lr=0.25", "seed=7"),
            "got train.lr 0.25 (was 0.5); give the same --config, --set, --at and spelling",
        ),
        (
            ("train.lr=0.5", "guidance={logits: 1.0}", "quantizer.overrides={'a.*': {precision: W2}}"),
            "got quantizer.overrides.a.* {'precision': 'W2'} (was None), guidance {'name': 'teacher', ",
        ),
        (
            ("train.lr=0.5", "quantizer.weight.format=uniform"),
            "got quantizer.weight.format 'uniform' (was 'lbw'), quantizer.weight.solver None (was 'exact')",
        ),
    ],
)
def test_other_settings_are_refused_with_their_keys_and_both_values(
    config: Path, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    begun(config, tmp_path / "s", "train.lr=0.5")
    with pytest.raises(UserError) as error:
        check_recipe(Sweep(str(config), settings, tmp_path / "s"), CELL)
    assert str(error.value).startswith(f"{tmp_path}/s/cells/qat_W4_seed0: must have the config that it was ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_of_many_differences_the_first_are_named(config: Path, tmp_path: Path) -> None:
    begun(config, tmp_path / "s")
    keys = ("train.lr=0.5", "train.epochs=3", "train.batch_size=3", "train.ema=0.5", "data.augment=none",
            "train.clip_norm=1", "eval.batch_size=2")  # fmt: skip
    with pytest.raises(UserError, match=r" and 2 more; give the same"):
        check_recipe(Sweep(str(config), keys, tmp_path / "s"), CELL)
