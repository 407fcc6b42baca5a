"""From rounds of times to medians, quartiles and ratios, and to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lbdet.deploy.benchmark import STAGES, Rounds, Times

_QUANTILES = {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
_HEADINGS = {
    "end_to_end": "end to end", "prepare": "prepare", "network": "network", "post": "boxes", "batch": "batch",
}  # fmt: skip


def summarize(rounds: Sequence[Times]) -> dict[str, Any]:
    """Return the quantiles of all samples of a stage, the median of each round, and the median CPU time.

    Args:
        rounds: at least one, none empty.
    """
    ms = np.concatenate([times.ms for times in rounds])
    return {
        "samples": len(ms),
        **{name: float(np.quantile(ms, q)) for name, q in _QUANTILES.items()},
        "round_medians": round_medians(rounds),
        "cpu_median": float(np.median(np.concatenate([times.cpu_ms for times in rounds]))),
    }


def round_medians(rounds: Sequence[Times]) -> list[float]:
    """Return the median of each round, ms."""
    return [float(np.median(times.ms)) for times in rounds]


def speedup(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Return how many times faster than `base` something is: of the ratios within each round the median and
    the quartiles.

    Args:
        base, other: the medians of the same rounds, ms.
    """
    ratios = np.divide(base, other)
    return {name: float(np.quantile(ratios, _QUANTILES[name])) for name in ("p25", "median", "p75")}


def summaries(rounds: Rounds, base: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return engine -> stage -> `summarize`, with `speedup` over the engine `base` where it has the stage."""
    found = {}
    for engine, stages in rounds.items():
        found[engine] = {stage: summarize(times) for stage, times in stages.items()}
        for stage, summary in found[engine].items():
            if stage in rounds[base]:
                medians = round_medians(rounds[base][stage])
                summary["speedup"] = speedup(medians, summary["round_medians"])
    return found


def table(engines: Mapping[str, Mapping[str, Any]], base: str, batch: int) -> str:
    """Return a Markdown table with a line an engine.

    Args:
        engines: name -> `stages` (of `summaries`), `peak_memory` and `file_size` (bytes); or `skipped`.
        base: the engine of ratio 1.
        batch: how many images `batch` stands for.
    """
    ran = {name: facts for name, facts in engines.items() if "stages" in facts}
    stages = [stage for stage in STAGES if any(stage in facts["stages"] for facts in ran.values())]
    heads = [_HEADINGS[s] if s != "batch" else f"network x{batch}" for s in stages[1:]]
    lines = [
        ["engine", "end to end, ms", "quartiles", f"x {base}", "CPU ms", *heads, f"network x {base}"],
        *(_line(name, facts["stages"], stages) for name, facts in ran.items()),
    ]
    lines[0] += ["peak memory", "file"]
    for line, facts in zip(lines[1:], ran.values(), strict=True):
        line += [_megabytes(facts["peak_memory"]), _megabytes(facts["file_size"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join(rows)


def _line(name: str, stages: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    whole = stages["end_to_end"]
    return [
        name, f"{whole['median']:.1f}", f"{whole['p25']:.1f} .. {whole['p75']:.1f}", _ratio(whole),
        f"{whole['cpu_median']:.1f}",
        *(f"{stages[s]['median']:.1f}" if s in stages else "-" for s in shown[1:]),
        _ratio(stages.get("network", {})),
    ]  # fmt: skip


def _ratio(summary: Mapping[str, Any]) -> str:
    return f"{summary['speedup']['median']:.2f}" if "speedup" in summary else "-"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f} MB"
