"""Checks of single values: what counts as a number or a switch, and how a value that does not is named."""

from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest
import torch

from qlora_helpers import validation

HUGE = 10**5_000  # Python refuses to print it


class Rank(IntEnum):
    LOW = 8


@pytest.mark.parametrize("value", [8, np.int64(8), np.uint8(8), np.array(8), torch.tensor(8), Rank.LOW], ids=repr)
def test_an_integer_of_any_library_is_a_plain_whole_number(value):
    assert type(validation.whole("rank", value)) is int and validation.whole("rank", value) == 8


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), torch.tensor(True), 8.0, np.float64(8), Fraction(8), Decimal(8), "8", None, [8], np.array([8]),
     torch.tensor(8.0), float("nan"), float("inf"), 8j],
    ids=repr,
)  # fmt: skip
def test_nothing_else_is_a_whole_number(value):
    with pytest.raises(ValueError, match=r"^rank=.*: must be a whole number, 1 or more$"):
        validation.whole("rank", value)


def test_a_whole_number_may_have_an_upper_bound():
    assert validation.whole("seed", 7, at_least=0, at_most=7) == 7
    with pytest.raises(ValueError, match=r"^seed=8: must be a whole number, 0 to 7$"):
        validation.whole("seed", 8, at_least=0, at_most=7)


def test_a_number_is_one_that_float32_can_hold():
    assert validation.number("alpha", 3e38, above=0) == 3e38
    for value in (4e38, 1e300, -1e300, 10**300):
        with pytest.raises(ValueError, match=r"^alpha=.*: must be a number, more than 0, that float32 can hold$"):
            validation.number("alpha", value, above=0)


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), Fraction(1, 2)], ids=repr)
def test_a_real_number_of_any_library_is_a_plain_float(value):
    assert type(validation.number("dropout", value, at_least=0)) is float
    assert validation.number("dropout", value, at_least=0) == 0.5


@pytest.mark.parametrize("value", [2, np.int8(2)], ids=repr)
def test_a_whole_number_stays_whole_where_any_number_is_allowed(value):
    assert type(validation.number("alpha", value, above=0)) is int and validation.number("alpha", value, above=0) == 2


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), "0.5", None, Decimal("0.5"), 1j, [0.5], np.array([0.5]), torch.tensor(0.5), float("nan"),
     float("inf"), np.float64("nan"), np.float32("inf"), 10**400, Fraction(10**400), Fraction(1, 10**400), -1, 0],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_nothing_else_is_a_number_above_0(value):
    with pytest.raises(ValueError, match=r"^alpha=.*: must be a number, more than 0$"):
        validation.number("alpha", value, above=0)


@pytest.mark.parametrize("value", [True, False, np.bool_(True), np.bool_(False)], ids=repr)
def test_a_switch_of_any_library_is_a_plain_one(value):
    assert validation.switch("double_quant", value) is bool(value)


@pytest.mark.parametrize(
    "value", [1, 0, "no", "", None, np.int64(1), 1.0, [], torch.tensor(True), np.array([True])], ids=repr
)
def test_nothing_else_is_a_switch(value):
    with pytest.raises(ValueError, match=r"^double_quant=.*: must be True or False$"):
        validation.switch("double_quant", value)


def test_a_name_is_a_plain_text():
    assert type(validation.one_of("method", np.str_("lora"), ("qlora", "lora"))) is str


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (HUGE, "an integer of 16,610 bits"),
        ([HUGE], "[an integer of 16,610 bits]"),
        (-HUGE, "an integer of 16,610 bits"),
        ("x" * 1_000, "'xxx"),
        (list(range(1_000)), "[0, 1, 2, "),
    ],
    ids=["an integer", "in a list", "negative", "a text", "a list"],
)
def test_a_value_that_is_too_long_to_print_is_named_in_short(value, shown):
    with pytest.raises(ValueError) as caught:
        validation.number("alpha", value, above=0, below=1)
    assert str(caught.value).startswith(f"alpha={shown}") and len(str(caught.value)) < 400
