"""One unit at a time: what is measured, and the widths that are suggested for a budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lbdet.convert import model_bytes, quantize_model, quantized_layers, set_precision
from lbdet.errors import UserError
from lbdet.precision import FLOAT, Precision
from lbdet.sweep.sensitivity import Record, measure_units, overrides, suggest, units_of

WIDTHS = [Precision(4), Precision(2, 8)]


def model() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return quantize_model(nn.ModuleDict({"body": nn.ModuleList([body]), "last": nn.Conv2d(8, 2, 1)}), "W4")[0]


def test_one_unit_alone_is_quantized_at_a_time_and_its_loss_and_bytes_are_measured() -> None:
    net = model()
    units = units_of(net, "block")
    assert units == {"body.0": ("body.0.0", "body.0.2"), "last": ("last",)}
    seen, calibrated, scores = [], [], itertools.count()

    def score() -> float:
        seen.append({n: str(x.precision) for n, x in quantized_layers(net).items() if x.precision != FLOAT})
        return 0.1 * next(scores)

    records = list(measure_units(net, units, WIDTHS, score, calibrated.append))
    body = dict.fromkeys(("body.0.0", "body.0.2"))
    assert seen == [
        {},
        dict.fromkeys(body, "W4"),
        dict.fromkeys(body, "W2A8"),
        {"last": "W4"},
        {"last": "W2A8"},
    ]
    assert calibrated == [("body.0.0", "body.0.2"), ("last",)]
    assert [r.lost for r in records] == [pytest.approx(-0.1 * i) for i in (1, 2, 3, 4)]
    whole = model_bytes(net)
    set_precision(net, {"last": Precision(4)})
    assert records[2] == Record("last", "W4", pytest.approx(-0.3), whole - model_bytes(net))


def test_what_is_known_is_not_measured_again() -> None:
    net = model()
    units = units_of(net, "layer")
    known = [Record(unit, "W4", 0.0, 1) for unit in units]
    assert list(measure_units(net, units, WIDTHS[:1], lambda: pytest.fail("measured"), print, known)) == []
    rest = measure_units(net, units, WIDTHS[:1], lambda: 0.5, print, known[1:])
    assert [record.unit for record in rest] == [next(iter(units))]


RECORDS = [
    Record("a", "W4", 0.01, 80), Record("a", "W2", 0.30, 90),
    Record("b", "W4", 0.00, 40), Record("b", "W2", 0.02, 45),
    Record("c", "W4", -0.01, 8), Record("c", "W2", 0.20, 9),
]  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1000 - 144, {"a": "W2", "b": "W2", "c": "W2"}),
        (1000 - 143, {"a": "W2", "b": "W2", "c": "W4"}),
        (1000 - 133, {"a": "W4", "b": "W2", "c": "W4"}),
        (1000 - 128, {"a": "W4", "b": "W4", "c": "W4"}),
        (1000, {"a": "float", "b": "W4", "c": "W4"}),
    ],
)
def test_a_budget_goes_where_a_byte_regains_most(budget: int, expected: dict[str, str]) -> None:
    assert suggest(RECORDS, 1000, budget) == expected


def test_no_suggestion_is_larger_than_its_budget_or_worse_than_a_smaller_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(20, 2, generator=generator).sort(dim=1).values
    records = [
        Record(f"u{i}", w, values[i, k].item(), s)
        for i in range(20)
        for k, (w, s) in enumerate((("W4", 50 + i), ("W2", 60 + i)))
    ]
    cost = {(r.unit, r.precision): (r.lost, r.saved) for r in records}
    lost = []
    for budget in [*range(2000 - 20 * 60 - 190, 2000, 37), 2000]:
        chosen = suggest(records, 2000, budget)
        found = [cost.get((unit, width), (0.0, 0)) for unit, width in chosen.items()]
        assert 2000 - sum(saved for _, saved in found) <= budget
        lost.append(sum(x for x, _ in found))
    assert lost[0] > lost[len(lost) // 2] > lost[-1] == 0


def test_a_budget_that_is_too_small_names_the_smallest() -> None:
    with pytest.raises(
        UserError, match="--budget: must be at least 856 bytes with these precisions, got 855"
    ):
        suggest(RECORDS, 1000, 855)


def test_a_suggestion_becomes_patterns_of_layers() -> None:
    units = {"body.0": ("body.0.conv1", "body.0.conv2"), "last": ("last",)}
    assert overrides({"body.0": "W4", "last": "float"}, units) == {
        "body.0.*": {"precision": "W4"}, "last": {"precision": "float"}
    }  # fmt: skip
