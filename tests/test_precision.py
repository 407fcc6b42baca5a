"""Widths as text and back."""

from __future__ import annotations

import dataclasses

import pytest

from lbdet.errors import UserError
from lbdet.precision import FLOAT, Plan, Precision


@pytest.mark.parametrize("weight_bits", [None, 1, 4, 16])
@pytest.mark.parametrize("act_bits", [None, 1, 8, 10])
def test_every_precision_is_read_back_from_its_text(weight_bits: int | None, act_bits: int | None) -> None:
    precision = Precision(weight_bits, act_bits)
    assert Precision.parse(str(precision)) == precision


@pytest.mark.parametrize(
    "text, precision",
    [("W4A8", Precision(4, 8)), ("W4", Precision(4, None)), ("A8", Precision(None, 8)), ("float", FLOAT)],
)
def test_a_missing_half_is_float(text: str, precision: Precision) -> None:
    assert Precision.parse(text) == precision
    assert str(precision) == text


@pytest.mark.parametrize(
    "text", ["", "4", "w4", "A8W4", "W", "W0", "W00", "W04", "W4A0", "W4 ", "W-4", "W4.5", "W٤"]
)
def test_other_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError) as error:
        Precision.parse(text)
    assert str(error.value) == (
        f"precision must be 'float' or like W4, W4A8, got {text!r}; write for instance W4"
    )


def test_a_precision_is_read_as_itself() -> None:
    assert Precision.parse(Precision(4, 8)) == Precision(4, 8)


@pytest.mark.parametrize("value", [4, 0, None, 4.0, ["W4"]])
def test_what_is_no_text_is_refused_in_the_same_words(value: object) -> None:
    with pytest.raises(UserError) as error:
        Precision.parse(value)  # type: ignore[arg-type]
    assert str(error.value) == (
        f"precision must be 'float' or like W4, W4A8, got {value!r}; write for instance W4"
    )


def test_a_precision_is_a_value_that_nobody_can_change() -> None:
    assert {Precision(4), Precision(4, None), Precision.parse("W4")} == {Precision(4)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        Precision(4).weight_bits = 2  # type: ignore[misc]


def test_an_empty_plan_is_of_the_first_phase() -> None:
    assert Plan() == Plan({}, {}, 0)
