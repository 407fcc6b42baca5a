"""Which layers break at few bits? One layer, or block, at a time is quantized, the rest stays float.

The metric that it loses and the bytes that it saves are measured; from them a mixture of widths for a byte
budget is suggested, as if losses added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lbdet.convert import find_blocks, model_bytes, quantized_layers, set_float, set_precision
from lbdet.errors import UserError
from lbdet.precision import FLOAT, Precision

Units = Mapping[str, Sequence[str]]
"""unit -> its layers"""


@dataclass(frozen=True)
class Record:
    """What happened to a model in which one unit alone was quantized."""

    unit: str
    precision: str
    lost: float
    """the float model's metric minus this one's; below 0 where it was better"""
    saved: int
    """bytes"""


def units_of(model: nn.Module, by: str) -> dict[str, tuple[str, ...]]:
    """Return the units of a converted model: "block" as found from the module tree, or each "layer"."""
    return find_blocks(model) if by == "block" else {name: (name,) for name in quantized_layers(model)}


def measure_units(
    model: nn.Module,
    units: Units,
    precisions: Sequence[Precision],
    score: Callable[[], float],
    calibrate: Callable[[Sequence[str]], None],
    known: Iterable[Record] = (),
) -> Iterator[Record]:
    """Quantize one unit at a time, at each precision, and yield what it cost; `known` ones are left out.

    Args:
        model: a converted model, left at float.
        score: the metric of the model as it is now; called once for the float model.
        calibrate: sets the activation ranges of the layers that it is given.
    """
    done = {(record.unit, record.precision) for record in known}
    set_float(model)
    reference: float | None = None
    whole = model_bytes(model)
    for unit, layers in units.items():
        for precision in precisions:
            if (unit, str(precision)) in done:
                continue
            if reference is None:
                reference = score()
            set_precision(model, dict.fromkeys(layers, precision))
            if precision.act_bits is not None:
                calibrate(layers)
            yield Record(unit, str(precision), reference - score(), whole - model_bytes(model))
            set_precision(model, dict.fromkeys(layers, FLOAT))


def suggest(records: Iterable[Record], whole: int, budget: int) -> dict[str, str]:
    """Choose a precision for each unit so that the model takes at most `budget` bytes.

    Every unit starts at the width that saves most. Then, while the budget allows it, the unit gets wider that
    regains most of the metric for a byte; float is a choice too. Losses are taken to add up, which they do
    only roughly, and those below 0 count as none.

    Args:
        whole: the float model's bytes.

    Returns:
        Unit -> precision.

    Raises:
        UserError: the narrowest widths do not fit the budget.
    """
    choices: dict[str, list[Record]] = {}
    for record in records:
        choices.setdefault(record.unit, [Record(record.unit, "float", 0.0, 0)]).append(record)
    chosen = {unit: max(of_unit, key=lambda r: r.saved) for unit, of_unit in choices.items()}
    smallest = whole - sum(r.saved for r in chosen.values())
    if smallest > budget:
        raise UserError(
            f"--budget: must be at least {smallest} bytes with these precisions, got {budget}; "
            "give narrower ones"
        )
    while steps := [s for s in _wider(choices, chosen) if _total(whole, chosen, s) <= budget]:
        best = max(steps, key=lambda s: _regained(chosen[s.unit], s) / (chosen[s.unit].saved - s.saved))
        chosen[best.unit] = best
    return {unit: record.precision for unit, record in chosen.items()}


def overrides(suggestion: Mapping[str, str], units: Units) -> dict[str, dict[str, str]]:
    """Return `quantizer.overrides` for a suggestion: a pattern for each unit."""
    return {
        (unit if tuple(units[unit]) == (unit,) else f"{unit}.*"): {"precision": precision}
        for unit, precision in suggestion.items()
    }


def _wider(choices: Mapping[str, Sequence[Record]], chosen: Mapping[str, Record]) -> Iterator[Record]:
    """Yield all choices that save less than the present one of their unit and lose less of the metric."""
    for unit, of_unit in choices.items():
        now = chosen[unit]
        yield from (r for r in of_unit if r.saved < now.saved and _regained(now, r) > 0)


def _regained(now: Record, then: Record) -> float:
    return max(now.lost, 0.0) - max(then.lost, 0.0)


def _total(whole: int, chosen: Mapping[str, Record], step: Record) -> int:
    return whole - sum(r.saved for r in (dict(chosen) | {step.unit: step}).values())
