"""How does a training's precision look, before it is trained? Layers over updates, coloured by their width.

    panel          x         y
    weights        updates   layers, in the model's order     narrow widths dark, wide ones light,
    activations    updates   layers                           float the lightest: readable in grey too
    learning rate  updates   its value

Vertical lines are the first updates of phases. Colour-blind people can tell the colours (viridis) apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lbdet.report.timeline import Timeline

MAX_COLUMNS = 600
FLOAT_COLOUR = (0.95, 0.95, 0.95)
_RATE_INCHES = 1.5
_LINE, _BORDER = "#440154", "#d55e00"
_INCHES_A_NAME, _NAME_LENGTH = 0.13, 36


def draw_plan(timeline: Timeline, title: str) -> Figure:
    """Draw the widths of all layers and the learning rate over the updates of a training.

    Args:
        timeline: of at least one update.
        title: what stands above all.

    Returns:
        A figure that belongs to no global state; save it with `savefig`. The panel of activations is left out
        where none is ever quantized.

    Raises:
        ValueError: a training without updates.
    """
    if not timeline.total:
        raise ValueError("a training without updates has nothing to draw")
    steps = sample_steps(timeline.phases())
    weights, inputs = timeline.bits(steps.tolist())
    panels = {"weights": weights} | ({"activations": inputs} if inputs.any() else {})
    height = float(np.clip(_INCHES_A_NAME * len(timeline.layers), 1.4, 3))
    figure = Figure((10, height * len(panels) + _RATE_INCHES + 1.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(
        len(panels) + 1, 1, sharex=True, height_ratios=[height] * len(panels) + [_RATE_INCHES]
    )
    widths = np.unique(np.concatenate(list(panels.values()))).tolist()
    for panel, (name, bits) in zip(axes, panels.items(), strict=False):
        _draw_bits(panel, bits, [*steps, timeline.total], widths)
        _name_layers(panel, timeline.layers, round(height / _INCHES_A_NAME))
        panel.set_ylabel(f"{name} by layer", fontsize=9)
    _draw_rates(axes[-1], timeline.rates())
    for panel in axes:
        for span in timeline.phases()[1:]:
            panel.axvline(span.start, color=_BORDER, linewidth=0.8)
    per_epoch = 1 / timeline.epochs(1)
    axes[0].secondary_xaxis("top", (lambda x: x / per_epoch, lambda x: x * per_epoch)).set_xlabel("epoch")
    figure.legend(handles=_legend(widths), loc="outside right upper", title="bits", frameon=False)
    return figure


def sample_steps(phases: Sequence[range], limit: int = MAX_COLUMNS) -> np.ndarray:
    """Choose the steps that are drawn: all, or about `limit` at equal distances and the ends of each phase.

    Returns:
        int64 `[S]`, rising; S is at most `limit`, or twice the phases where that is more.
    """
    total, ends = phases[-1].stop, {step for span in phases for step in (span[0], span[-1])}
    if total <= limit:
        return np.arange(total)
    even = np.linspace(0, total - 1, max(limit - len(ends), 0))
    return np.union1d(even.round().astype(np.int64), sorted(ends))


def colours(widths: Sequence[int]) -> dict[int, tuple[float, float, float]]:
    """Return an RGB colour for each of some widths in bits, 0 = float: from narrow to wide and light."""
    narrow_first = sorted(width for width in widths if width)
    shades = colormaps["viridis"](np.linspace(0, 0.8, len(narrow_first)))[:, :3].tolist()
    palette = {width: (r, g, b) for width, (r, g, b) in zip(narrow_first, shades, strict=True)}
    return palette | ({0: FLOAT_COLOUR} if 0 in widths else {})


def _draw_bits(axes: Axes, bits: np.ndarray, edges: Sequence[int], widths: Sequence[int]) -> None:
    """Draw a heat map whose column k goes from `edges[k]` to the next; its values index `widths`, sorted."""
    palette = colours(widths)
    axes.pcolormesh(
        edges, np.arange(len(bits) + 1) - 0.5, np.searchsorted(widths, bits),
        cmap=ListedColormap([palette[width] for width in widths]),
        vmin=-0.5, vmax=len(widths) - 0.5, rasterized=True,
    )  # fmt: skip
    axes.invert_yaxis()


def _name_layers(axes: Axes, layers: Sequence[str], fit: int) -> None:
    """Name the layers where all of them fit, else every second, third, ..."""
    shown = range(0, len(layers), -(-len(layers) // fit))
    axes.set_yticks(shown, [_shortened(layers[i]) for i in shown], fontsize=7)


def _shortened(name: str) -> str:
    """Cut the middle of a long name."""
    half = _NAME_LENGTH // 2
    return name if len(name) <= _NAME_LENGTH else f"{name[:half].rstrip('.')}…{name[-half:].lstrip('.')}"


def _draw_rates(axes: Axes, rates: np.ndarray) -> None:
    axes.step(np.arange(len(rates) + 1), [*rates, rates[-1]], where="post", color=_LINE, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, len(rates))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel="update", ylabel="learning rate")


def _legend(widths: Sequence[int]) -> list[Patch]:
    return [
        Patch(facecolor=colour, edgecolor="0.5", label=str(width or "float"))
        for width, colour in colours(widths).items()
    ]
