"""Print a metric's mean and range over seeds, from results named `<what>_seed<N>.json` in a folder."""

import json
import re
import sys
from pathlib import Path


def main(folder: str, metric: str) -> None:
    """Print a Markdown table, a row a `<what>`, in the order of their means."""
    values: dict[str, list[float]] = {}
    for path in sorted(Path(folder).glob("*_seed*.json")):
        name = re.sub(r"_seed\d+$", "", path.stem)
        values.setdefault(name, []).append(json.loads(path.read_text(encoding="utf-8"))[metric])
    print(f"| run | seeds | {metric}, mean | lowest | highest |\n|---|---|---|---|---|")
    for name, found in sorted(values.items(), key=lambda item: -sum(item[1]) / len(item[1])):
        mean = sum(found) / len(found)
        print(f"| {name} | {len(found)} | {mean:.4f} | {min(found):.4f} | {max(found):.4f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
