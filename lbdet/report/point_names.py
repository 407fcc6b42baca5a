"""Where does a point's name go? Beside its marker, where it covers nothing; else it is left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

_PLACES = ((10, 0), (-10, 0), (0, 8), (0, -8), (7, 6), (7, -6), (-7, 6), (-7, -6))
"""Where a name is tried, in points above and right of its marker."""
_SIDES = {-1: "right", 0: "center", 1: "left"}
_SAMPLES = 60  # of a piece of a line


def name_points(axes: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Write names beside points where there is room: over no line, marker, border or other name.

    Call it last: later changes of the axes' limits would move the points away from what was looked at.

    Args:
        points: (name, x, y, colour), the most important first.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # only now is it known where the axes are
    obstacles = _obstacles(axes, [(x, y) for _, x, y, _ in points], figure.dpi)
    taken: list[Bbox] = []
    for name, x, y, colour in points:
        for up, right in _PLACES:
            text = axes.annotate(
                name, (x, y), (right, up), textcoords="offset points", fontsize=7.5, color=colour,
                ha=_SIDES[np.sign(right)], va="center", in_layout=False, parse_math=False,
            )  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.count_contains(box.corners()) == 4
            if inside and not box.count_contains(obstacles) and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def _obstacles(axes: Axes, points: Sequence[tuple[float, float]], dpi: float) -> np.ndarray:
    """Return places in pixels, `[N, 2]`, that no name may cover: along all lines and on rims of markers."""
    paths = [line.get_path().transformed(line.get_transform()) for line in axes.lines]
    along = [path.interpolated(_SAMPLES).vertices for path in paths]
    rim = dpi / 72 * 4.5 * np.array(list(product((-1, 0, 1), repeat=2)))
    centres = axes.transData.transform(points) if points else np.zeros((0, 2))
    return np.concatenate([*along, (centres[:, None] + rim).reshape(-1, 2)])
