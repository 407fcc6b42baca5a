"""The curve of a sweep: it goes through the points, tells everything twice, and covers nothing."""

from __future__ import annotations

import re
import warnings
from itertools import combinations, pairwise
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from lbdet.precision import Precision
from lbdet.report.curve import (
    COLOURS,
    INK,
    PAPER,
    bytes_text,
    curve_lines,
    draw_curve,
    draw_panels,
    draw_swatch,
)
from lbdet.report.points import BYTES_KIND, Point
from lbdet.report.svg import inline_svg, save_figure

METRIC = "VOC 11-point mAP"
SIZES = {
    "float": 10_010_000,
    "W2": 810_000,
    "W3": 1_050_000,
    "W4": 1_278_000,
    "W6": 1_700_000,
    "W8": 2_500_000,
}
DARK_PAPER, DARK_INK = "#141517", "#e7e7e4"
BLINDNESS = {
    "none": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "protan": (0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998),
    "deutan": (0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.011820, 0.042940, 0.968881),
    "tritan": (1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.303900),
}
"""Machado, Oliveira and Fernandes, 2009, at full severity: 3 x 3 matrices on linear RGB."""


def point(series: str, precision: str, mean: float, spread: float = 0.01, **more: Any) -> Point:
    width = Precision.parse(precision)
    size = SIZES[re.sub("A.*", "", precision) or "float"]
    facts = {"bytes": size, "lowest": mean - spread, "highest": mean + spread} | more
    return Point(series=series, precision=precision, weight_bits=width.weight_bits, act_bits=width.act_bits,
                 mean=mean, **facts)  # fmt: skip


POINTS = [
    point("float", "float", 0.75),
    point("qat", "W4", 0.71), point("qat", "W2", 0.52), point("qat", "W3", 0.66), point("qat", "W6", 0.73),
    point("qat", "W4A8", 0.715), point("qat", "W8A8", 0.748), point("qat", "W4A4", 0.55),
    point("ptq", "W2", 0.0, 0), point("ptq", "W3", 0.002, 0), point("ptq", "W4", 0.054, 0),
    point("ptq", "W8", 0.73, 0),
]  # fmt: skip


def panels(points: list[Point]) -> tuple[Axes, Axes]:
    left, right = draw_curve(points, METRIC).axes
    return left, right


def drawn(axes: Axes) -> dict[str, Any]:
    """Return the drawn lines by marker; float's line across has none."""
    return {str(line.get_marker()): line for line in axes.lines if line.get_marker() != "None"}


def test_a_line_is_a_series_at_one_width_of_inputs_and_goes_from_narrow_to_wide() -> None:
    lines = {line.label: [p.precision for p in line.points] for line in curve_lines(POINTS)}
    assert lines == {
        "float": ["float"],
        "qat": ["W2", "W3", "W4", "W6"],
        "qat, 8-bit inputs": ["W4A8", "W8A8"],
        "qat, 4-bit inputs": ["W4A4"],
        "ptq": ["W2", "W3", "W4", "W8"],
    }


def test_widths_of_one_series_are_one_line_whatever_their_ratios() -> None:
    points = [point("semi", "W4", 0.7, ratio=0.75), point("semi", "W3", 0.6, ratio=0.6)]
    (line,) = curve_lines(points)
    assert (line.label, [p.ratio for p in line.points]) == ("semi", [0.6, 0.75])


def test_lines_go_through_their_points_over_bits_and_over_bytes() -> None:
    left, right = panels(POINTS)
    for line in curve_lines(POINTS):
        means = [p.mean for p in line.points]
        x, y = drawn(right)[line.marker].get_data()
        assert list(zip(x, y, strict=True)) == [(p.bytes, p.mean) for p in line.points]
        if not line.is_float:
            x, y = drawn(left)[line.marker].get_data()
            assert (list(x), list(y)) == ([p.weight_bits for p in line.points], means)
    assert right.get_xscale() == "log"
    assert [label.get_text() for label in left.get_xticklabels()] == ["2", "3", "4", "6", "8"]


@pytest.mark.parametrize("side", [0, 1])
def test_a_band_goes_from_the_lowest_to_the_highest(side: int) -> None:
    axes = panels(POINTS)[side]
    bands = [c for c in axes.collections if isinstance(c, PolyCollection)]
    lines = [line for line in curve_lines(POINTS) if len(line.points) > 1]
    assert len(bands) == len(lines) == 3
    for band, line in zip(bands, lines, strict=True):
        corners = np.asarray(band.get_paths()[0].vertices)
        for p in line.points:
            x = p.bytes if side else p.weight_bits
            heights = {round(y, 6) for at, y in corners.tolist() if at == x}
            assert heights == {round(p.lowest, 6), round(p.highest, 6)}
    span = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (span.y0, span.y1) == pytest.approx((0.74, 0.76))
    across = [line for line in axes.lines if line.get_marker() == "None"]
    assert [list(line.get_ydata()) for line in across] == [[0.75, 0.75]]


def test_nothing_is_told_by_colour_alone() -> None:
    lines = curve_lines(POINTS)
    assert len({line.marker for line in lines}) == len(lines)
    qat = [line for line in lines if line.label.startswith("qat")]
    assert len({line.colour for line in qat}) == 1
    assert len({str(line.dashes) for line in qat}) == 3
    assert [line.style["markerfacecolor"] == PAPER for line in qat] == [False, True, True]
    assert len({line.colour for line in lines}) == 3


def linear(colour: str) -> np.ndarray:
    value = np.array(to_rgb(colour))
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(colour) @ (0.2126, 0.7152, 0.0722)) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ np.clip(rgb, 0, 1) / (0.9505, 1, 1.089)
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(("scheme", "ink", "ground"), [(0, INK, PAPER), (1, DARK_INK, DARK_PAPER)])
def test_colours_can_be_read_and_told_apart_by_colour_blind_people(
    scheme: int, ink: str, ground: str
) -> None:
    colours = [ink, *(pair[scheme] for pair in COLOURS)]
    assert min(contrast(colour, ground) for colour in colours) > 4.5
    for blindness in BLINDNESS.values():
        seen = [lab(np.reshape(blindness, (3, 3)) @ linear(colour)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 20


DENSE = [point("float", "float", 0.1)]
DENSE += [
    point(f"s{k}", "W4A8", 0.5 + 0.04 * (k // 3), bytes=2_000_000 + 200_000 * (k % 3)) for k in range(9)
]


@pytest.mark.parametrize("points", [POINTS, DENSE], ids=["usual", "dense"])
def test_names_of_points_cover_no_line_no_marker_and_no_other_name(points: list[Point]) -> None:
    figure = draw_curve(points, METRIC)
    figure.canvas.draw()
    right = figure.axes[1]
    boxes = [text.get_window_extent() for text in right.texts]
    assert len(boxes) > 0.3 * len(points)
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    for line in right.lines:
        places = line.get_transform().transform(np.array(line.get_xydata(), dtype=float))
        for start, end in pairwise(places):
            along = start + np.linspace(0, 1, 300)[:, None] * (end - start)
            assert not any(box.count_contains(along) for box in boxes)
    for text, box in zip(right.texts, boxes, strict=True):
        assert right.bbox.count_contains(box.corners()) == 4
        assert to_hex(text.get_color()) in {line.colour for line in curve_lines(points)}


def test_the_legend_names_every_line_and_lies_over_no_data() -> None:
    figure = draw_curve(POINTS, METRIC)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [line.label for line in curve_lines(POINTS)]
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    left, right = figure.axes
    assert left.get_ylabel() == METRIC
    assert (left.get_xlabel(), right.get_xlabel()) == ("weight bits", f"model size ({BYTES_KIND})")


@pytest.mark.parametrize(
    "points",
    [
        [],
        [point("float", "float", 0.7)],
        [point("qat", "W4", 0.7, bytes=None)],
        [point("_a$\\q$", "W4", 0.7), point("A only", "A8", 0.6, bytes=9)],
        [point(f"series {k}", "W4", 0.5 + 0.01 * k) for k in range(12)],
    ],
)
def test_odd_sweeps_are_drawn_without_a_warning(points: list[Point]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_curve(points, "a $\\q$")
        figure.canvas.draw()
        for panel in draw_panels(points, "a $\\q$"):
            panel.canvas.draw()
    shown = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert shown == [line.label for line in curve_lines(points)]
    assert bool(shown) != any("no finished cell" in text.get_text() for text in figure.axes[0].texts)


def test_inputs_of_few_bits_with_float_weights_have_a_place_of_their_own() -> None:
    left, _ = panels([point("qat", "W4", 0.7), point("qat", "A8", 0.74, bytes=10_000_000)])
    assert [label.get_text() for label in left.get_xticklabels()] == ["4", "float"]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((810_000, 10_010_000), ["1 MB", "2 MB", "5 MB", "10 MB"]),
        ((1_270_000, 1_300_000), ["1.27 MB", "1.3 MB"]),
        ((1_270_000, 1_270_000), ["1.27 MB"]),
    ],
)
def test_the_axis_of_bytes_has_round_sizes_or_those_of_the_points(sizes: tuple, expected: list[str]) -> None:
    points = [point("qat", f"W{4 - 2 * k}", 0.7, bytes=size) for k, size in enumerate(sizes)]
    _, right = panels(points)
    right.figure.canvas.draw()
    assert [label.get_text() for label in right.get_xticklabels()] == expected


def test_sizes_have_units() -> None:
    assert [bytes_text(size) for size in (999, 1e3, 1_278_000, 2.5e9)] == [
        "999 B",
        "1 kB",
        "1.28 MB",
        "2.5 GB",
    ]


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_same_points_give_the_same_bytes_and_global_settings_stay(
    tmp_path, suffix: str, start: bytes
) -> None:
    before = dict(matplotlib.rcParams)
    for name in ("one", "two"):
        save_figure(draw_curve(POINTS, METRIC), tmp_path / name, suffix)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").read_bytes().startswith(start)
    assert dict(matplotlib.rcParams) == before


def figures() -> list[Figure]:
    return [*draw_panels(POINTS, METRIC), *(draw_swatch(line) for line in curve_lines(POINTS))]


def test_a_figure_in_a_page_takes_its_colours_and_its_font_and_has_its_own_ids() -> None:
    names = {INK: "ink", PAPER: "paper", "#dedfe1": "rule"} | {light: "some" for light, _ in COLOURS}
    parts = [inline_svg(figure, f"f{k}", names) for k, figure in enumerate(figures())]
    assert parts == [inline_svg(figure, f"f{k}", names) for k, figure in enumerate(figures())]
    assert all(part.startswith("<svg viewBox=") and part.endswith("</svg>") for part in parts)
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r"url\(#\S+|href=\S+", "", "".join(parts)))
    assert "var(--ink)" in parts[0]
    assert "<text" in parts[0]
    assert METRIC in parts[0]
    assert not any(tag in "".join(parts) for tag in ("<style", "<metadata", "<?xml", "<!DOCTYPE"))
    ids = [name for part in parts for name in re.findall(r'\bid="([^"]+)"', part)]
    assert len(ids) == len(set(ids)) > 20
    used = {name for part in parts for name in re.findall(r'(?:href="#|url\(#)([^")]+)', part)}
    assert used <= set(ids)
