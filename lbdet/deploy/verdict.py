"""Is the file good? What parity says, as lines to read, as parity.json, and as an error where it is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbdet.errors import NumericsError
from lbdet.files import write_text

MAX_DROP = 0.003
"""of the first mean against torch: 0.3 points"""


def write_report(output: Path, report: Mapping[str, Any]) -> None:
    """Write the report of a file beside it, in one `parity.json` for all files of the folder."""
    path = output.with_name("parity.json")
    try:
        others = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        others = {}
    text = json.dumps({**(others if isinstance(others, dict) else {}), output.name: report}, indent=1) + "\n"
    write_text(path, text)


def summary(output: Path, report: Mapping[str, Any]) -> list[str]:
    """Return what to tell of a file, line by line."""
    means, name = report["means"], _first(report)
    layers, in_float = report["int8_layers"], len(report["float_layers"])
    lines = [
        f"{output}: {report['bytes'] / 1e6:.2f} MB, {report['precision']}, {report['engine']}",
        f"{name} on {report['images']} images: torch {_number(means['torch'][name])}, "
        f"engine {_number(means['engine'][name])} (drop {_number(report['drop'], '+')}); "
        f"torch nudged by a millionth {_number(means['noise'][name])}",
    ]
    if report["codes"]:
        engine, noise = (_mean_changed(report["codes"], kind) for kind in ("engine", "noise"))
        lines.append(
            f"codes of layer inputs: {engine:.1%} differ, {noise:.1%} in torch nudged by a millionth"
        )
    if layers:
        lines.append(f"{layers - in_float} of {layers} layers with int8 weights and inputs run in int8")
    elif output.suffix != ".lbw":
        lines.append("no layer has both int8 weights and inputs, so all are computed in float")
    return lines


def judge(
    output: Path, report: Mapping[str, Any], max_drop: float = MAX_DROP, allow_float_layers: bool = False
) -> list[str]:
    """Check that a file is good.

    Args:
        max_drop: of the first mean against torch, in parts of 1.
        allow_float_layers: only tell of layers that the engine runs in float.

    Returns:
        Warnings.

    Raises:
        NumericsError: it loses more than `max_drop` or what it loses is not known, or an int8 layer is run in
            float.
    """
    faults, warnings, name = [], [], _first(report)
    if report["drop"] is None:
        faults.append(
            f"is not compared: {report['images']} images have no object of the classes that are scored; take "
            "more with --parity-images"
        )
    elif not report["drop"] <= max_drop:  # nan is a fault
        faults.append(
            f"loses {report['drop']:.4f} of {name} against torch, more than {max_drop} (torch itself loses "
            f"{report['noise_drop']:+.4f} where layer inputs are nudged by a millionth)"
        )
    if in_float := report["float_layers"]:
        shown = ", ".join(in_float[:5]) + (", ..." if len(in_float) > 5 else "")
        fault = f"runs {len(in_float)} of {report['int8_layers']} int8 layers in float ({shown})"
        if allow_float_layers:
            warnings.append(f"WARNING: {output} {fault}")
        else:
            faults.append(f"{fault}; take --format openvino, or accept it with --allow-float-layers")
    if faults:
        raise NumericsError(f"{output} in {report['engine']}: {' and '.join(faults)}; see parity.json")
    return warnings


def _first(report: Mapping[str, Any]) -> str:
    return next(iter(report["means"]["torch"]))


def _mean_changed(codes: Mapping[str, Any], kind: str) -> float:
    shares = [layer[kind]["changed"] for layer in codes.values() if layer[kind] is not None]
    return sum(shares) / max(len(shares), 1)


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"
