"""The curve and the page of a sweep, from the files that it left; no model is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbdet.build import read_data
from lbdet.config import Config, load_config
from lbdet.data.records import DetectionData, spread_images
from lbdet.engine.progress import say
from lbdet.errors import UserError, short
from lbdet.files import write_atomically, write_text
from lbdet.report.curve import draw_curve
from lbdet.report.facts import widths
from lbdet.report.page import Pictures, render_page
from lbdet.report.photos import choose_photos, compare, read_detections, read_photo
from lbdet.report.points import Cell
from lbdet.report.svg import save_figure
from lbdet.report.sweep_file import Sweep, join_sweeps, read_sweep

PHOTOS, SCORE = 24, 0.5


def write_report(
    folders: Sequence[Path], photos: int = PHOTOS, score: float = SCORE, output: Path | None = None
) -> None:
    """Write the curve as PNG and SVG and the page of one sweep, or of several together.

    Args:
        folders: of the sweeps.
        photos: how many photographs of the first sweep's data are shown; a classifier has none.
        score: least score of a box that is shown, in [0, 1].
        output: where the page goes; the curve goes beside it. None = into the first folder.

    Raises:
        UserError: an option out of range, a folder without a sweep or twice, sweeps of different data or
            metrics, a file of a sweep or an image that cannot be read. Nothing is written then.
    """
    if photos < 0:
        raise UserError(f"--photos: must not be negative, got {photos}")
    if not 0 <= score <= 1:
        raise UserError(f"--score: must lie in [0, 1], got {score}")
    if output is not None and (output.suffix != ".html" or output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output: must be a .html file in a folder that exists, got {output}")
    sweeps = [read_sweep(folder) for folder in folders]
    sweep = join_sweeps(sweeps)
    _check_data(sweeps)
    first = _first_cell(sweeps[0])
    config = load_config(first.folder / "config.yaml") if first else None
    pictures = read_pictures(sweep, config, photos, score) if config and photos else None
    page = render_page(sweep, _title(sweeps, config), pictures)
    figure = draw_curve(sweep.summary, sweep.metric_name)
    page_file, curve = (output, output) if output else (folders[0] / "report.html", folders[0] / "sweep.png")
    for suffix in ("png", "svg"):
        path = curve.with_suffix(f".{suffix}")
        write_atomically(path, lambda file, suffix=suffix: save_figure(figure, file, suffix))
        say(f"{path}: written")
    write_text(page_file, page)
    say(f"{page_file}: written, {len(page.encode()) / 1e6:.1f} MB")


def read_pictures(sweep: Sweep, config: Config, count: int, score: float) -> Pictures | None:
    """Read photographs of the data set that the cells were evaluated on, and what each width finds on them.

    Returns:
        None for a classifier.

    Raises:
        UserError: the data set, an image or a detections.json cannot be read.
    """
    try:
        data = read_data(config.data, config.data.val)
    except UserError as error:
        raise UserError(f"{error}; --photos 0 leaves the photographs out") from None
    if not isinstance(data, DetectionData):
        return None
    chosen = choose_photos(spread_images(data, config.eval.max_images), count)
    photos = [read_photo(record, data.classes) for record in chosen.records]
    ids, points = [photo.id for photo in photos], widths(sweep)
    found = {
        point.key: read_detections(point.cells[0].folder / "detections.json", ids, len(data.classes), score)
        for point in points
    }
    reference = found[sweep.float_point.key] if sweep.float_point else [None] * len(photos)
    boxes = {
        key: [compare(*three) for three in zip(reference, theirs, photos, strict=True)]
        for key, theirs in found.items()
    }
    return Pictures(photos, data.classes, boxes, score)


def _check_data(sweeps: Sequence[Sweep]) -> None:
    """Refuse sweeps whose cells were not evaluated on the same images and classes."""
    cells = [cell for sweep in sweeps if (cell := _first_cell(sweep))]
    paths = [cell.folder / "config.yaml" for cell in cells]
    found = [(path, _evaluated_on(load_config(path))) for path in paths]
    for path, facts in found[1:]:
        first_path, first = found[0]
        for key, value in facts.items():
            if value != first[key]:
                raise UserError(
                    f"{path}: {key}: must be {short(first[key])} like that of {first_path}, "
                    f"got {short(value)}; sweeps of different data cannot share a report"
                )


def _evaluated_on(config: Config) -> dict[str, Any]:
    data = config.data
    return {
        "data.name": data.name, "data.root": os.path.realpath(data.root), "data.val": data.val,
        "data.classes": data.classes, "data.other_classes": data.other_classes,
        "data.score_classes": data.score_classes, "eval.max_images": config.eval.max_images,
    }  # fmt: skip


def _first_cell(sweep: Sweep) -> Cell | None:
    """Return the finished cell that others are compared with, else that of a point, if there is one."""
    point = sweep.float_point or next(iter(widths(sweep)), None)
    return point.cells[0] if point else None


def _title(sweeps: Sequence[Sweep], config: Config | None) -> str:
    if config is None or len(sweeps) > 1:
        return " and ".join(sweep.folder.resolve().name for sweep in sweeps)
    return f"{config.model.name} on {Path(config.data.root).name}"
