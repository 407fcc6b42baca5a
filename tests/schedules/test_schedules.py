"""The laws of schedules: pure functions of the step that cover every layer and end at their target."""

from __future__ import annotations

import math

import pytest

from lbdet.errors import UserError
from lbdet.precision import FLOAT, Plan, Precision
from lbdet.schedules import Constant, Cyclic, Progressive, Schedule, Stochastic, TwoStage

W2, W2A2, W4A4, W8A8 = (Precision.parse(text) for text in ("W2", "W2A2", "W4A4", "W8A8"))
LAYERS = tuple(f"body.{i}.conv{k}" for i in range(7) for k in (1, 2))
BLOCKS = {f"body.{i}": (f"body.{i}.conv1", f"body.{i}.conv2") for i in range(7)}
ALL: dict[str, Schedule] = {
    "constant": Constant(W2A2),
    "two_stage": TwoStage(W2A2, 0.3),
    "progressive": Progressive((FLOAT, W8A8, W4A4, W2A2)),
    "shares": Progressive((W8A8, W4A4, W2A2), (1, 2, 5), two_stage=True),
    "cyclic": Cyclic(W4A4, W2A2, 3),
    "stochastic": Stochastic(Constant(W2A2)),
    "stochastic cyclic": Stochastic(Cyclic(W4A4, W2A2), 0.0, 1.0, 5),
}


def plans(schedule: Schedule, total: int) -> list[Plan]:
    return [schedule.plan(step, total, LAYERS, BLOCKS) for step in range(total)]


def widths(schedule: Schedule, total: int) -> list[str]:
    """The target at every step, each once in a row."""
    texts = [str(next(iter(plan.target.values()))) for plan in plans(schedule, total)]
    return [text for i, text in enumerate(texts) if i == 0 or text != texts[i - 1]]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("total", [19, 100])
def test_a_schedule_is_a_pure_function_that_covers_every_layer_and_ends_at_its_target(
    name: str, total: int
) -> None:
    schedule = ALL[name]
    found = plans(schedule, total)
    assert found == [schedule.plan(step, total, LAYERS, BLOCKS) for step in reversed(range(total))][::-1]
    assert all(list(plan.precision) == list(plan.target) == list(LAYERS) for plan in found)
    assert set(found[-1].precision.values()) == {W2A2} == set(found[-1].target.values())


@pytest.mark.parametrize("name", ALL)
def test_a_schedule_announces_exactly_the_precisions_that_it_reaches(name: str) -> None:
    reached = {p for plan in plans(ALL[name], 100) for p in plan.precision.values()}
    assert reached == set(ALL[name].precisions())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("total", [19, 100])
def test_phases_are_the_stretches_of_one_target_and_know_their_span(name: str, total: int) -> None:
    found = plans(ALL[name], total)
    steps = []
    for step, plan in enumerate(found):
        assert step in plan.span
        changed = step > 0 and plan.target != found[step - 1].target
        assert plan.phase == (found[step - 1].phase + changed if step else 0)
        if step == plan.span.start:
            steps += plan.span
    assert steps == list(range(total))


@pytest.mark.parametrize("name", ALL)
def test_without_updates_the_plan_is_the_target(name: str) -> None:
    ALL[name].check(0)
    assert set(ALL[name].plan(0, 0, LAYERS, BLOCKS).precision.values()) == {W2A2}


def test_a_plan_names_only_the_layers_asked_for() -> None:
    assert Constant(W2A2).plan(0, 1, ["head"], BLOCKS).precision == {"head": W2A2}
    assert TwoStage(W2A2).plan(0, 2, [], {}).precision == {}


@pytest.mark.parametrize("total", [1, 9])
def test_one_width_makes_the_constant_schedule_whatever_it_is_called(total: int) -> None:
    constant = plans(Constant(W2), total)
    for same in (Progressive((W2,)), Progressive((W2, W2, W2)), TwoStage(W2), Cyclic(W2, W2, 4)):
        assert plans(same, total) == constant
        assert same.precisions() == (W2,)


def test_two_stage_is_two_constants_joined() -> None:
    found = plans(TwoStage(W2A2, 0.25), 20)
    assert [plan.precision for plan in found[:5]] == [p.precision for p in plans(Constant(W2), 5)]
    assert [plan.precision for plan in found[5:]] == [p.precision for p in plans(Constant(W2A2), 15)]
    assert [plan.phase for plan in found] == [0] * 5 + [1] * 15


def test_progressive_gives_each_width_its_share() -> None:
    found = plans(Progressive((W8A8, W4A4, W2A2), (1, 2, 5)), 80)
    assert [found[step].span for step in (0, 10, 30)] == [range(10), range(10, 30), range(30, 80)]
    spans = {plan.span for plan in plans(ALL["progressive"], 100)}
    assert {len(span) for span in spans} == {25}


def test_two_stages_in_each_width_lower_the_weights_first() -> None:
    nested = Progressive((W8A8, W4A4, W2A2), two_stage=True)
    assert widths(nested, 60) == ["W8", "W8A8", "W4A8", "W4A4", "W2A4", "W2A2"]
    assert plans(Progressive((W2A2,), two_stage=True), 10) == plans(TwoStage(W2A2), 10)


def test_cyclic_falls_by_a_bit_a_stage_and_climbs_back_up() -> None:
    assert widths(Cyclic(W4A4, W2A2, 2), 60) == ["W4A4", "W3A3", "W2A2"] * 2
    assert widths(Cyclic(Precision(4, 8), Precision(2, 7), 1), 60) == ["W4A8", "W3A7", "W2A7"]
    assert widths(Cyclic(Precision(3), Precision(2), 1), 60) == ["W3", "W2"]


@pytest.mark.parametrize("name", ALL)
def test_fewer_updates_than_stages_are_refused_by_name(name: str) -> None:
    stages = 1 + plans(ALL[name], 100)[-1].phase
    if stages > 1:
        with pytest.raises(UserError, match=f"each of the {stages} stages needs an update, got none for .*W"):
            ALL[name].check(stages - 1)
        with pytest.raises(UserError, match="needs an update"):
            ALL[name].plan(0, 1, LAYERS, BLOCKS)


def test_a_stage_whose_share_is_too_small_for_an_update_is_refused() -> None:
    schedule = Progressive((W8A8, W4A4, W2A2), (1, 1, 98))
    schedule.check(100)
    with pytest.raises(UserError, match="got none for W8A8 of 25"):
        schedule.check(25)


@pytest.mark.parametrize("inner", [Constant(W2A2), Cyclic(W4A4, W2A2)])
def test_stochastic_precision_draws_exactly_its_share_of_whole_blocks(inner: Schedule) -> None:
    schedule = Stochastic(inner, 0.25, 0.8, 3)
    for step, (plan, whole) in enumerate(zip(plans(schedule, 50), plans(inner, 50), strict=True)):
        share = min(1, 0.25 + 0.75 * step / (0.8 * 49))
        assert schedule.share(step, 50) == pytest.approx(share)
        drawn = [b for b, names in BLOCKS.items() if all(plan.precision[n] != FLOAT for n in names)]
        in_float = [b for b, names in BLOCKS.items() if all(plan.precision[n] == FLOAT for n in names)]
        assert len(drawn) == round(share * 7)
        assert len(drawn) + len(in_float) == 7
        assert all(plan.precision[n] == whole.precision[n] for block in drawn for n in BLOCKS[block])
        assert (plan.target, plan.phase, plan.span) == (whole.target, whole.phase, whole.span)


def test_stochastic_precision_ends_as_what_it_wraps() -> None:
    for until in (0.5, 0.8, 1.0):
        found, whole = plans(Stochastic(Cyclic(W4A4, W2A2), 0.0, until), 60), plans(Cyclic(W4A4, W2A2), 60)
        assert found[math.ceil(until * 59) :] == whole[math.ceil(until * 59) :]
        assert found[:9] != whole[:9]


def test_blocks_are_drawn_evenly_and_anew_for_each_seed_and_step() -> None:
    schedules = [Stochastic(Constant(W2A2), 0.5, 1.0, seed) for seed in (0, 0, 1)]
    found = [[tuple(plan.precision.items()) for plan in plans(schedule, 400)] for schedule in schedules]
    assert found[0] == found[1] != found[2]
    assert len(set(found[0][:100])) > 25  # of the 35 ways to draw 4 of 7, and those of 5 of 7
    expected = sum(round(schedules[0].share(step, 400) * 7) for step in range(400)) / 7
    for layer in LAYERS:
        drawn = sum(dict(step)[layer] == W2A2 for step in found[0])
        assert abs(drawn - expected) < 4 * math.sqrt(400) / 2


def test_a_layer_outside_of_all_blocks_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"every layer must be in a block, got 'loose' in none"):
        Stochastic(Constant(W2)).plan(0, 9, [*LAYERS, "loose"], BLOCKS)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TwoStage(W2A2, 1.0), "share must lie between 0 and 1, got 1.0"),
        (lambda: Progressive(()), "widths must not be empty"),
        (lambda: Progressive((W4A4, W2A2), (1,)), r"shares must be one a width \(2\), got 1"),
        (lambda: Progressive((W4A4, W2A2), (1, 0)), r"shares must be positive, got \[1, 0\]"),
        (lambda: Progressive((W4A4, W2A2), (1, math.nan)), "shares must be positive"),
        (lambda: Cyclic(W2A2, W4A4), "start must be at least as wide as target W4A4, got W2A2"),
        (lambda: Cyclic(Precision(4), W2A2), "start must quantize what target W2A2 does, got W4"),
        (lambda: Cyclic(W4A4, W2A2, 0), "cycles must be at least 1, got 0"),
        (lambda: Stochastic(Constant(W2), -0.1), "first must be a share from 0 to 1, got -0.1"),
        (lambda: Stochastic(Constant(W2), 0.5, 0), "until must be a share above 0, at most 1, got 0"),
    ],
)
def test_impossible_schedules_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
