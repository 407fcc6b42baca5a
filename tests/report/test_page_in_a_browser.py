"""The page of a sweep as a visitor has it: in Chromium, by keyboard, on a phone, in the dark, offline."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sweeps import CELLS, cell_entry, write_sweep

from lbdet.sweep.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
pytestmark = pytest.mark.slow

LONG = "backbone.features.12.block.2.and_a_name_that_does_not_end_at_all_for_a_long_while"
MARKUP = "</script><img src=x onerror=\"document.title='taken'\">"


@dataclass
class Visit:
    """A page that is open, and what it did that it should not."""

    page: Any
    faults: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.page.text_content("#data"))

    def shown(self) -> tuple[str, str]:
        """Return the series and the precision that the slider stands at."""
        series = self.page.eval_on_selector("#series", "e => e.options[e.value].text")
        return series, self.page.inner_text("#now-precision")

    def width(self) -> dict[str, Any]:
        """Return what the data say of it."""
        series, precision = self.shown()
        group = next(group for group in self.data["series"] if group["name"] == series)
        there = [self.data["widths"][index] for index in group["widths"]]
        return next(width for width in there if width["precision"] == precision)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory, devkit: Path) -> Path:
    failed = {"state": "failed", "error": f"step 3: {MARKUP} {'x' * 90}", "metrics": {}, "bytes": None}
    entries = [cell_entry(*place) for place in CELLS] + [cell_entry("qat", "W3", 0, **failed)]
    entries.append(cell_entry("qat", "W2", 0) | {"series": MARKUP, "name": LONG})
    folder = write_sweep(tmp_path_factory.mktemp("browser") / "sweep", devkit, entries[:-1])
    content = json.loads((folder / "sweep.json").read_text())
    content["cells"].append(entries[-1])
    (folder / "sweep.json").write_text(json.dumps(content))
    file = folder / "cells/qat_W4_seed0/coverage.json"
    layers = json.loads(file.read_text())
    file.write_text(json.dumps([layers[0] | {"name": LONG}, *layers[1:]]))
    write_report([folder])
    return folder / "report.html"


@pytest.fixture
def visit(browser: Any, report: Path) -> Iterator[Callable[..., Visit]]:
    """Open the report; whatever a test does, no error is logged and nothing is asked of any network."""
    visits: list[Visit] = []

    def open_page(width: int = 1280, height: int = 900, scheme: str = "light", **options: Any) -> Visit:
        viewport = {"width": width, "height": height}
        page = browser.new_context(viewport=viewport, color_scheme=scheme, **options).new_page()
        visit = Visit(page)
        page.on("console", lambda message: visit.faults.append(message.text))
        page.on("pageerror", lambda error: visit.faults.append(str(error)))
        page.on("request", lambda request: visit.asked.append(request.url))
        page.goto(report.as_uri())
        visits.append(visit)
        return visit

    yield open_page
    for visit in visits:
        visit.page.context.close()
        assert visit.faults == []
        assert {url for url in visit.asked if not url.startswith("data:image/jpeg")} == {report.as_uri()}


def boxes_in(visit: Visit, selector: str = "body") -> Counter[str]:
    """Count the outlines over photographs by status."""
    classes = visit.page.eval_on_selector_all(
        f"{selector} .frame .box", "boxes => boxes.map(box => box.className.baseVal)"
    )
    return Counter(name.split()[1] for name in classes)


def test_the_slider_moves_by_keyboard_and_shows_the_boxes_of_each_width(visit: Callable[..., Visit]) -> None:
    here = visit()
    here.page.focus("#slider")
    here.press("Home")
    seen, totals = [], []
    while True:
        width = here.width()
        counts = Counter(row[0] for rows in width["boxes"] for row in rows)
        assert boxes_in(here) == counts
        text = f"{counts['K']} kept {counts['L']} lost {counts['N']} new"
        assert " ".join(here.page.inner_text("#counts").split()) == text
        value = here.page.get_attribute("#slider", "aria-valuetext")
        assert value.startswith(f"{width['precision']}: {width['mean']:.3f}")
        assert here.page.inner_text("#ticks .on") == width["precision"]
        seen.append(width["precision"])
        totals.append(tuple(sorted(counts.items())))
        here.press("ArrowRight")
        if here.shown()[1] == seen[-1]:
            break
    assert seen == ["W2", "W4A8", "W4", "W8A8", "float"]
    assert len(set(totals)) == 5
    here.press("Home")
    assert here.shown()[1] == "W2"
    here.press("End")
    assert here.shown()[1] == "float"


def test_boxes_lie_where_the_data_say_and_a_table_says_the_same(visit: Callable[..., Visit]) -> None:
    here = visit()
    width = here.width()
    assert sum(map(len, width["boxes"])) > 6
    for k, rows in enumerate(width["boxes"]):
        photo = here.page.locator(".photo").nth(k)
        places = photo.locator(".box .line").evaluate_all(
            "all => all.map(e => ['x', 'y', 'width', 'height'].map(name => Number(e.getAttribute(name))))"
        )
        expected = [[x1, y1, x2 - x1, y2 - y1] for _, _, x1, y1, x2, y2, *_ in rows]
        for place, box in zip(sorted(places), sorted(expected), strict=True):
            assert place == pytest.approx(box)
        entries = photo.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
        )
        names = {"K": "kept", "L": "lost", "N": "new"}
        for entry, (status, label, *_, reference, score) in zip(entries, rows, strict=True):
            scores = ["–" if value is None else f"{value + 1e-9:.2f}" for value in (reference, score)]
            assert entry[:2] == [here.data["classes"][label], names[status]]
            assert [float(t) if t != "–" else t for t in entry[2:4]] == [
                pytest.approx(float(t), abs=0.011) if t != "–" else t for t in scores
            ]
        assert photo.locator(".tag text").count() == len(rows)
        tags = photo.locator(".tag text").all_text_contents()
        assert sorted(tags) == sorted(f"{row[0]} {here.data['classes'][row[1]]}" for row in rows)


def test_kept_lost_and_new_differ_in_their_lines_too(visit: Callable[..., Visit]) -> None:
    here = visit()
    here.page.focus("#slider")
    here.press("Home")
    style = "e => [getComputedStyle(e).strokeDasharray, getComputedStyle(e).stroke]"
    styles = {kind: here.page.eval_on_selector(f".frame .box.{kind} .line", style) for kind in "KLN"}
    assert len({dashes for dashes, _ in styles.values()}) == 3
    assert len({colour for _, colour in styles.values()}) == 3
    assert styles["K"][0] == "none"


def test_the_series_changes_by_keyboard_and_keeps_the_precision(visit: Callable[..., Visit]) -> None:
    here = visit()
    assert here.shown() == ("qat", "W4")
    here.page.focus("#series")
    here.press("ArrowUp")
    assert here.shown() == ("ptq", "W4")
    assert boxes_in(here) == Counter(row[0] for rows in here.width()["boxes"] for row in rows)
    here.press("ArrowUp")
    assert here.shown()[0] == MARKUP
    assert here.page.title() != "taken"
    assert MARKUP in here.page.inner_text("#points")


def column(visit: Visit, table: str, index: int) -> list[str]:
    return visit.page.eval_on_selector_all(
        f"{table} tbody tr", f"rows => rows.map(row => row.cells[{index}].dataset.sort)"
    )


def test_a_table_sorts_by_any_column_by_keyboard_both_ways(visit: Callable[..., Visit]) -> None:
    here = visit()
    table = "#points .scroll:first-of-type table"
    heads = here.page.locator(f"{table} thead th")
    assert heads.count() == 10
    for index in range(heads.count()):
        before = sorted(column(here, table, index))
        for direction in ("ascending", "descending"):
            heads.nth(index).locator("button").focus()
            here.press("Enter" if direction == "ascending" else "Space")
            assert heads.nth(index).get_attribute("aria-sort") == direction
            assert here.page.locator(f"{table} th[aria-sort]").count() == 1
            values = column(here, table, index)
            assert sorted(values) == before
            known = [value for value in values if value != ""]
            assert values == known + [""] * (len(values) - len(known))
            numbers = (
                [float(v) for v in known] if all(re.fullmatch(r"-?[\d.e-]+", v) for v in known) else None
            )
            expected = sorted(numbers or known, reverse=direction == "descending")
            assert (numbers or known) == expected or numbers is None


def test_classes_and_layers_follow_the_slider_and_stay_sorted(visit: Callable[..., Visit]) -> None:
    here = visit()
    here.page.locator("#class-table thead button").nth(3).click()
    here.page.locator("#class-table thead button").nth(3).click()
    here.page.locator("#layer-table thead button").nth(5).click()
    here.page.locator("#layer-table thead button").nth(5).click()
    here.page.focus("#slider")
    for key in ("Home", "ArrowRight", "End"):
        here.press(key)
        width = here.width()
        values = [float(value) for value in column(here, "#class-table", 3)]
        assert values == sorted((row[3] for row in width["classes"]), reverse=True)
        assert len(column(here, "#layer-table", 0)) == len(width["layers"])
        known = [layer["zeros"] for layer in width["layers"] if layer["zeros"] is not None]
        zeros = [float(value) for value in column(here, "#layer-table", 5) if value]
        assert zeros == sorted(known, reverse=True)
        histograms = sum("counts" in layer for layer in width["layers"])
        assert here.page.locator("#layer-table svg[role=img]").count() == histograms
    here.press("Home")
    label = here.page.locator("#layer-table svg").first.get_attribute("aria-label")
    assert re.fullmatch(r"-1: [\d.]+ %, 0: [\d.]+ %, 1: [\d.]+ %", label)


@pytest.mark.parametrize("width", [320, 360, 768])
def test_on_a_phone_the_page_never_scrolls_sideways(visit: Callable[..., Visit], width: int) -> None:
    here = visit(width=width, height=740)
    here.page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    here.page.focus("#slider")
    for key in ("Home", "End"):
        here.press(key)
        sizes = here.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert sizes == [width, width]
    controls = here.page.locator(".controls").bounding_box()
    assert controls["height"] < 0.3 * 740


TICKS = """() => [...document.getElementById("ticks").children].map((tick) => {
  const range = document.createRange();
  range.selectNodeContents(tick);
  const { left, right } = range.getBoundingClientRect();
  return [left, right, tick.checkVisibility({ visibilityProperty: true })];
})"""


def test_on_a_phone_names_of_many_widths_do_not_lie_over_each_other(visit: Callable[..., Visit]) -> None:
    here = visit(width=320, height=740)
    here.page.evaluate("data.series[select.value].widths = [...data.widths.keys(), ...data.widths.keys()]")
    count = 2 * len(here.data["widths"])
    for place in (0, 1, count // 2, count - 2, count - 1):
        here.page.evaluate(f"showSeries({place})")
        ticks = here.page.evaluate(TICKS)
        shown = [(left, right) for left, right, is_shown in ticks if is_shown]
        assert all(right < left for (_, right), (left, _) in pairwise(shown))
        assert 3 <= len(shown) < len(ticks) == count
        assert ticks[place][2]
        assert (ticks[0][2], ticks[-1][2]) == (place != 1, place != count - 2)
    here.page.set_viewport_size({"width": 1600, "height": 740})
    here.page.wait_for_function("!document.querySelector('.crowded')")


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *:not(script):not(.tag *)")) {
    const text = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    if (!text || !e.checkVisibility()) continue;
    const style = getComputedStyle(e);
    const colour = rgba(e instanceof SVGElement ? style.fill : style.color);
    const [low, high] = [luminance(colour), luminance(ground(e))].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), e.tagName, text.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_light_and_in_dark(visit: Callable[..., Visit], scheme: str) -> None:
    here = visit(scheme=scheme)
    here.page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    found = here.page.evaluate(CONTRASTS)
    assert len(found) > 200
    assert {"text", "TD", "H1", "BUTTON", "PRE"} <= {tag for _, tag, _ in found}
    assert [entry for entry in found if entry[0] < 4.5] == []
    ground = here.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_keyboard_reaches_everything_visibly_and_is_never_trapped(visit: Callable[..., Visit]) -> None:
    here = visit()
    state = """() => {
      const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
      const name = e.id || e.textContent.trim().slice(0, 20);
      const x = box.x + box.width / 2, y = Math.min(Math.max(box.bottom - 3, 0), innerHeight - 3);
      const top = document.elementFromPoint(x, y);
      return [e.tagName, name, style.outlineStyle, parseFloat(style.outlineWidth), e.contains(top)];
    }"""

    stops, back = [], []
    here.press("Tab")
    while (stop := here.page.evaluate(state))[0] != "BODY":
        stops.append(stop)
        assert len(stops) < 200
        here.press("Tab")
    for _ in stops:
        here.press("Shift+Tab")
        back.append(here.page.evaluate(state))
    assert [stop[:2] for stop in back] == [stop[:2] for stop in stops[::-1]]
    assert stops[0][:2] == ["A", "Skip to the results"]
    assert {"slider", "series"} <= {stop[1] for stop in stops}
    assert Counter(stop[0] for stop in stops)["SUMMARY"] == 6 + 11
    assert [stop for stop in stops if stop[2] == "none" or stop[3] < 2] == []
    assert [stop for stop in stops + back if not stop[4]] == []  # none lies under the bar of the slider


def test_everything_that_can_be_used_has_a_name_for_a_screen_reader(visit: Callable[..., Visit]) -> None:
    here = visit()
    session = here.page.context.new_cdp_session(here.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("button", "link", "slider", "combobox", "region", "image", "table", "heading"):
        assert names.get(role), role
        assert all(names[role]), role
    assert names["slider"] == ["Precision"]
    assert names["combobox"] == ["Series"]
    assert {"main", "navigation", "banner", "contentinfo"} <= names.keys()
    assert len([name for name in names["image"] if name.startswith("Photograph ")]) == 6


def test_without_javascript_the_curve_and_the_tables_are_there(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".panels svg").count() == 2
    assert page.locator("#points tbody tr").count() == 8 + 11
    assert "needs JavaScript" in page.inner_text("#width")
    context.close()
