"""Right answers are right in any form, wrong ones are told as they were given, and the wanted one is never told."""

import decimal
import fractions

import numpy as np
import pytest
import torch

from qlora_helpers.course.exercises.judging import choice, function, number, values
from tests.course.exercises.made_up import asked

NAN, INFINITY = float("nan"), float("inf")


# ---- number

FORMS = [4.125, 4.13, 4.12, fractions.Fraction(33, 8), decimal.Decimal("4.125"), decimal.Decimal("4.13"), np.float64(4.125),
         np.float32(4.125), np.float32(4.13), np.float16(4.125), np.array(4.125), np.array([[4.125]]), torch.tensor(4.125),
         torch.tensor([4.13]), torch.tensor(4.13), torch.tensor(4.125, dtype=torch.float16), torch.tensor(4.125, dtype=torch.bfloat16),
         torch.tensor(4.125, requires_grad=True), 4.125000001]  # fmt: skip


@pytest.mark.parametrize("want", [4.125, fractions.Fraction(33, 8), np.float32(4.125), torch.tensor(4.125)], ids=repr)
@pytest.mark.parametrize("answer", FORMS, ids=repr)
def test_a_number_is_right_in_any_form(want, answer, said):
    assert said(asked(number(want)), answer) == "✓ right!"


@pytest.mark.parametrize(
    ("want", "answer", "mark"),
    [
        (4.125, 4.1, "✗"), (4.125, 4.14, "✗"), (4.125, 4.11, "✗"), (4.125, 4, "✗"), (4.125, -4.125, "✗"),
        (4.1257, 4.126, "✓"), (4.1257, 4.125, "✗"), (0.09174, 0.0917, "✓"), (0.09174, 0.092, "✗"), (123.4, 123, "✓"),
        (12.4, 12, "✗"), (5.703281152, 5.70, "✗"), (5.703281152, 5.703, "✓"), (5.703281152, 5.31, "✗"), (8e9, 8e9 / 1.073741824, "✗"),
        (41_943_040, 41_943_040, "✓"), (41_943_040, 41_943_040.0, "✓"), (41_943_040, 41_943_041, "✗"), (41_943_040, 41_900_000, "✗"),
        (0.0, 0, "✓"), (0.0, 1e-10, "✓"), (0.0, 1e-7, "✗"), (0, 0.004, "✗"), (2e-5, 2e-5, "✓"), (2e-5, 0.00002, "✓"), (2e-5, 2e-4, "✗"),
        (-4.125, -4.13, "✓"), (1e300, 1e300, "✓"), (10**400, 10**400, "✓"), (10**400, 10**399, "✗"), (1.0, 1.0001, "✗"),
        (0.5, 50, "✗"), (16, decimal.Decimal("16.0"), "✓"),
    ],
)  # fmt: skip
def test_a_number_may_be_rounded_to_three_digits_or_more_and_nothing_else(want, answer, mark, said):
    assert said(asked(number(want)), answer)[0] == mark


@pytest.mark.parametrize(("off", "mark"), [(1.009, "✓"), (0.991, "✓"), (1.02, "✗"), (0.98, "✗")])
def test_the_tolerance_of_a_number_can_be_widened(off, mark, said):
    assert said(asked(number(7.0, rel=0.01)), 7.0 * off)[0] == mark


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("4.5", "your answer is '4.5', which is text: leave the quotation marks out."),
        (None, "your answer is None, which is what a function without a return gives."),
        (True, "your answer is True, and not a number."),
        (2j, "your answer is 2j, which is a complex number."),
        (NAN, "your answer is nan."),
        (INFINITY, "your answer is inf."),
        ([4.5], "your answer is [4.5], and not a number."),
        (torch.ones(2), "your answer is a tensor of shape (2,), and not one number."),
        (torch.tensor(True), "your answer is True, and not a number."),
        (len, "your answer is <built-in function len>, and not a number: call it."),
        (12_345_678, "12,345,678 is not right."),
        (torch.tensor(0.1), "0.1 is not right."),
    ],
    ids=repr,
)
def test_a_wrong_number_is_told_as_it_was_given(answer, told, said):
    assert said(asked(number(1.25)), answer) == f"✗ {told} Hint: Count first."


@pytest.mark.parametrize("want", [NAN, INFINITY, "4.5", None, True, [1, 2], torch.ones(2)], ids=repr)
def test_a_wanted_number_must_be_one(want):
    with pytest.raises(ValueError, match=r"^want=.*must be a finite number"):
        number(want)


@pytest.mark.parametrize("rel", [0, -1, NAN, INFINITY, True, "0.1"])
def test_a_tolerance_must_be_a_positive_number(rel):
    for make in (
        lambda: number(1, rel=rel),
        lambda: values([1], rel=rel),
        lambda: function(len, {"a": ([],)}, rel=rel),
    ):
        with pytest.raises(ValueError, match=r"^rel=.*must be a positive number"):
            make()


# ---- values

ROW = [0.12345, -4.125, 0.0]


@pytest.mark.parametrize(
    "answer",
    [
        ROW, tuple(ROW), np.array(ROW), np.array(ROW, dtype=np.float32), torch.tensor(ROW), torch.tensor(ROW).double(),
        torch.tensor(ROW).half(), torch.tensor(ROW).bfloat16(), torch.tensor(ROW, requires_grad=True),
        [torch.tensor(value) for value in ROW], [fractions.Fraction(0.12345), decimal.Decimal("-4.125"), 0],
        [round(value, 3) for value in ROW], torch.tensor([0.123, -4.13, 0.0]), np.array([0.123, -4.12, 0], dtype=np.float32),
        torch.tensor(ROW).to_sparse(), -torch.tensor(ROW).neg(),
    ],
)  # fmt: skip
def test_values_are_right_in_any_form(answer, said):
    for want in (ROW, torch.tensor(ROW), np.array(ROW)):
        assert said(asked(values(want)), answer) == "✓ right!"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([0.12345, -4.25, 1.0], "your answer has 2 wrong values among 3; the first is -4.25 at [1]."),
        (torch.tensor([0.12345, -4.125, 0.5]), "your answer has 1 wrong value among 3; the first is 0.5 at [2]."),
        ([0.12, -4.125, 0.0], "your answer has 1 wrong value among 3; the first is 0.12 at [0]."),
        ([0.12345, NAN, 0.0], "your answer has 1 wrong value among 3; the first is nan at [1]."),
        ([0.12345, -INFINITY, 0.0], "your answer has 1 wrong value among 3; the first is -inf at [1]."),
        ([0.12345, -4.125], "your answer has the shape (2,), which is not the one that is asked for."),
        (torch.tensor([ROW]), "your answer has the shape (1, 3), which is not the one that is asked for."),
        (1.5, "your answer is a single number, 1.5, where several are asked for."),
        ([True, False, True], "your answer has True and False where numbers are asked for."),
        (["1", "2", "3"], "your answer has something in it that is no number: '1'."),
        ([1.0, None, 2.0], "your answer has something in it that is no number: None."),
        ([1.0, [2.0], 3.0], "your answer has rows of different lengths."),
        ([2j, 1, 0], "your answer has complex numbers."),
        ({0: 1}, "your answer is a dictionary, and not a list of numbers."),
        ({1, 2, 3}, "your answer is a set, which has no order: make it a list."),
        pytest.param(map(float, ROW), "your answer is a map, which can be read only once: make it a list.", id="a map"),
        (None, "your answer is None, which is what a function without a return gives."),
    ],
    ids=repr,
)
def test_wrong_values_are_told_with_the_first_and_its_place(answer, told, said):
    assert said(asked(values(ROW)), answer) == f"✗ {told} Hint: Count first."


def test_whole_numbers_are_counts_and_compared_exactly(said):
    exercise = asked(values([1_000_000, 3]))
    assert said(exercise, [1_000_001, 3])[0] == "✗"
    assert said(exercise, torch.tensor([1e6, 3.0])) == "✓ right!"
    assert said(asked(values([[True, False]])), [[True, True]])[0] == "✗"
    assert said(asked(values([[True, False]])), torch.tensor([[True, False]])) == "✓ right!"


def test_values_that_are_infinite_or_not_a_number_can_be_wanted(said):
    exercise = asked(values([NAN, INFINITY, 1.0]))
    assert said(exercise, [NAN, INFINITY, 1.0]) == "✓ right!"
    assert said(exercise, [NAN, -INFINITY, 1.0])[0] == "✗"
    assert said(exercise, [0.0, INFINITY, 1.0])[0] == "✗"


@pytest.mark.parametrize("want", [[], None, "abc", [None], {}], ids=repr)
def test_wanted_values_must_be_numbers(want):
    with pytest.raises(ValueError, match=r"^want=.*must have numbers"):
        values(want)


# ---- function


def scaled(x):
    return x / x.abs().max()


CASES = {
    "a row": (torch.tensor([1.0, -2.0]),),
    "a matrix": (torch.tensor([[1.0, 4.0]]),),
    "one value": (torch.tensor([3.0]),),
}
SCALED = function(scaled, CASES)


@pytest.mark.parametrize(
    "answer",
    [
        scaled,
        lambda x: x / torch.linalg.vector_norm(x, float("inf")),
        lambda x: (x.double() / x.abs().max()).numpy(),
        lambda x: (x / x.abs().max()).tolist(),
        lambda x: x.half() / x.abs().max(),
        lambda x, factor=1: factor * x / x.abs().amax(),
    ],
)
def test_any_function_that_gives_the_same_is_right(answer, said):
    assert said(asked(SCALED), answer) == "✓ right!"


def changes_its_input(x):
    x /= x.abs().max()
    return x


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda x: x / x.max(), "in the case “a row” your function gives something that has 2 wrong values among 2; the first is 1 at [0]."),
        (lambda x: x.flatten() / x.abs().max(), "in the case “a matrix” your function gives something that has the shape (2,), which is not the one that is asked for."),
        (lambda x: x / x.abs().sort(stable=True).values.flatten()[-1] if x.numel() > 1 else x, "in the case “one value” your function gives something that has 3, which is not right."),
        (changes_its_input, "in the case “a row” your function changes what it is given, which later cells would notice: work on a copy."),
        (lambda x: print(end=""), "in the case “a row” your function gives None: does it end with a return?"),
        (lambda x: "1", "in the case “a row” your function gives something that is '1', which is text: leave the quotation marks out."),
        (lambda x: x > 0, "in the case “a row” your function gives something that has True and False where numbers are asked for."),
        (lambda: 1, "in the case “a row” your function raised TypeError: <lambda>() takes 0 positional arguments but 1 was given."),
        (1.5, "your answer is 1.5, and not a function: give its name alone, without calling it."),
        (None, "your answer is None, and not a function: give its name alone, without calling it."),
        (torch.ones(2), "your answer is a tensor of shape (2,), and not a function: give its name alone, without calling it."),
    ],
)  # fmt: skip
def test_a_wrong_function_is_told_with_its_case_and_what_it_gives(answer, told, said):
    if told.endswith("given."):
        told = said(asked(SCALED), answer)[2:].removesuffix(" Hint: Count first.")
        assert "raised TypeError" in told and "takes 0 positional arguments but 1 was given" in told
    assert said(asked(SCALED), answer) == f"✗ {told} Hint: Count first."
    assert CASES["a row"][0].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    "given", [[1, 2], {"a": [1.0]}, np.ones(2), torch.tensor([NAN, 1.0])], ids=lambda given: type(given).__name__
)
def test_a_change_of_any_kind_of_input_is_noticed_and_can_be_allowed(given, said):
    def clears(x):
        part = x["a"] if isinstance(x, dict) else x
        part[0] = 7
        return 1

    def keeps(x):
        return 1

    for may, answer, mark in ((False, clears, "✗"), (True, clears, "✓"), (False, keeps, "✓")):
        fault = function(lambda x: 1, {"one": (given,)}, may_change_its_input=may)
        assert said(asked(fault), answer)[0] == mark


def test_arguments_can_be_given_by_name(said):
    fault = function(
        lambda rank, alpha: alpha / rank, {"a half": {"rank": 16, "alpha": 8}, "both alike": {"rank": 8, "alpha": 8}}
    )
    assert said(asked(fault), lambda alpha, rank: alpha / rank) == "✓ right!"
    assert said(asked(fault), lambda alpha, rank: rank / alpha).startswith(
        "✗ in the case “a half” your function gives 2,"
    )


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        (1.5, [1.5, np.float32(1.5), torch.tensor(1.5), fractions.Fraction(3, 2)], [1, "1.5", None, True, [1.5, 1.5], NAN]),
        (torch.tensor(1.5), [1.5, torch.tensor([1.5])], [1.25, torch.ones(2)]),
        (True, [True, np.bool_(True), torch.tensor(True)], [1, "True", None, False]),
        (None, [None], [0, False, "None"]),
        ("NF4", ["NF4"], ["nf4", None, 4]),
        ((1.5, "a"), [(1.5, "a"), [1.5, "a"]], [(1.5,), (1.5, "b"), (1.25, "a"), "1a", 1.5, {1.5: "a"}]),
        ((torch.ones(2), 2), [(torch.ones(2), 2), [np.ones(2), 2.0]], [(torch.ones(3), 2), (torch.ones(2), 3)]),
        ([1, 2], [[1, 2], (1, 2), torch.tensor([1, 2])], [[2, 1], [1, 2, 3], 1]),
        (["a", "b"], [["a", "b"], ("a", "b")], [["b", "a"], ["a"], "ab", None]),
        ({"loss": 1.5, "step": 2}, [{"step": 2, "loss": 1.5}], [{"loss": 1.5}, {"loss": 1.5, "step": 3}, [("loss", 1.5), ("step", 2)]]),
        (INFINITY, [INFINITY, torch.tensor(INFINITY)], [-INFINITY, 1.0, NAN]),
        (NAN, [NAN], [0.0]),
        (1000, [1000, 1000.0], [1001, 999]),
        (torch.float32, [torch.float32], [torch.float16, "torch.float32"]),
        (torch.tensor([1000, 2]), [torch.tensor([1000, 2]), [1000, 2]], [torch.tensor([1001, 2])]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_results_of_any_kind_are_compared(wanted, right, wrong, said):
    exercise = asked(function(lambda: wanted, {"one": ()}))
    for given in right:
        assert said(exercise, lambda given=given: given) == "✓ right!", given
    for given in wrong:
        assert said(exercise, lambda given=given: given)[0] == "✗", given


def test_a_part_of_a_result_is_named(said):
    line = said(asked(function(lambda: {"loss": (1.5, 2.5)}, {"one": ()})), lambda: {"loss": (1.5, 3.5)})
    assert line.startswith(
        "✗ in the case “one” your function, under 'loss', as result 2, gives 3.5, which is not right."
    )


@pytest.mark.parametrize("cases", [{}, None, [(1,)], {"one": 1}, {"one": [1]}], ids=repr)
def test_cases_must_have_names_and_arguments(cases):
    with pytest.raises(ValueError, match=r"^cases.*must be a "):
        function(len, cases)


# ---- choice

FORMATS = {"NF4": ["normal float"], "INT4": [], "16 bit": [16, "bf16"]}


@pytest.mark.parametrize(
    ("right", "answer"),
    [("NF4", "nf4"), ("NF4", " N F-4 "), ("NF4", "'nf4'"), ("NF4", "normal_float"), ("NF4", "Normal-Float"), ("NF4", ["NF4"]),
     ("16 bit", 16), ("16 bit", "16bit"), ("16 bit", "BF16"), ({"NF4", "INT4"}, ["int4", "nf4"]), ({"NF4", "INT4"}, {"NF4", "INT4"}),
     ({"NF4"}, "NF4")],
)  # fmt: skip
def test_the_spelling_of_an_option_is_forgiven(right, answer, said):
    assert said(asked(choice(right, FORMATS)), answer) == "✓ right!"


@pytest.mark.parametrize(
    ("right", "answer", "told"),
    [
        ("NF4", "int4", "'int4' is not right."),
        ("NF4", "16-bit", "'16-bit' is not right."),
        ("NF4", "FP4", "your answer is 'FP4', which is none of: NF4, INT4, 16 bit."),
        ("NF4", "", "your answer is '', which is none of: NF4, INT4, 16 bit."),
        ("NF4", ["NF4", "INT4"], "your answer has 2 options, where one is asked for."),
        ({"NF4", "INT4"}, "NF4", "'NF4' is not right."),
        ({"NF4", "INT4"}, ["NF4", "16 bit"], "['NF4', '16 bit'] is not right."),
    ],
)
def test_another_option_is_wrong_and_what_is_none_is_told_so(right, answer, told, said):
    assert said(asked(choice(right, FORMATS)), answer) == f"✗ {told} Hint: Count first."


def test_options_that_cannot_be_told_apart_and_a_right_one_that_is_none_are_refused():
    with pytest.raises(ValueError, match="'n f 4' is two of them, since spelling is forgiven"):
        choice("NF4", ["NF4", "n f 4"])
    for right in ("FP4", {"NF4", "FP4"}, set()):
        with pytest.raises(ValueError, match=r"^right=.*must be one of NF4, INT4"):
            choice(right, ["NF4", "INT4"])
