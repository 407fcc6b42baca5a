"""What does a visitor of a sweep see? One HTML file that needs nothing but itself, from disk and offline.

    part                made here                            made by the script, for the width of the slider
    curve               SVG in the colours of the page
    points, cells       tables                               their order
    photographs         JPEGs, each once                     boxes over them, and the same boxes in tables
    classes, layers                                          tables
    how it was made     commands and configs

Everything that comes from a file is escaped: by the template, and by the script, which only sets text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from lbdet.report.curve import COLOURS, INK, PAPER, RULE, bytes_text, curve_lines, draw_panels, draw_swatch
from lbdet.report.draw import KEPT, LOST, NEW
from lbdet.report.facts import CLASS_METRICS, width_facts, widths
from lbdet.report.photos import BoxRow, Photo
from lbdet.report.points import BYTES_KIND, Cell, Point, seeds_text
from lbdet.report.svg import inline_svg
from lbdet.report.sweep_file import Sweep
from lbdet.report.tables import cells_table, points_table, signed

STATUSES = {"K": ("kept", KEPT), "L": ("lost", LOST), "N": ("new", NEW)}
_CSS_NAMES = {INK: "ink", RULE: "rule", PAPER: "paper"} | {
    on_white: f"series-{number}" for number, (on_white, _) in enumerate(COLOURS)
}


@dataclass(frozen=True)
class Pictures:
    """Photographs, and what every width finds on them."""

    photos: Sequence[Photo]
    classes: Sequence[str]
    boxes: Mapping[tuple, list[list[BoxRow]]]
    """by the key of a point: the rows of each photograph"""
    threshold: float
    """the least score of a box that is shown"""


def render_page(sweep: Sweep, title: str, pictures: Pictures | None = None) -> str:
    """Return the page; the same input gives the same text.

    Args:
        sweep: one sweep, or several that were joined.
        title: what stands above all, such as the model and the data set.
        pictures: of the widths of the first sweep; None leaves the photographs out.

    Raises:
        UserError: a coverage.json that cannot be read, or metrics by class that are damaged.
    """
    points = widths(sweep)
    facts = width_facts(sweep, points, pictures.boxes if pictures else None)
    best_is, best = best_point(sweep.summary)
    script = _file("report.js")
    return _template().render(
        _look(script) | _curve(sweep),
        title=title,
        sweep=sweep,
        bytes_kind=BYTES_KIND,
        floats=[point for point in sweep.summary if point.is_float],
        best_is=best_is,
        best=best,
        done=sum(cell.state == "done" for cell in sweep.cells),
        unfinished=[cell for cell in sweep.cells if cell.state != "done"],
        tables={"points": points_table(sweep), "cells": cells_table(sweep)},
        facts=facts,
        class_metric=CLASS_METRICS.get(sweep.metric, ("", ""))[1],
        pictures=pictures,
        configs=[(cell, _config(cell)) for cell in sweep.cells],
        data={**facts, "start": points.index(best) if best in points else 0,
              "classes": list(pictures.classes) if pictures else []},
    )  # fmt: skip


def best_point(points: Sequence[Point]) -> tuple[str, Point | None]:
    """Return the point that a visitor looks for, and in which way it is the best.

    It is the smallest whose mean is not below the range of float's seeds; where there is none, the one of the
    highest mean. A point that a seed of failed is not reliable and never the best.
    """
    whole = [point for point in points if not point.is_float and not point.failed]
    near = [point for point in whole if point.place in ("inside", "above") and point.bytes]
    if near:
        return "Smallest not below float's seeds", min(near, key=lambda point: (point.bytes, -point.mean))
    return "Highest mean below float precision", max(whole, key=lambda point: point.mean, default=None)


def _template() -> Any:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "breakable": _breakable, "bytes_text": bytes_text, "signed": signed, "data_uri": _data_uri,
        "seeds_text": seeds_text,
    }  # fmt: skip
    return environment.from_string(_file("report.html.jinja"))


def _look(script: str) -> dict[str, Any]:
    """Return the style and the script; the page's policy allows no other script than this one."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"css": Markup(_file("report.css")), "colours": Markup(_colours()), "statuses": STATUSES,
            "script": Markup(script), "script_hash": f"sha256-{digest}"}  # fmt: skip


def _colours() -> str:
    """Return the CSS variables of the colours that pictures share with the page."""
    schemes = zip(*COLOURS, strict=True)
    light, dark = (
        "".join(f"--series-{number}:{colour};" for number, colour in enumerate(scheme)) for scheme in schemes
    )
    boxes = "".join(f"--{name}:rgb{style.colour};" for name, style in STATUSES.values())
    return f":root{{{light}{boxes}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _curve(sweep: Sweep) -> dict[str, Any]:
    """Return the two panels, and a swatch and a name for each line."""
    panels = draw_panels(sweep.summary, sweep.metric_name)
    swatches = {line.label: draw_swatch(line) for line in curve_lines(sweep.summary)}
    return {
        "panels": [Markup(inline_svg(p, f"panel{n}", _CSS_NAMES)) for n, p in enumerate(panels)],
        "legend": [
            (label, Markup(inline_svg(swatch, f"line{number}", _CSS_NAMES)))
            for number, (label, swatch) in enumerate(swatches.items())
        ],
    }


def _config(cell: Cell) -> str | None:
    path = cell.folder / "config.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _file(name: str) -> str:
    return resources.files("lbdet.report").joinpath(name).read_text(encoding="utf-8")


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _breakable(text: str) -> Markup:
    """Allow a line break behind every underscore, point and slash of a long name."""
    escaped = str(escape(text))
    for sign in "_./":
        escaped = escaped.replace(sign, f"{sign}<wbr>")
    return Markup(escaped)
