"""Print the README's table of results/ptq as Markdown; needs only Python."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "results" / "ptq"
BATCH_NORM = {"as loaded": "bn0", "re-estimated": "recalibrated", "corrected": "corrected"}
PRECISIONS = ("W6", "W5", "W4", "W3", "W2")


def main() -> None:
    """Print a row for each solver, granularity and treatment of batch norm that was measured."""
    print("| solver | scale | batch norm |", " | ".join(PRECISIONS), "|")
    print("|---" * (3 + len(PRECISIONS)) + "|")
    for solver in ("exact", "semi"):
        for granularity in ("per_channel", "per_tensor"):
            for name, suffix in BATCH_NORM.items():
                path = FOLDER / f"{solver}_{granularity}_{suffix}.json"
                if path.exists():
                    found = {cell["precision"]: cell["voc07_map"] for cell in json.loads(path.read_text())}
                    values = " | ".join(f"{found[p]:.3f}"[1:] for p in PRECISIONS)
                    print(f"| {solver} | {granularity.replace('_', ' ')} | {name} | {values} |")


if __name__ == "__main__":
    main()
