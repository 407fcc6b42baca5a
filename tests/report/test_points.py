"""What a sweep found: means over seeds, their ranges, and where they lie against float's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lbdet.precision import Precision
from lbdet.report.points import Cell, Point, by_series, place_text, seeds_text, summarize


def cell(series: str, precision: str, seed: int, value: float | None, **other: Any) -> Cell:
    width = Precision.parse(precision)
    facts: dict[str, Any] = {"state": "done", "metrics": {"voc07_map": value}} | other
    name = f"{series}_{precision}_seed{seed}"
    return Cell(name=name, folder=Path(name), series=series, precision=precision, seed=seed,
                weight_bits=width.weight_bits, act_bits=width.act_bits, **facts)  # fmt: skip


def cells(series: str, precision: str, values: tuple[float, ...], **other: Any) -> list[Cell]:
    return [cell(series, precision, seed, value, **other) for seed, value in enumerate(values)]


def point(found: list[Cell], series: str = "qat") -> Point:
    return next(p for p in summarize(found, "voc07_map") if p.series == series)


def test_a_point_is_the_mean_over_seeds_with_its_range() -> None:
    found = point([cell("qat", "W4", seed, value) for seed, value in ((2, 0.7), (0, 0.74), (1, 0.72))])
    assert found.seeds == (0, 1, 2)
    assert [c.seed for c in found.cells] == [0, 1, 2]
    assert (found.mean, found.lowest, found.highest) == (pytest.approx(0.72), 0.7, 0.74)
    assert (found.against_float, found.place, place_text(found)) == (None, None, "")


@pytest.mark.parametrize(
    ("values", "floats", "place", "text"),
    [
        ((0.72, 0.74), (0.75, 0.73), "inside", "inside float's range"),
        ((0.73,), (0.73, 0.75), "inside", "inside float's range"),
        ((0.72, 0.73), (0.75, 0.73), "below", "below float's range"),
        ((0.55, 0.80), (0.75, 0.751), "below", "below float's range"),  # wide of itself, not near float
        ((0.76, 0.78), (0.75, 0.73), "above", "above float's range"),
        ((0.72, 0.74), (0.73,), None, "no spread: float has one seed"),
    ],
)
def test_a_mean_lies_below_inside_or_above_the_range_of_floats_seeds(values, floats, place, text) -> None:
    found = point(cells("qat", "W4", values) + cells("float", "float", floats))
    assert (found.place, place_text(found)) == (place, text)
    assert found.against_float == pytest.approx(sum(values) / len(values) - sum(floats) / len(floats))


def test_each_of_several_sweeps_is_compared_with_its_own_float() -> None:
    one = cells("a: float", "float", (0.7, 0.71)) + cells("a: qat", "W4", (0.7,))
    two = cells("b: float", "float", (0.8, 0.81), sweep=1) + cells("b: qat", "W4", (0.7,), sweep=1)
    found = {p.series: p.place for p in summarize(one + two, "voc07_map")}
    assert found == {"a: float": None, "a: qat": "inside", "b: float": None, "b: qat": "below"}


@pytest.mark.parametrize(
    ("states", "text"),
    [
        (("done",), "1 of 3 seeds"),
        (("done", "done", "done"), "3 seeds"),
        (("done", "failed", "done"), "2 of 3 seeds, 1 failed"),
        (("done", "missing", "done"), "2 of 3 seeds"),
    ],
)
def test_seeds_that_are_not_in_the_mean_are_told(states: tuple[str, ...], text: str) -> None:
    found = [cell("qat", "W4", seed, 0.7, state=state) for seed, state in enumerate(states)]
    assert seeds_text(point(found + cells("float", "float", (0.7, 0.8, 0.9)))) == text
    assert seeds_text(point(found[:1])) == "one seed"


def test_of_several_ratios_the_best_mean_stands_for_its_width() -> None:
    values = {0.6: (0.5, 0.6), 0.75: (0.7, 0.5), 0.9: (0.1, 0.2)}
    found = point(
        [c for ratio, v in values.items() for c in cells("qat semi", "W2", v, ratio=ratio)], "qat semi"
    )
    assert (found.ratio, found.mean) == (0.75, pytest.approx(0.6))


def test_the_float_point_comes_first_and_widths_fall() -> None:
    found = [cell("qat", f"W{bits}", 0, 0.5) for bits in (2, 5, 3)] + [cell("float", "float", 0, 0.6)]
    assert [p.precision for p in summarize(found, "voc07_map")] == ["float", "W5", "W3", "W2"]
    assert {name: len(group) for name, group in by_series(summarize(found, "voc07_map")).items()} == {
        "qat": 3
    }


@pytest.mark.parametrize("value", [None, "0.7", [0.7]])
def test_a_cell_without_a_number_is_in_no_point(value: Any) -> None:
    assert summarize([cell("qat", "W2", 0, value)], "voc07_map") == ()
    assert summarize([cell("qat", "W4", 1, 0.9, state="failed")], "voc07_map") == ()
