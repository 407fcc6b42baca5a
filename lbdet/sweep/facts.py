"""What a sweep tells of a finished cell, from the files in its run folder."""

from __future__ import annotations

from typing import Any

from lbdet.data.files import read_json
from lbdet.engine.run_folder import RunFolder
from lbdet.errors import UserError

PACKED, LATENCY = "model.lbw", "latency.json"


def is_measured(run: RunFolder) -> bool:
    """Return whether a cell has all that a sweep tells of it; the latency is written last."""
    return run.finished and (run.path / LATENCY).exists()


def facts(run: RunFolder) -> dict[str, Any]:
    """Read metrics, bytes, bits a weight, share of zeros, squared error and latency of a measured cell.

    Raises:
        UserError: the files are damaged or those of another version.
    """
    names = ("metrics.json", "coverage.json", LATENCY)
    metrics, layers, latency = (read_json(run.path / name) for name in names)
    try:
        return _facts(metrics, layers, latency, (run.path / PACKED).stat().st_size)
    except (KeyError, TypeError, ValueError, ArithmeticError, OSError):
        raise UserError(
            f"{run.path}: {', '.join(names)} and {PACKED} must be as a sweep leaves them, got something "
            "else; remove the folder to run the cell again"
        ) from None


def _facts(metrics: Any, layers: Any, latency: Any, size: int) -> dict[str, Any]:
    weights = sum(layer["weights"] for layer in layers)
    quantized = [layer for layer in layers if layer["bits"] is not None]
    codes = sum(layer["weights"] for layer in quantized)
    return {
        "metrics": metrics,
        "bytes": size, "steps": int(metrics["steps"]),
        "bits_per_weight": sum(layer["stored_bits"] for layer in layers) / weights,
        "zeros": sum(layer["zeros"] * layer["weights"] for layer in quantized) / codes if codes else 0.0,
        "squared_error":
            sum(layer["squared_error"] for layer in quantized) / len(quantized) if quantized else 0.0,
        "latency_ms": float(latency["ms"]),
    }  # fmt: skip
