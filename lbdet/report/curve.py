"""How many bits, and how many bytes, does a detector need? Its mean AP over both, a line a series.

    panel   x                           y          float
    bits    weight bits                 the mean   a horizontal line with a band of its own
    bytes   size of the model, log      the mean   the same, and a point at its size

A line is the mean over seeds and its band goes from the lowest to the highest. A series has a colour, every
line has a marker, and the width of the inputs is told by dashes: nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from lbdet.report.point_names import name_points
from lbdet.report.points import BYTES_KIND, Point, by_series

INK, RULE, PAPER = "#1c1d1f", "#dedfe1", "#ffffff"
COLOURS = (
    ("#183b98", "#369ff1"), ("#c8500a", "#ee853c"), ("#37825d", "#02e791"),
    ("#97357a", "#d987ba"), ("#593500", "#edd315"),
)  # fmt: skip
"""(on white, on black) a series: names in them can be read, and colour-blind people can tell them apart."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class CurveLine:
    """The points that a line goes through, and how it looks."""

    label: str
    points: tuple[Point, ...]
    colour: str
    marker: str
    dashes: Any
    is_float: bool = False

    @property
    def style(self) -> dict[str, Any]:
        """The same for `plot`, with a hollow marker where the inputs have few bits too."""
        face = PAPER if self.points[0].act_bits is not None else self.colour
        size = 9 if self.is_float else 6
        return {"color": self.colour, "linestyle": self.dashes, "linewidth": 1.6, "marker": self.marker,
                "markersize": size, "markerfacecolor": face, "markeredgewidth": 1.4}  # fmt: skip


def curve_lines(points: Sequence[Point]) -> list[CurveLine]:
    """Group points into lines: float first, then one a series and width of its inputs.

    Lines are in the order of their first points, the points of a line in that of their weight bits.
    """
    groups: dict[tuple[str, int | None], list[Point]] = {}
    series = by_series(points)
    for name, group in series.items():
        for point in group:
            groups.setdefault((name, point.act_bits), []).append(point)
    names = list(series)
    widths = sorted({0} | {act_bits or 0 for _, act_bits in groups})
    return _float_lines([point for point in points if point.is_float]) + [
        CurveLine(
            label=name if act_bits is None else f"{name}, {act_bits}-bit inputs",
            points=tuple(sorted(group, key=lambda point: point.weight_bits or 32)),
            colour=COLOURS[names.index(name) % len(COLOURS)][0],
            marker=_MARKERS[number % len(_MARKERS)],
            dashes=_DASHES[widths.index(act_bits or 0) % len(_DASHES)],
        )
        for number, ((name, act_bits), group) in enumerate(groups.items())
    ]


def _float_lines(points: Sequence[Point]) -> list[CurveLine]:
    return [
        CurveLine(point.series, (point,), INK, "*", _DASHES[number % len(_DASHES)], is_float=True)
        for number, point in enumerate(points)
    ]


def draw_curve(points: Sequence[Point], metric_name: str) -> Figure:
    """Draw the mean over bits and over bytes, side by side.

    Args:
        points: of one sweep or of several.
        metric_name: what the mean is of, such as "VOC 11-point mAP".

    Returns:
        A figure that belongs to no global state; save it with `lbdet.report.svg.save_figure`.
    """
    lines = curve_lines(points)
    figure = Figure((10, 4.6), layout="constrained", facecolor=PAPER)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_bits(left, lines)
    left.set_ylabel(metric_name, color=INK, parse_math=False)
    _draw_bytes(right, lines)
    if lines:
        _add_legend(figure, lines)
    name_points(right, _named(lines))
    return figure


def draw_panels(points: Sequence[Point], metric_name: str) -> list[Figure]:
    """Draw the two panels of `draw_curve` as figures of their own, without a legend."""
    lines, figures = curve_lines(points), []
    for over_bytes in (False, True):
        figure = Figure((4.9, 3.7), layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_ylabel(metric_name, color=INK, parse_math=False)
        if over_bytes:
            _draw_bytes(axes, lines)
            name_points(axes, _named(lines))
        else:
            _draw_bits(axes, lines)
        figures.append(figure)
    return figures


def draw_swatch(line: CurveLine) -> Figure:
    """Draw a piece of a line with its marker, for a legend."""
    figure = Figure((0.6, 0.2), facecolor="none")
    figure.add_artist(Line2D([0.06, 0.5, 0.94], [0.5] * 3, markevery=[1], **line.style))
    return figure


def _add_legend(figure: Figure, lines: Sequence[CurveLine]) -> None:
    """Put a legend below all; a name is shown as it is, also one with a $ or a first underscore."""
    handles = [Line2D([], [], label=str(number), **line.style) for number, line in enumerate(lines)]
    columns = min(4, len(lines))
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.2
    )
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set(text=line.label, parse_math=False, color=INK)


def _draw_bits(axes: Axes, lines: Sequence[CurveLine]) -> None:
    quantized = [point for line in lines if not line.is_float for point in line.points]
    widths = sorted({point.weight_bits for point in quantized if point.weight_bits is not None})
    float_at = (widths[-1] if widths else 0) + 1  # of points whose inputs alone have few bits
    for line in lines:
        if line.is_float:
            _draw_float(axes, line)
        else:
            _draw_line(axes, line, [point.weight_bits or float_at for point in line.points])
    names = {width: str(width) for width in widths}
    names |= {float_at: "float"} if any(point.weight_bits is None for point in quantized) else {}
    axes.set_xticks(list(names), list(names.values()))
    _finish(axes, "weight bits", lines)


def _draw_bytes(axes: Axes, lines: Sequence[CurveLine]) -> None:
    axes.set_xscale("log")
    for line in lines:
        if line.is_float:
            _draw_float(axes, line)
        sized = sorted((point for point in line.points if point.bytes), key=lambda point: point.bytes or 0)
        _draw_line(axes, line, [point.bytes or 0 for point in sized], sized)
    sizes = [point.bytes for line in lines for point in line.points if point.bytes] or [1]
    ratio = max(sizes) / min(sizes)
    room = ratio**0.08 if ratio > 1 else 1.1
    axes.set_xlim(min(sizes) / room, max(sizes) * room)
    axes.set_xticks(_size_ticks(*axes.get_xlim(), sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
    _finish(axes, f"model size ({BYTES_KIND})", lines)


def _size_ticks(low: float, high: float, sizes: Sequence[int]) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten between two sizes, or the least and the largest size."""
    ticks = [digit * 10.0**k for k in range(13) for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else sorted({float(min(sizes)), float(max(sizes))})


def bytes_text(count: float) -> str:
    """Return a size with its unit, as on the axis.

    >>> bytes_text(1_280_000), bytes_text(50_000), bytes_text(12)
    ('1.28 MB', '50 kB', '12 B')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _draw_float(axes: Axes, line: CurveLine) -> None:
    for point in line.points:
        axes.axhline(point.mean, color=line.colour, linestyle=line.dashes, linewidth=1.2, zorder=1)
        axes.axhspan(point.lowest, point.highest, color=line.colour, alpha=0.12, linewidth=0, zorder=0)


def _draw_line(
    axes: Axes, line: CurveLine, x: Sequence[float], points: Sequence[Point] | None = None
) -> None:
    """Draw a line with its band; a line of one point gets a bar, for a band has no width there."""
    points = line.points if points is None else points
    if not points:
        return
    low, high = [point.lowest for point in points], [point.highest for point in points]
    axes.plot(x, [point.mean for point in points], zorder=3, clip_on=False, **line.style)
    if len(points) > 1:
        axes.fill_between(x, low, high, color=line.colour, alpha=0.16, linewidth=0, zorder=2)
    axes.vlines(x, low, high, color=line.colour, linewidth=1.2, zorder=2)


def _finish(axes: Axes, name: str, lines: Sequence[CurveLine]) -> None:
    axes.set_facecolor("none")
    axes.set_xlabel(name, color=INK, parse_math=False)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=INK, labelcolor=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    if lines:
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 0.0))
    else:
        axes.text(0.5, 0.5, "no finished cell", transform=axes.transAxes, ha="center", color=INK)


def _named(lines: Sequence[CurveLine]) -> list[tuple[str, float, float, str]]:
    """Return the precision, size, mean and colour of every point that has a size."""
    sized = ((line.colour, point) for line in lines for point in line.points if point.bytes)
    return [(point.precision, point.bytes or 0, point.mean, colour) for colour, point in sized]
