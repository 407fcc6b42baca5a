"""Write the tables of README.md and EXPERIMENTS.md from the measured JSON files; needs Python and PyYAML.

    python tools/tables.py            # rewrite what lies between <!-- results: NAME --> and <!-- end -->
    python tools/tables.py --check    # change nothing; exit 1 if a table is not what the files say

`results/tables.yaml` has the tables: columns, and a row for each set of runs that differ in their seed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FILES = ("README.md", "EXPERIMENTS.md")
MARKED = re.compile(r"(<!-- results: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def points(values: Sequence[float]) -> list[str]:
    """Write shares as the Markdown files do: .754; halves are rounded up."""
    rounded = [Decimal(f"{value:.9f}").quantize(Decimal("0.001"), ROUND_HALF_UP) for value in values]
    return [str(value).removeprefix("0") for value in rounded]


KINDS: dict[str, Callable[[Sequence[float]], str]] = {
    "mean": lambda values: points([mean(values)])[0],
    "range": lambda values: ", ".join(points([min(values), max(values)])) if len(values) > 1 else "",
    "each": lambda values: " ".join(points(values)),
    "kB": lambda values: f"{mean(values) / 1000:,.0f}",
}
"""what a column shows of a metric of a row's runs"""


def render(table: Mapping[str, Any], results: Path) -> str:
    """Return a table as Markdown.

    Args:
        table: `columns`, title -> `KIND METRIC [KEY]` or a key of the rows, whose text is shown; `rows`, each
            with the keys that columns name. KEY (`runs` if none is said) has a pattern of files in `results`.

    Raises:
        SystemExit: a pattern matches no file.
    """
    lines = ["| " + " | ".join(table["columns"]) + " |", "|---" * len(table["columns"]) + "|"]
    for row in table["rows"]:
        cells = [_cell(column.split(), row, results) for column in table["columns"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(column: Sequence[str], row: Mapping[str, str], results: Path) -> str:
    if len(column) == 1:
        return row.get(column[0], "")
    kind, metric, key = (*column, "runs")[:3]
    if key not in row:
        return ""
    paths = sorted(results.glob(row[key]))
    if not paths:
        sys.exit(f"results/tables.yaml: {row[key]!r} matches no file")
    return KINDS[kind]([_value(json.loads(path.read_text(encoding="utf-8")), metric) for path in paths])


def _value(measured: Any, metric: str) -> float:
    """Return a metric of a run, or `W4:metric` of what eval_det.py wrote of several precisions."""
    precision, colon, name = metric.rpartition(":")
    if colon:
        measured = next(cell for cell in measured if cell["precision"] == precision)
    return measured[name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check all marked tables; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, tell what differs")
    options = parser.parse_args(arguments)
    tables = yaml.safe_load((ROOT / "results/tables.yaml").read_text(encoding="utf-8"))
    rendered = {name: render(table, ROOT / "results") for name, table in tables.items()}
    differ = []
    for path in (ROOT / name for name in FILES):
        text = path.read_text(encoding="utf-8")
        new = MARKED.sub(lambda mark: mark[1] + rendered[mark[2]] + mark[4], text)
        if new != text:
            differ.append(path)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    for path in differ:
        print(f"{path.name}: {'is not what results/ says' if options.check else 'written'}")
    return 1 if options.check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
