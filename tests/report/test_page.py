"""The page of a sweep: its facts are those of the files, all of them escaped, and it needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sweeps import CELLS, cell_entry, coverage_of, found_at, metrics_of, val_of, write_sweep

from lbdet.config import load_config
from lbdet.data.shapes import SHAPE_CLASSES, render_shapes
from lbdet.errors import UserError
from lbdet.metrics import diff_detections
from lbdet.report.facts import widths
from lbdet.report.page import best_point, render_page
from lbdet.report.points import Point
from lbdet.report.sweep_file import join_sweeps, read_sweep
from lbdet.report.tables import cells_table, points_table, signed
from lbdet.sweep.report import read_pictures, write_report

HOSTILE = "</script><img src=x onerror=alert(1)><b>\"'&{{ 7*7 }}$x$"


class Page(HTMLParser):
    """The elements of a page, and its text."""

    VOID = ("meta", "img", "input", "wbr", "br", "path", "use", "rect", "line", "link")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, list[str]] = {}
        self.stack: list[str] = []
        self.is_broken = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        self.is_broken = tag == "wbr"
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.is_broken = False
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        texts = self.content.setdefault(self.stack[-1] if self.stack else "", [])
        if self.is_broken:  # a place where a line may break parts no text
            texts[-1] += data
        else:
            texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "\n".join(
            t for tag, texts in self.content.items() if tag not in ("script", "style") for t in texts
        )


def data_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def page_of(folder: Path, photos: int = 6, score: float = 0.5) -> str:
    sweep = read_sweep(folder)
    done = next(cell for cell in sweep.cells if cell.state == "done")
    pictures = (
        read_pictures(sweep, load_config(done.folder / "config.yaml"), photos, score) if photos else None
    )
    return render_page(sweep, "a model on some data", pictures)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, devkit: Path) -> Path:
    failed = {"state": "failed", "error": "step 3: loss is nan", "metrics": {}, "bytes": None}
    entries = [cell_entry(*place) for place in CELLS] + [cell_entry("qat", "W3", 0, **failed)]
    return write_sweep(tmp_path_factory.mktemp("page") / "sweep", devkit, entries)


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return page_of(folder)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, devkit: Path) -> str:
    """A page all of whose names try to become markup."""
    folder = tmp_path_factory.mktemp("hostile") / "sweep"
    entries = [
        cell_entry("float", "float", 0),
        cell_entry("qat", "W4", 0) | {"series": HOSTILE, "name": HOSTILE},
    ]
    entries.append(cell_entry("qat", "W2", 0, state="failed", error=HOSTILE, command=HOSTILE))
    entries[1]["metrics"]["per_class"] = {HOSTILE: {"voc07": 0.5, "objects": 3}}
    entries[1]["metrics"]["scored_classes"] = None
    changes = {"command": HOSTILE, "metric_name": HOSTILE}
    write_sweep(folder, devkit, entries, **changes)
    run = folder / entries[1]["folder"]
    layer = coverage_of("W4")[0] | {"name": HOSTILE, "format": HOSTILE}
    (run / "coverage.json").write_text(json.dumps([layer, {"name": "b", "reason": HOSTILE}]))
    (run / "config.yaml").write_text(f"# {HOSTILE}\n" + (run / "config.yaml").read_text())
    sweep = read_sweep(folder)
    pictures = read_pictures(sweep, load_config(run / "config.yaml"), 2, 0.5)
    assert pictures is not None
    photos = [replace(photo, id=HOSTILE, objects=HOSTILE) for photo in pictures.photos]
    return render_page(sweep, HOSTILE, replace(pictures, classes=[HOSTILE] * 6, photos=photos))


def test_the_page_is_one_file_that_asks_for_nothing(text: str) -> None:
    page = Page(text)
    asked = [value for _, attributes in page.elements for key, value in attributes.items()
             if key in ("src", "href", "xlink:href", "srcset", "action", "poster")]  # fmt: skip
    assert len(asked) > 10
    assert all(str(value).startswith(("#", "data:image/jpeg;base64,")) for value in asked)
    assert not page.all("link")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    policy = page.all("meta")[1]["content"] or ""
    assert policy.startswith("default-src 'none'; img-src data:;")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_same_sweep_gives_the_same_bytes(folder: Path, text: str) -> None:
    assert page_of(folder) == text


def test_headings_are_in_order_and_every_section_and_control_has_a_name(text: str) -> None:
    page = Page(text)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        if tag == "section":
            assert attributes["aria-labelledby"] in ids
        if tag in ("select", "input"):
            assert {"for": attributes["id"]} in page.all("label")
    assert [tag for tag, _ in page.elements if tag in ("header", "nav", "main", "footer")] == [
        "header", "nav", "main", "footer",
    ]  # fmt: skip
    assert page.all("html") == [{"lang": "en"}]
    targets = [str(link["href"])[1:] for link in page.all("a")]
    assert set(targets) <= set(ids)
    assert {"curve", "points", "photographs", "classes", "layers", "unfinished", "made"} <= set(targets)


def test_counts_of_kept_lost_and_new_boxes_are_those_of_the_diff(
    folder: Path, text: str, devkit: Path
) -> None:
    data, records, total = data_of(text), val_of(devkit), np.zeros(3, int)
    sweep = read_sweep(folder)
    float_found = above(found_at(records, "float", 0))
    assert len(data["widths"]) == 7
    for width, point in zip(data["widths"], widths(sweep), strict=True):
        assert (width["precision"], width["series"]) == (point.precision, point.series)
        found = above(found_at(records, width["precision"], width["seeds"][0]))
        for rows, reference, other in zip(width["boxes"], float_found, found, strict=True):
            diff = diff_detections(reference, other)
            counts = Counter(row[0] for row in rows)
            expected = [len(diff.kept), len(diff.lost), len(diff.new)]
            assert [counts["K"], counts["L"], counts["N"]] == expected
            total += expected
    assert total.min() > 5
    last = data["widths"][-1]
    assert last["isFloat"]
    assert {row[0] for rows in last["boxes"] for row in rows} == {"K"}


def above(images: list, score: float = 0.5) -> list:
    """Return the detections that a report reads: those above the threshold, rounded as in the files."""
    rounded = [{"boxes": np.round(x["boxes"], 2), "labels": x["labels"], "scores": np.round(x["scores"], 5)}
               for x in images]  # fmt: skip
    return [{key: value[x["scores"] >= score] for key, value in x.items()} for x in rounded]


def test_the_boxes_of_several_seeds_are_those_of_the_lowest(text: str) -> None:
    width = next(w for w in data_of(text)["widths"] if (w["series"], w["precision"]) == ("qat", "W4"))
    assert width["seeds"] == [0, 1]  # in the file seed 1 comes first


def test_widths_of_a_series_go_from_narrow_to_wide_and_end_at_float(text: str) -> None:
    data = data_of(text)
    shown = {
        group["name"]: [data["widths"][k]["precision"] for k in group["widths"]] for group in data["series"]
    }
    assert shown == {"qat": ["W2", "W4A8", "W4", "W8A8", "float"], "ptq": ["W2", "W4", "float"]}


def test_photographs_are_embedded_once_each_and_small(text: str, devkit: Path) -> None:
    images = Page(text).all("img")
    assert len(images) == len(set(map(str, images))) == 6
    records = {record.id: record for record in val_of(devkit).records}
    for image in images:
        source = str(image["src"]).removeprefix("data:image/jpeg;base64,")
        assert text.count(source) == 1
        picture = Image.open(io.BytesIO(base64.b64decode(source)))
        assert picture.size == (96, 80) == (int(str(image["width"])), int(str(image["height"])))
        name = re.match(r"Photograph (\S+), with (.+)", str(image["alt"]))
        assert name is not None
        counts = Counter(SHAPE_CLASSES[label - 1] for label in records[name[1]].labels)
        assert name[2] == ", ".join(f"{count} {cls}" for cls, count in counts.items())


def test_the_tables_hold_every_point_and_every_cell(folder: Path, text: str) -> None:
    sweep, page = read_sweep(folder), Page(text)
    points, cells = points_table(sweep), cells_table(sweep)
    assert (len(points.rows), len(cells.rows)) == (len(sweep.summary), len(sweep.cells)) == (7, 10)
    assert [column.name for column in points.columns] == [
        "series", "precision", "mean", "against float", "size, MB", "times smaller", "seeds", "lowest",
        "highest", "range of float's seeds",
    ]  # fmt: skip
    w4 = next(row for row in points.rows if [e.text for e in row[:2]] == ["qat", "W4"])
    assert [entry.text for entry in w4[2:]] == [
        "0.751", "−0.001", "0.142", "8.2", "2 seeds", "0.749", "0.753", "inside float's range",
    ]  # fmt: skip
    assert [column.name for column in cells.columns] == [
        "cell", "state", "VOC 11-point mAP", "VOC area mAP", "COCO mAP", "size, MB", "bits a weight",
        "zeros, %", "squared error, %", "updates", "seed",
    ]  # fmt: skip
    failed = cells.rows[-1]
    assert [entry.text for entry in failed[:3]] == ["qat_W3_seed0", "failed", "–"]
    assert failed[2].value is None
    for row in points.rows + cells.rows:
        for entry in row:
            assert entry.text in page.content["th" if entry.is_head else "td"]


def test_widths_sort_by_their_weights_then_by_their_inputs(folder: Path) -> None:
    rows = [(str(row[1].text), row[1].value) for row in points_table(read_sweep(folder)).rows]
    in_order = list(dict.fromkeys(text for text, _ in sorted(rows, key=lambda row: row[1])))
    assert in_order == ["W2", "W4A8", "W4", "W8A8", "float"]


def test_changes_have_a_sign_unless_they_are_none() -> None:
    assert [signed(x) for x in (0.0124, -0.0124, 0.0004, -0.0004, 0.0)] == [
        "+0.012",
        "−0.012",
        "0.000",
        "0.000",
        "0.000",
    ]


def test_classes_are_those_of_the_mean_averaged_over_seeds(text: str) -> None:
    data = data_of(text)
    float_ap = [metrics_of(0.75 + 0.004 * seed)["per_class"] for seed in (0, 1)]
    here = [metrics_of(0.749 + 0.004 * seed)["per_class"] for seed in (0, 1)]
    width = next(w for w in data["widths"] if (w["series"], w["precision"]) == ("qat", "W4"))
    assert [row[0] for row in width["classes"]] == list(SHAPE_CLASSES[:4])
    for name, objects, reference, ours in width["classes"]:
        assert objects == 10 + SHAPE_CLASSES.index(name)
        assert reference == pytest.approx(np.mean([seed[name]["voc07"] for seed in float_ap]))
        assert ours == pytest.approx(np.mean([seed[name]["voc07"] for seed in here]))


@pytest.mark.parametrize(
    ("metric", "key", "name"), [("coco_map", "coco", "COCO AP"), ("voc_area_map", "voc_area", "VOC area AP")]
)
def test_classes_are_measured_in_the_metric_of_the_sweep(
    tmp_path, devkit, metric: str, key: str, name: str
) -> None:
    folder = write_sweep(tmp_path / "s", devkit, [cell_entry("qat", "W4", 0)], metric=metric)
    text = page_of(folder, photos=0)
    row = data_of(text)["widths"][0]["classes"][2]
    expected = metrics_of(0.749)["per_class"][SHAPE_CLASSES[2]][key]
    assert row == [SHAPE_CLASSES[2], 12, None, pytest.approx(expected)]
    assert name in Page(text).text


def test_layers_are_those_of_coverage_with_their_levels_once(text: str) -> None:
    data = data_of(text)
    for width in data["widths"]:
        for layer, row in zip(width["layers"], coverage_of(width["precision"]), strict=True):
            assert [
                layer[key] for key in ("name", "weights", "bits", "actBits", "zeros", "error", "reason")
            ] == [
                row[key]
                for key in ("name", "weights", "bits", "act_bits", "zeros", "squared_error", "reason")
            ]
            assert ("counts" in layer) == (row["bits"] is not None and "counts" in row)
            if "counts" in layer:
                assert layer["counts"] == row["counts"]
                assert data["levels"][layer["levels"]] == row["levels"]
    assert len(data["levels"]) == 3  # 2, 4 and 8 bits


def test_failed_cells_are_listed_with_their_error_and_command(text: str) -> None:
    page = Page(text)
    assert "step 3: loss is nan" in page.content["p"]
    assert "of 10 finished, " in page.text
    assert "python tools/sweep_bits.py --bits 2 4 <all>" in page.content["pre"]
    assert "python tools/train_det.py --set seed=1" in page.content["pre"]
    assert any("name: ssd_tiny" in config for config in page.content["pre"])


def point(series: str, mean: float, size: int, place: str | None, **more: Any) -> Point:
    width = "float" if series == "float" else "W4"
    facts: dict[str, Any] = {"seeds": (0, 1), "planned": 2, "bytes": size, "place": place} | more
    return Point(series=series, precision=width, mean=mean, lowest=mean, highest=mean, **facts)


def test_the_best_point_is_the_smallest_that_is_not_below_float_and_has_not_failed() -> None:
    float_point, small, better, above, below, shaky = points = (
        point("float", 0.8, 9, None), point("a", 0.78, 5, "inside"), point("b", 0.79, 5, "inside"),
        point("c", 0.9, 4, "above"), point("d", 0.6, 1, "below"), point("e", 0.9, 2, "above", failed=1),
    )  # fmt: skip
    assert best_point(points) == ("Smallest not below float's seeds", above)
    assert best_point([float_point, small, better, below, shaky])[1] == better
    no_spread = point("f", 0.65, 2, None)
    assert best_point([float_point, below, no_spread]) == ("Highest mean below float precision", no_spread)
    assert best_point([float_point, shaky])[1] is None


def test_the_head_says_of_how_many_seeds_the_best_point_is(tmp_path: Path, devkit: Path) -> None:
    entries = [cell_entry("float", "float", 0), cell_entry("float", "float", 1)]
    entries.append(cell_entry("qat", "W4", 0, metrics=metrics_of(0.753)))
    text = page_of(write_sweep(tmp_path / "s", devkit, entries), photos=0)
    head = "".join(Page(text).content["dd"])
    assert "qat: 0.753 (+0.001), 142 kB, 1 of 2 seeds" in head
    assert "Smallest not below float's seeds" in Page(text).content["dt"]
    best = data_of(text)["widths"][0]
    assert (best["seedsText"], best["placeText"]) == ("1 of 2 seeds", "inside float's range")


def test_a_seed_that_failed_is_told_beside_the_others(tmp_path: Path, devkit: Path) -> None:
    entries = [cell_entry("float", "float", seed) for seed in (0, 1, 2)]
    entries += [cell_entry("qat", "W4", seed) for seed in (0, 1)]
    entries.append(cell_entry("qat", "W4", 2, state="failed", error="loss is nan", metrics=None))
    text = page_of(write_sweep(tmp_path / "s", devkit, entries), photos=0)
    assert "2 of 3 seeds, 1 failed" in Page(text).content["td"]
    assert data_of(text)["widths"][0]["seedsText"] == "2 of 3 seeds, 1 failed"


def test_widths_of_one_series_are_on_one_slider_whatever_their_ratios(tmp_path: Path, devkit: Path) -> None:
    entries = [cell_entry("qat semi", "W4", 0, ratio=0.75), cell_entry("qat semi", "W2", 0, ratio=0.6)]
    data = data_of(page_of(write_sweep(tmp_path / "s", devkit, entries), photos=0))
    assert [(group["name"], len(group["widths"])) for group in data["series"]] == [("qat semi", 2)]
    assert [width["ratio"] for width in data["widths"]] == [0.6, 0.75]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"per_class": {"disc": {"voc07": "x"}}}, "per_class.disc.voc07: input should be a valid number"),
        ({"per_class": {"disc": "x"}}, "per_class.disc: input should be a valid dictionary, got 'x'"),
        ({"scored_classes": 3}, "scored_classes: input should be a valid list, got 3"),
    ],
)
def test_damaged_metrics_by_class_are_told_with_their_cell(
    tmp_path: Path, devkit: Path, damage: dict, message: str
) -> None:
    entry = cell_entry("qat", "W4", 0, metrics=metrics_of(0.7) | damage)
    folder = write_sweep(tmp_path / "s", devkit, [entry])
    with pytest.raises(UserError) as error:
        page_of(folder, photos=0)
    assert f"sweep.json: qat_W4_seed0: metrics: {message}" in str(error.value)


def test_the_slider_starts_at_the_best_point(folder: Path, text: str) -> None:
    data = data_of(text)
    assert data["widths"][data["start"]]["precision"] == "W4"
    assert data["widths"][data["start"]]["series"] == "qat"


def test_names_from_files_never_become_markup(hostile: str) -> None:
    page = Page(hostile)
    assert len(page.all("script")) == 2
    assert len(page.all("img")) == 2
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert all("onerror" not in attributes for attributes in page.all("b"))
    for tag in ("title", "option", "th", "pre", "p", "text"):  # where the series, the error, ... stand
        assert HOSTILE.replace("\n", "") in "\n".join(page.content[tag]), tag
    assert "".join(page.content["h1"]) == HOSTILE
    assert str(page.all("img")[0]["alt"]) == f"Photograph {HOSTILE}, with {HOSTILE}"
    data = data_of(hostile)
    assert (
        data["classes"][0] == data["series"][0]["name"] == data["widths"][0]["layers"][0]["name"] == HOSTILE
    )


def test_without_photographs_the_page_has_no_such_part_and_reads_no_detections(folder: Path) -> None:
    text = page_of(folder, photos=0)
    page = Page(text)
    assert not page.all("img")
    assert "photographs" not in [attributes.get("id") for _, attributes in page.elements]
    assert {width["boxes"] for width in data_of(text)["widths"]} == {None}


def test_a_sweep_of_failures_alone_gives_a_page_that_tells_them(tmp_path: Path, devkit: Path) -> None:
    entries = [cell_entry("qat", "W4", 0, state="missing", error=None, metrics=None, command=None)]
    folder = write_sweep(tmp_path / "s", devkit, entries)
    page = Page(render_page(read_sweep(folder), "nothing"))
    assert "qat_W4_seed0" in [row[0].text for row in cells_table(read_sweep(folder)).rows]
    ids = [attributes.get("id") for _, attributes in page.elements]
    assert "unfinished" in ids
    assert "width" not in ids
    assert "no finished cell" in page.text


def test_a_classifiers_sweep_has_no_photographs_and_no_classes(tmp_path: Path, devkit: Path) -> None:
    entries = [cell_entry("float", "float", 0, metrics={"top1": 0.9, "top5": 0.99, "images": 10}),
               cell_entry("qat", "W2", 0, metrics={"top1": 0.8, "top5": 0.95, "images": 10})]  # fmt: skip
    for entry in entries:
        entry["metrics"]["voc07_map"] = entry["metrics"]["top1"]
    folder = write_sweep(tmp_path / "s", devkit, entries, metric="top1", metric_name="top-1")
    text = page_of(folder, photos=0)
    ids = [attributes.get("id") for _, attributes in Page(text).elements]
    assert "layers" in ids
    assert "classes" not in ids
    assert "top-5" in Page(text).text


def test_without_a_float_cell_boxes_have_no_status(tmp_path: Path, devkit: Path) -> None:
    folder = write_sweep(tmp_path / "s", devkit, [cell_entry("qat", "W4", 0), cell_entry("qat", "W2", 0)])
    data = data_of(page_of(folder))
    assert {row[0] for width in data["widths"] for rows in width["boxes"] for row in rows} == {"-"}
    assert [group["name"] for group in data["series"]] == ["qat"]


def test_of_several_sweeps_the_first_has_the_photographs_and_all_are_in_the_tables(
    folder: Path, tmp_path: Path, devkit: Path
) -> None:
    other = write_sweep(tmp_path / "other", devkit, [cell_entry("qat", "W3", 0)])
    sweep = join_sweeps([read_sweep(folder), read_sweep(other)])
    pictures = read_pictures(sweep, load_config(sweep.cells[0].folder / "config.yaml"), 3, 0.5)
    text = render_page(sweep, "two", pictures)
    assert {width["precision"] for width in data_of(text)["widths"]} == {"W2", "W4", "W4A8", "W8A8", "float"}
    assert [row[0].text for row in points_table(sweep).rows][-1] == "other: qat"
    assert "other: qat" in Page(text).text
    names = [column.name for column in points_table(sweep).columns]
    times = [row[names.index("times smaller")].text for row in points_table(sweep).rows]
    assert times[0] == "1.0"
    assert times[-1] == "–"  # its own sweep has no float


def test_a_coverage_that_cannot_be_read_is_told_and_one_that_is_missing_is_left_out(
    tmp_path: Path, devkit: Path
) -> None:
    folder = write_sweep(tmp_path / "s", devkit, [cell_entry("qat", "W4", 0)])
    file = folder / "cells/qat_W4_seed0/coverage.json"
    for text, message in (
        ("[", "must be JSON"),
        ('{"a": 1}', "top level: input should be a valid list"),
        ("[1]", "0: input should be a dictionary"),
        ('[{"bits": 4}]', "0.name: field required"),
        ('[{"name": "a", "levels": ["a"], "counts": [1]}]', "0.levels.*: input should be a valid number"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"coverage.json: {message}"):
            page_of(folder, photos=0)
    file.unlink()
    text = page_of(folder, photos=0)
    assert data_of(text)["widths"][0]["layers"] is None
    assert "layers" not in [attributes.get("id") for _, attributes in Page(text).elements]


@pytest.mark.slow
def test_twelve_cells_of_24_photographs_stay_under_ten_megabytes_and_thirty_seconds(tmp_path: Path) -> None:
    devkit = tmp_path / "devkit"
    render_shapes(devkit, train=1, val=24, size=(500, 375))
    places = [("float", "float", 0), *(("qat", w, s) for w in ("W2", "W3", "W4") for s in (0, 1, 2))]
    entries = [cell_entry(*place) for place in [*places, ("qat", "W8A8", 0), ("ptq", "W4", 0)]]
    folder = write_sweep(tmp_path / "sweep", devkit, entries)
    other = [{"image_id": f"x{k}", "category_id": 1, "bbox": [1.25, 2.5, 30.75, 40.25], "score": 0.01234}
             for k in range(100_000)]  # fmt: skip
    for entry in entries:  # as many as a detector without a threshold finds on some hundred images
        file = folder / entry["folder"] / "detections.json"
        file.write_text(json.dumps(json.loads(file.read_text()) + other))
        (file.parent / "coverage.json").write_text(json.dumps(coverage_of(entry["precision"], layers=110)))
    start = time.process_time()
    write_report([folder])
    assert time.process_time() - start < 30
    assert (folder / "report.html").stat().st_size < 10e6
    assert len(Page((folder / "report.html").read_text()).all("img")) == 24
