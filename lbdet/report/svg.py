"""How does a figure become a file, or a part of a page? The same figure gives the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

_DPI = 160


def save_figure(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure as "png" or "svg"; an SVG's letters are outlines, which look the same everywhere."""
    with matplotlib.rc_context(_settings("path")):
        figure.savefig(path, format=suffix, dpi=_DPI, metadata={"Date": None} if suffix == "svg" else None)


def inline_svg(figure: Figure, name: str, variables: Mapping[str, str]) -> str:
    """Return a figure as an SVG element for a page; its letters are text in the page's own font.

    Args:
        name: what its ids begin with, other than that of another figure on the page.
        variables: CSS variable by the colour that it stands for, "#rrggbb".
    """
    file = io.StringIO()
    with matplotlib.rc_context(_settings("none")):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg)
    for colour, variable in variables.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()


def _settings(letters: str) -> Any:
    """Without a salt, ids in an SVG are random."""
    return {"svg.hashsalt": "lbdet", "svg.fonttype": letters}
