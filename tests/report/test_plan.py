"""The facts of a training that is to come, and their picture: what the schedule says, nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lbdet.engine.phases import PhaseChange
from lbdet.engine.settings import TrainSettings
from lbdet.precision import FLOAT, Precision
from lbdet.report.plan import FLOAT_COLOUR, MAX_COLUMNS, colours, draw_plan, sample_steps
from lbdet.report.timeline import Timeline, describe
from lbdet.schedules import Constant, Cyclic, Progressive, Schedule, Stochastic, TwoStage

W2, W2A2, W4A4, W8A8 = (Precision.parse(text) for text in ("W2", "W2A2", "W4A4", "W8A8"))
LAYERS = ("stem", *(f"body.{i}.conv{k}" for i in range(5) for k in (1, 2)), "neck", "head")
FIXED = {"stem": W8A8, "neck": FLOAT, "head": W8A8}
BLOCKS = {f"body.{i}": (f"body.{i}.conv1", f"body.{i}.conv2") for i in range(5)}
SCHEDULED = [name for name in LAYERS if name not in FIXED]
SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(W2A2),
    "two_stage": TwoStage(W2A2, 0.3),
    "progressive": Progressive((FLOAT, W8A8, W4A4, W2A2)),
    "cyclic": Cyclic(W4A4, W2A2, 3),
    "stochastic": Stochastic(Constant(W2A2), 0.2, 0.5, 4),
    "stochastic to the end": Stochastic(Progressive((FLOAT, W4A4, W2A2)), 0.0, 1.0),
}


def timeline(schedule: Schedule, updates: int = 60, **settings: Any) -> Timeline:
    """Make a training of 8 updates an epoch."""
    basis = TrainSettings(epochs=99999, max_steps=updates, batch_size=4, warmup_steps=3)
    blocks = BLOCKS if isinstance(schedule, Stochastic) else {}
    return Timeline(schedule, replace(basis, **settings), 34, LAYERS, FIXED, blocks)


@pytest.fixture(params=SCHEDULES)
def planned(request) -> Timeline:
    return timeline(SCHEDULES[request.param])


def plans(planned: Timeline) -> list:
    return [planned.schedule.plan(step, planned.total, SCHEDULED, BLOCKS) for step in range(planned.total)]


def precision_at(planned: Timeline, step: int, name: str) -> Precision:
    whole = planned.schedule.plan(step, planned.total, SCHEDULED, BLOCKS).precision
    return FIXED[name] if name in FIXED else whole[name]


def test_the_widths_of_every_layer_at_every_step_are_those_of_the_plan(planned: Timeline) -> None:
    bits = planned.bits(range(planned.total))
    assert bits.shape == (2, len(LAYERS), planned.total)
    for row, name in enumerate(LAYERS):
        for step in range(planned.total):
            expected = precision_at(planned, step, name)
            assert (expected.weight_bits or 0, expected.act_bits or 0) == tuple(bits[:, row, step])


def test_phases_follow_each_other_and_the_learning_rate_is_that_of_the_loop(planned: Timeline) -> None:
    found = plans(planned)
    assert planned.phases() == list(dict.fromkeys(plan.span for plan in found))
    assert [step for span in planned.phases() for step in span] == list(range(planned.total))
    loop = [planned.settings.lr_at(step, planned.total, plan.span) for step, plan in enumerate(found)]
    assert planned.rates().tolist() == loop


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name.startswith("stochastic")])
def test_blocks_are_counted_as_the_plan_draws_them(name: str) -> None:
    planned = timeline(SCHEDULES[name])
    found, all_from = plans(planned), planned.all_quantized_from()
    for step, plan in enumerate(found):
        left = {
            block for block, names in BLOCKS.items() for n in names if plan.precision[n] != plan.target[n]
        }
        assert planned.quantized_blocks(step) == len(BLOCKS) - len(left)
        assert step < all_from or not left
    assert 0 < all_from < planned.total
    assert planned.quantized_blocks(all_from - 1) < len(BLOCKS)


def test_a_training_without_updates_has_no_phase() -> None:
    nothing = timeline(TwoStage(W2A2), 0)
    assert (nothing.total, nothing.phases(), nothing.rates().tolist()) == (0, [], [])


def cells(text: str) -> list[list[str]]:
    """Return the words of the table's rows below its header."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("phase "))
    return [line.split() for line in lines[start + 1 :] if line[:1].isdigit()]


def test_a_row_of_the_table_tells_a_phase() -> None:
    text = describe(timeline(Progressive((FLOAT, W4A4, W2A2), (1, 2, 3)), lr=0.1), "net")
    assert text.splitlines()[0] == "net: 10 scheduled layers; 34 images, 60 updates, 7.5 epochs, batch 4"
    assert [row[:4] for row in cells(text)] == [
        ["0", "0..9", "0.0..1.2", "float"],
        ["1", "10..29", "1.2..3.8", "W4A4"],
        ["2", "30..59", "3.8..7.5", "W2A2"],
    ]
    assert "blocks" not in text


@pytest.mark.parametrize("restart", [False, True])
def test_the_learning_rates_in_the_table_are_the_first_the_highest_and_the_last_of_the_phase(restart) -> None:
    planned = timeline(TwoStage(W2A2), lr=0.1, phase_change=PhaseChange(restart_lr=restart))
    for row, span in zip(cells(describe(planned, "net")), planned.phases(), strict=True):
        loop = [planned.settings.lr_at(step, 60, span) for step in span]
        shown = [float(text) for text in row[4:7]]
        assert shown == pytest.approx([loop[0], max(loop), loop[-1]], rel=0.006)


def test_stochastic_precision_has_columns_of_blocks_and_a_float_phase_has_none_to_count() -> None:
    planned = timeline(SCHEDULES["stochastic to the end"])
    text = describe(planned, "net")
    assert "10 scheduled layers in 5 blocks;" in text
    first, second, third = ["".join(row[7:]) for row in cells(text)]
    counts = [[planned.quantized_blocks(step) for step in (span[0], span[-1])] for span in planned.phases()]
    assert first == "--"
    assert second == "{}/5->{}/5-".format(*counts[1])
    assert third == "{}/5->{}/5".format(*counts[2]) + str(planned.all_quantized_from())
    assert planned.all_quantized_from() in planned.phases()[2]


@pytest.mark.parametrize(
    "schedule",
    [
        *(Stochastic(Progressive((W8A8, W4A4, W2A2)), 0.5, until) for until in (0.2, 0.4, 0.6, 1.0)),
        Stochastic(TwoStage(W2A2), 0.0, 0.55),  # from the first update of the second phase
    ],
)
def test_the_last_column_is_the_update_of_the_phase_from_which_every_block_is_quantized(schedule) -> None:
    planned = timeline(schedule)
    last_float = max(step for step, plan in enumerate(plans(planned)) if plan.precision != plan.target)
    expected = [next((str(s) for s in span if s > last_float), "-") for span in planned.phases()]
    assert [row[-1] for row in cells(describe(planned, "net"))] == expected


@pytest.mark.parametrize(
    ("precisions", "lines"),
    [
        ([W8A8, FLOAT, W8A8, W2], 
         ["W8A8 always: layer0, layer2", "W2 always: layer3", "float always (1): layer1"]),
        ([W8A8] * 3, ["W8A8 always: layer0, layer1, layer2"]),
        ([FLOAT] * 12, ["float always (12): layer0, layer1, layer2 and 9 more"]),
        ([Precision(None, 8)], ["A8 always: layer0"]),
    ],
)  # fmt: skip
def test_layers_that_no_plan_changes_are_grouped_by_width(precisions, lines: list[str]) -> None:
    fixed = {f"layer{i}": precision for i, precision in enumerate(precisions)}
    text = describe(replace(timeline(Constant(W2)), layers=("body", *fixed), fixed=fixed), "net")
    assert [line for line in text.splitlines() if "always" in line] == lines


@pytest.mark.parametrize(
    ("schedule", "change", "sentences"),
    [
        (TwoStage(W2A2), PhaseChange(),
         ["ranges of a new width are calibrated on 34 images", "momentum is kept",
          "rate begins again, its 3 updates of warm-up too"]),
        (TwoStage(W2A2), PhaseChange("rescale", True, False),
         ["are rescaled to the new width, or calibrated on 34 images", "momentum is reset", "rate goes on"]),
        (Progressive((W2, Precision(3))), PhaseChange(), ["at a phase change: momentum is kept"]),
    ],
)  # fmt: skip
def test_what_a_phase_change_does_is_told(schedule, change: PhaseChange, sentences: list[str]) -> None:
    text = " ".join(describe(timeline(schedule, phase_change=change), "net").split())
    assert [sentence for sentence in sentences if sentence not in text] == []


def test_without_a_phase_change_or_without_updates_nothing_is_said_of_one() -> None:
    assert "phase change" not in describe(timeline(Constant(W2A2)), "net")
    text = describe(timeline(TwoStage(W2A2), 0), "net")
    assert "nothing is trained: the scheduled layers have W2A2" in text
    assert "phase" not in text


def test_the_text_fits_a_hundred_columns_and_loses_no_name() -> None:
    names = tuple(f"head.classification_head.module_list.{i}.0.0" for i in range(3))
    planned = timeline(Stochastic(TwoStage(W2A2), 0.0, 1.0), 123_456, batch_size=8)
    planned = replace(planned, images=98_765, layers=(*SCHEDULED, *names), fixed=dict.fromkeys(names, W8A8))
    text = describe(planned, "fasterrcnn_mobilenet_v3_large_320_fpn")
    assert max(map(len, text.splitlines())) <= 100
    assert all(name in text for name in names)


@pytest.mark.parametrize(
    "phases",
    [
        [range(1)],
        [range(600)],
        [range(601)],
        [range(0, 7), range(7, 5000), range(5000, 5001), range(5001, 123_456)],
        [range(10 * i, 10 * i + 10) for i in range(1000)],
    ],
)
def test_few_steps_are_drawn_and_the_ends_of_every_phase_are_among_them(phases: list[range]) -> None:
    steps, total = sample_steps(phases).tolist(), phases[-1].stop
    ends = {step for span in phases for step in (span[0], span[-1])}
    assert steps == sorted(set(steps))
    assert ends | {0, total - 1} <= set(steps) <= set(range(total))
    assert len(steps) <= max(MAX_COLUMNS, len(ends))
    assert len(steps) == total if total <= MAX_COLUMNS else len(steps) >= MAX_COLUMNS - len(ends)
    widest = max(b - a for a, b in pairwise(steps)) if total > 1 else 1
    assert widest <= max(10, 2 * total / MAX_COLUMNS)


def mesh(axes: Axes) -> QuadMesh:
    (found,) = axes.collections
    assert isinstance(found, QuadMesh)
    return found


def widths_drawn(figure: Figure, axes: Axes) -> np.ndarray:
    """Read the widths off a heat map by its legend, int64 `[layers, columns]`."""
    named = {text.get_text(): patch for text, patch in zip(
        figure.legends[0].get_texts(), figure.legends[0].get_patches(), strict=True)}  # fmt: skip
    of_colour = {to_hex(patch.get_facecolor()): 0 if t == "float" else int(t) for t, patch in named.items()}
    assert len(of_colour) == len(named)
    rgba = mesh(axes).to_rgba(np.asarray(mesh(axes).get_array()))
    return np.array([[of_colour[to_hex(colour)] for colour in row] for row in rgba])


def edges(axes: Axes) -> list[float]:
    return np.asarray(mesh(axes).get_coordinates())[0, :, 0].tolist()


def test_the_picture_shows_by_its_legend_the_widths_of_the_plan(planned: Timeline) -> None:
    figure = draw_plan(planned, "a title")
    weights, inputs, _ = figure.axes
    for axes, expected in zip((weights, inputs), planned.bits(range(60)), strict=True):
        assert edges(axes) == list(range(61))
        assert np.array_equal(widths_drawn(figure, axes), expected)
        assert axes.yaxis_inverted()
    assert figure.get_suptitle() == "a title"


def test_in_a_long_training_each_column_begins_at_the_step_that_it_shows() -> None:
    planned = timeline(Progressive((W8A8, FLOAT, W2A2), (1, 3, 3)), 5003)
    figure = draw_plan(planned, "")
    drawn, borders = widths_drawn(figure, figure.axes[0]), edges(figure.axes[0])
    assert borders == [*sample_steps(planned.phases()), 5003]
    column = np.searchsorted(borders, np.arange(5003), side="right") - 1
    assert np.array_equal(drawn[:, column], planned.bits(range(5003))[0])


def test_the_panel_of_activations_is_left_out_where_none_is_quantized() -> None:
    planned = replace(timeline(Constant(W2)), fixed={"stem": FLOAT})
    figure = draw_plan(planned, "")
    assert [axes.get_ylabel() for axes in figure.axes] == ["weights by layer", "learning rate"]
    assert np.array_equal(widths_drawn(figure, figure.axes[0]), planned.bits(range(60))[0])


@pytest.mark.parametrize("updates", [1, 60])
def test_the_line_is_the_learning_rate_of_every_update(updates: int) -> None:
    planned = timeline(Constant(W2A2), updates)
    (line,) = draw_plan(planned, "").axes[-1].lines
    assert line.get_drawstyle() == "steps-post"
    assert np.asarray(line.get_xdata()).tolist() == list(range(updates + 1))
    assert np.asarray(line.get_ydata())[:-1].tolist() == planned.rates().tolist()


def test_lines_through_all_panels_are_the_first_updates_of_phases() -> None:
    planned = timeline(Cyclic(W4A4, W2A2, 2))
    for axes in draw_plan(planned, "").axes:
        xs = [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
        borders = [x[0] for x in xs if len(x) == 2]
        assert borders == [span.start for span in planned.phases()[1:]]


def test_the_epochs_above_are_those_of_the_updates_below() -> None:
    figure = draw_plan(timeline(Constant(W2A2), 60), "")
    figure.draw_without_rendering()
    (above,) = figure.axes[0].child_axes
    assert above.get_xlim() == pytest.approx((0, 60 / 8))


def test_the_layers_are_named_in_order_as_far_as_names_fit_and_long_names_are_cut() -> None:
    long = tuple(f"head.classification_head.module_list.{i}.0.conv" for i in range(300))
    names = [text.get_text() for text in draw_plan(timeline(Constant(W2A2)), "").axes[0].get_yticklabels()]
    assert names == list(LAYERS)
    many = replace(timeline(Constant(W2A2), 2), layers=long, fixed={})
    figure = draw_plan(many, "")
    ticks, labels = figure.axes[0].get_yticks(), figure.axes[0].get_yticklabels()
    assert len(ticks) <= 25
    for i, label in zip(ticks, labels, strict=True):
        assert len(label.get_text()) <= 37
        assert label.get_text().endswith(f"list.{i}.0.conv")


def test_the_wider_the_lighter_and_float_is_the_lightest() -> None:
    palette = colours([0, 2, 3, 4, 5, 6, 8, 16])
    assert list(palette) == [2, 3, 4, 5, 6, 8, 16, 0]
    luminance = np.array(list(palette.values())) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > 0.02).all()
    assert palette[0] == FLOAT_COLOUR
    assert colours([4]).keys() == {4}


def test_a_training_without_updates_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="a training without updates has nothing to draw"):
        draw_plan(timeline(Constant(W2A2), 0), "")
