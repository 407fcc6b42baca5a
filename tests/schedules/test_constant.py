"""The constant schedule, and what every schedule promises."""

from __future__ import annotations

import pytest

from lbdet.precision import FLOAT, Precision
from lbdet.schedules import SCHEDULES, Constant

LAYERS = ("stem", "body.0", "head")
BLOCKS = {"body": ["body.0"]}


@pytest.mark.parametrize("target", [Precision(4), Precision(2, 8), FLOAT])
@pytest.mark.parametrize("total_steps", [1, 7])
def test_every_layer_has_the_target_in_one_phase_from_the_first_step_to_the_last(
    target: Precision, total_steps: int
) -> None:
    for step in range(total_steps):
        plan = Constant(target).plan(step, total_steps, LAYERS, BLOCKS)
        assert plan.precision == {"stem": target, "body.0": target, "head": target}
        assert plan.phase == 0


def test_a_plan_names_only_the_layers_asked_for() -> None:
    assert Constant(Precision(4)).plan(0, 1, ["head"], BLOCKS).precision == {"head": Precision(4)}
    assert Constant(Precision(4)).plan(0, 1, [], BLOCKS).precision == {}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_a_pure_function_of_the_step_that_ends_at_its_target(name: str) -> None:
    schedule = SCHEDULES[name](Precision(3))
    plans = [schedule.plan(step, 20, LAYERS, BLOCKS) for step in range(20)]
    assert plans == [schedule.plan(step, 20, LAYERS, BLOCKS) for step in reversed(range(20))][::-1]
    assert set(plans[-1].precision.values()) == {Precision(3)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_announces_every_precision_it_can_reach(name: str) -> None:
    schedule = SCHEDULES[name](Precision(3))
    reached = {p for step in range(20) for p in schedule.plan(step, 20, LAYERS, BLOCKS).precision.values()}
    assert reached <= set(schedule.precisions())
