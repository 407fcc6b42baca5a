"""The picture of a sensitivity measurement: what each unit loses at each width, and what it saves."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

MARKERS = "osD^vPX*"


def draw_sensitivity(records: Sequence[tuple[str, str, float, int]], metric: str) -> Figure:
    """Draw a row a unit, in the model's order.

    Args:
        records: unit, precision, what the metric lost, and bytes saved.
        metric: its name.
    """
    units = list(dict.fromkeys(unit for unit, *_ in records))
    precisions = list(dict.fromkeys(precision for _, precision, *_ in records))
    figure = Figure(figsize=(10, max(3.0, 0.17 * len(units) + 1.4)), layout="constrained")
    lost, saved = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for i, precision in enumerate(precisions):
        rows = [(units.index(u), x, b) for u, p, x, b in records if p == precision]
        colour = f"C{(0, 1, 2, 4, 7, 8)[i % 6]}"
        style = {"marker": MARKERS[i % len(MARKERS)], "s": 22, "label": precision, "color": colour}
        lost.scatter([x for _, x, _ in rows], [row for row, *_ in rows], **style, zorder=3)
        saved.scatter([b for *_, b in rows], [row for row, *_ in rows], **style, zorder=3)
    lost.axvline(0, color="0.5", linewidth=0.8)
    lost.set_yticks(range(len(units)), [_short(unit) for unit in units], fontsize=7)
    lost.set_ylim(len(units) - 0.5, -0.5)
    lost.set_xlabel(f"{metric} lost")
    saved.set_xlabel("saved (kB)")
    saved.set_xscale("log")
    saved.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}"))
    for axes in (lost, saved):
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.legend(*lost.get_legend_handles_labels(), loc="outside upper right", ncols=8, frameon=False)
    return figure


def _short(name: str, length: int = 40) -> str:
    return name if len(name) <= length else f"{name[: length // 2 - 1]}...{name[-length // 2 + 2 :]}"
