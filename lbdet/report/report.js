// What moves on the page: tables that sort, and a slider that fills boxes, classes and layers of one width.
// All that comes from files is set as text or as an attribute, never as markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const MISSING = "–";
const STATUS = { K: "kept", L: "lost", N: "new", "-": "found" };
const SVG = "http://www.w3.org/2000/svg";

// ---------- small helpers

function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function fixed(value, digits) {
  return value === null || value === undefined ? MISSING : value.toFixed(digits);
}

function percent(value) {
  return value === null || value === undefined ? MISSING : (100 * value).toFixed(1);
}

function signed(change) {
  if (change === null || change === undefined) return MISSING;
  const text = Math.abs(change).toFixed(3);
  if (Number(text) === 0) return text;
  return (change > 0 ? "+" : "−") + text;
}

function cell(text, value, kind = "number", tag = "td") {
  const attributes = { "data-sort": value ?? "" };
  if (kind) attributes.class = kind;
  if (tag === "th") attributes.scope = "row";
  return html(tag, attributes, text);
}

// A long name with a place for a line break behind every point and underscore.
function breakable(name) {
  const parts = document.createDocumentFragment();
  for (const part of name.split(/(?<=[._/])/)) parts.append(part, document.createElement("wbr"));
  return parts;
}

// ---------- tables that sort

function sortRows(table, column, direction) {
  const key = (row) => row.cells[column].dataset.sort;
  const isNumber = (text) => text !== "" && !Number.isNaN(Number(text));
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last, both ways
    const order = isNumber(x) && isNumber(y) ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
    return direction * order;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

function sortAgain(table) {
  const column = [...table.tHead.rows[0].cells].findIndex((head) => head.hasAttribute("aria-sort"));
  if (column < 0) return;
  const direction = table.tHead.rows[0].cells[column].getAttribute("aria-sort") === "ascending" ? 1 : -1;
  sortRows(table, column, direction);
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const next = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      sortAgain(table);
    });
  });
}

// ---------- boxes over photographs

const measure = document.createElement("canvas").getContext("2d");

function textWidth(text, size) {
  measure.font = `600 ${size}px ${getComputedStyle(document.body).fontFamily}`;
  return measure.measureText(text).width;
}

function statusClass(status) {
  return status === "-" ? "plain" : status;
}

function boxOutline([status, , x1, y1, x2, y2]) {
  const place = { x: x1, y: y1, width: Math.max(x2 - x1, 1), height: Math.max(y2 - y1, 1) };
  const box = svg("g", { class: `box ${statusClass(status)}` });
  box.append(svg("rect", { class: "rim", ...place }), svg("rect", { class: "line", ...place }));
  return box;
}

function shared(a, b) {
  const across = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
  const down = Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y);
  return Math.max(across, 0) * Math.max(down, 0);
}

// The place of a name that hides least of the names before it: over the box, in it, below it; left, then right.
function tagPlace([, , x1, y1, x2, y2], width, height, frame, taken) {
  let best = null;
  for (const y of [y1 - height, y1, y2 - height, y2]) {
    for (const x of [x1, x2 - width]) {
      const place = {
        x: Math.max(0, Math.min(x, frame.width - width)),
        y: Math.max(0, Math.min(y, frame.height - height)),
        width,
        height,
      };
      const hidden = taken.reduce((sum, other) => sum + shared(place, other), 0);
      if (best === null || hidden < best.hidden) best = { place, hidden };
    }
  }
  return best.place;
}

function boxTag(row, frame, taken) {
  const size = Math.max(frame.width, frame.height) / 27;
  const [status, label] = row;
  const text = (status === "-" ? "" : `${status} `) + data.classes[label];
  const place = tagPlace(row, textWidth(text, size) + size * 0.6, size * 1.3, frame, taken);
  taken.push(place);
  const { x, y, width, height } = place;
  return svg(
    "g",
    { class: `tag ${statusClass(status)}` },
    svg("rect", { x, y, width, height }),
    svg("text", { x: x + size * 0.3, y: y + height / 2, "font-size": size }, text),
  );
}

function countsOf(rows) {
  const counts = { K: 0, L: 0, N: 0, "-": 0 };
  for (const [status] of rows) counts[status] += 1;
  return counts;
}

function countsText(counts, hasReference) {
  const shown = hasReference ? ["K", "L", "N"] : ["-"];
  return shown.map((status) => `${counts[status]} ${STATUS[status]}`).join(", ");
}

function boxRow([status, label, x1, y1, x2, y2, float, here]) {
  const [left, top, across, down] = [x1, y1, x2 - x1, y2 - y1].map(Math.round);
  return html(
    "tr",
    {},
    html("th", { scope: "row" }, data.classes[label]),
    html("td", {}, STATUS[status]),
    html("td", { class: "number" }, fixed(float, 2)),
    html("td", { class: "number" }, fixed(here, 2)),
    html("td", { class: "number" }, `${across} × ${down} at ${left}, ${top}`),
  );
}

function showPhoto(figure, rows, hasReference) {
  const overlay = figure.querySelector(".frame svg");
  const frame = overlay.viewBox.baseVal;
  const byRank = [...rows].sort((a, b) => (b[0] === "K") - (a[0] === "K")); // changes lie over what is kept
  const taken = [];
  const tags = [...byRank].reverse().map((row) => boxTag(row, frame, taken));
  overlay.replaceChildren(...byRank.map(boxOutline), ...tags.reverse());
  figure.querySelector(".found").textContent = countsText(countsOf(rows), hasReference);
  figure.querySelector("tbody").replaceChildren(...rows.map(boxRow));
}

function swatch(status) {
  const box = boxOutline([status, 0, 3, 3, 35, 17]);
  return svg("svg", { viewBox: "0 0 38 20", "aria-hidden": "true" }, box);
}

function showPhotos(width) {
  const figures = document.querySelectorAll(".photo");
  if (!figures.length) return;
  const hasReference = data.widths.some((other) => other.isFloat);
  figures.forEach((figure, k) => showPhoto(figure, width.boxes[k], hasReference));
  const counts = countsOf(width.boxes.flat());
  const shown = hasReference ? ["K", "L", "N"] : ["-"];
  document.getElementById("counts").replaceChildren(
    ...shown.map((status) => html("span", {}, swatch(status), `${counts[status]} ${STATUS[status]}`)),
  );
  const [lowest, ...others] = width.seeds;
  const note = `Of the ${width.seeds.length} seeds of this width, these are the boxes of seed ${lowest}.`;
  document.getElementById("which-seed").textContent = others.length ? note : "";
}

// ---------- classes

// The largest change of a class at any width of the series: bars keep their scale while the slider moves.
function largestChange() {
  const rows = data.series[select.value].widths.flatMap((index) => data.widths[index].classes ?? []);
  return Math.max(0.05, ...rows.map(([, , float, here]) => Math.abs(here - (float ?? here))));
}

function changeBar(change, largest) {
  const end = 50 + (50 * change) / largest;
  const kind = change < 0 ? "fall" : "rise";
  const bar = svg("rect", { class: kind, x: Math.min(50, end), y: 2, width: Math.abs(end - 50), height: 8 });
  const middle = svg("line", { class: "zero", x1: 50, x2: 50, y1: 0, y2: 12, "vector-effect": "non-scaling-stroke" });
  return svg("svg", { viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" }, bar, middle);
}

function showClasses(width) {
  const table = document.getElementById("class-table");
  if (!table) return;
  const largest = largestChange();
  const rows = (width.classes ?? []).map(([name, objects, float, here]) => {
    const change = float === null ? null : here - float;
    return html(
      "tr",
      {},
      cell(name, name, "", "th"),
      cell(String(objects ?? MISSING), objects),
      cell(fixed(float, 3), float),
      cell(fixed(here, 3), here),
      cell(signed(change), change),
      cell(change === null ? "" : changeBar(change, largest), change, "bar"),
    );
  });
  table.tBodies[0].replaceChildren(...rows);
  sortAgain(table);
}

// ---------- layers

function histogramText(levels, counts) {
  const total = counts.reduce((sum, count) => sum + count, 0) || 1;
  const share = (count) => `${((100 * count) / total).toFixed(1)} %`;
  if (levels.length > 20) {
    const most = counts.indexOf(Math.max(...counts));
    const range = `${levels.length} levels from ${levels[0]} to ${levels.at(-1)}`;
    return `${range}, most weights at ${levels[most]}: ${share(counts[most])}`;
  }
  return levels.map((level, k) => `${level}: ${share(counts[k])}`).join(", ");
}

function histogram(levels, counts) {
  const highest = Math.max(...counts, 1);
  const step = 100 / levels.length;
  const gap = levels.length > 40 ? 0 : step * 0.15;
  const bar = (k) => {
    const height = (27 * counts[k]) / highest;
    const [left, up, width] = [k * step + gap, height, step - 2 * gap].map((value) => value.toFixed(2));
    return `M${left} 28v-${up}h${width}v${up}z`;
  };
  const others = levels.map((level, k) => (level === 0 ? "" : bar(k))).join("");
  const zero = levels.indexOf(0);
  const text = histogramText(levels, counts);
  const picture = svg("svg", { viewBox: "0 0 100 28", preserveAspectRatio: "none", role: "img", "aria-label": text });
  picture.append(svg("title", {}, text), svg("path", { d: others }));
  if (zero >= 0) picture.append(svg("path", { d: bar(zero), class: "zero" }));
  return picture;
}

function layerRow(layer) {
  const levels = layer.counts ? data.levels[layer.levels] : null;
  const shown = levels ? histogram(levels, layer.counts) : html("span", { class: "reason" }, layer.reason ?? MISSING);
  return html(
    "tr",
    {},
    cell(breakable(layer.name), layer.name, "", "th"),
    cell(layer.weights?.toLocaleString("en") ?? MISSING, layer.weights),
    cell(layer.format ?? MISSING, layer.format, ""),
    cell(layer.bits ?? "float", layer.bits ?? 32),
    cell(layer.actBits ?? "float", layer.actBits ?? 32),
    cell(percent(layer.zeros), layer.zeros),
    cell(percent(layer.error), layer.error),
    cell(shown, levels?.length, "levels"),
  );
}

function showLayers(width) {
  const table = document.getElementById("layer-table");
  if (!table) return;
  table.tBodies[0].replaceChildren(...(width.layers ?? []).map(layerRow));
  sortAgain(table);
}

// ---------- the slider

const select = document.getElementById("series");
const slider = document.getElementById("slider");

function widthsOfSeries() {
  return data.series[select.value].widths.map((index) => data.widths[index]);
}

function widthText(width, reference = "") {
  const change = width.againstFloat === null ? "" : ` (${signed(width.againstFloat)}${reference})`;
  const size = width.bytes === null ? "" : `, ${(width.bytes / 1e6).toFixed(2)} MB`;
  const ratio = width.ratio === null ? "" : `, ratio ${width.ratio}`;
  const place = width.placeText ? `, ${width.placeText}` : "";
  return `${fixed(width.mean, 3)}${change}${size}${ratio}, ${width.seedsText}${place}`;
}

// Names of widths that would lie over each other are hidden: that of the present width stays, then the ends.
function spaceTicks(place) {
  const ticks = [...document.getElementById("ticks").children];
  const range = document.createRange();
  const shown = [];
  for (const k of new Set([place, 0, ticks.length - 1, ...ticks.keys()])) {
    range.selectNodeContents(ticks[k]);
    const { left, right } = range.getBoundingClientRect();
    const isFree = shown.every((other) => right + 3 < other.left || other.right + 3 < left);
    ticks[k].classList.toggle("crowded", !isFree);
    if (isFree) shown.push({ left, right });
  }
}

function showSeries(place) {
  const widths = widthsOfSeries();
  slider.max = widths.length - 1;
  slider.value = place;
  const names = widths.map((width) => html("span", {}, width.precision));
  document.getElementById("ticks").replaceChildren(...names);
  showWidth();
}

function showWidth() {
  const place = Number(slider.value);
  const width = widthsOfSeries()[place];
  document.getElementById("now-precision").textContent = width.precision;
  document.getElementById("now-facts").textContent = widthText(width);
  slider.setAttribute("aria-valuetext", `${width.precision}: ${widthText(width, " against float")}`);
  [...document.getElementById("ticks").children].forEach((tick, k) => tick.classList.toggle("on", k === place));
  spaceTicks(place);
  showPhotos(width);
  showClasses(width);
  showLayers(width);
  const controls = document.querySelector(".controls");
  document.documentElement.style.setProperty("--stuck", `${controls.offsetHeight + 16}px`);
}

// Another series: at the same precision, or where the slider stands if it has no such width.
function changeSeries() {
  const before = document.getElementById("now-precision").textContent;
  const names = widthsOfSeries().map((width) => width.precision);
  const same = names.indexOf(before);
  showSeries(same >= 0 ? same : Math.min(Number(slider.value), names.length - 1));
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll(".scroll").forEach((region) => {
  region.addEventListener("focusin", ({ target }) => {
    if (target !== region) target.scrollIntoView({ block: "nearest", inline: "nearest" }); // a half is not enough
  });
});
if (slider) {
  const first = data.series.findIndex((group) => group.widths.includes(data.start));
  select.value = first;
  showSeries(data.series[first].widths.indexOf(data.start));
  slider.addEventListener("input", showWidth);
  window.addEventListener("resize", () => spaceTicks(Number(slider.value)));
  select.addEventListener("change", changeSeries);
}
