"""An exercise prints one line for any answer, never raises for what a learner wrote, and never tells the right answer."""

import decimal
import fractions
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from qlora_helpers.course.exercises.asking import Exercise, choice, function, number, values
from qlora_helpers.course.exercises.judging import ExerciseBroken

NAN, INFINITY = float("nan"), float("inf")
SAID = "Exercise 2.1, the bits in a code: "
NOT_SOLVED = f"○ {SAID}not solved yet. Replace the dots (...) in the cell above, run that cell, then run this one.\n"


def asked(fault, **fields) -> Exercise:
    usual = {"number": "2.1", "title": "the bits in a code", "kind": "build", "difficulty": "medium", "minutes": 10}
    return Exercise(**usual | {"hints": ("Count first.", "Use a table.")} | fields, fault=fault)


@pytest.fixture
def said(capsys):
    """What `check` prints for an answer, without the part that is the same for all."""

    def line(exercise, answer, **given):
        exercise.check(answer, **given)
        printed = capsys.readouterr().out
        assert printed.endswith("\n") and printed[2:].startswith(SAID), printed
        return printed[0] + " " + printed[2 + len(SAID) : -1]

    return line


# ---- The lines


def test_dots_are_not_solved_yet(capsys):
    for answer in (..., [1, ...], (..., 2), {"rank": ...}, [[1, ...]]):
        asked(number(4.5)).check(answer)
        assert capsys.readouterr().out == NOT_SOLVED


def test_a_stub_is_not_solved_yet_whatever_it_does_with_its_dots(capsys):
    def gives_dots(x):
        return ...

    def gives_some_dots(x):
        return x, ...

    def dots(x): ...

    def words(x):
        """The bits."""

    def half(x):
        part = ...
        return part + x

    def another_half(x):
        part = ...
        return part.sum()

    def of_torch(x):
        return torch.tensor(...)

    for stub in (gives_dots, gives_some_dots, dots, words, half, another_half, of_torch):
        for fault in (function(lambda x: x, {"one": (1,)}), lambda answer: "" if answer(2) == 4 else "no", swallowing):
            asked(fault).check(stub)
            assert capsys.readouterr().out == NOT_SOLVED, stub.__name__


def swallowing(answer) -> str:
    """A fault that catches all errors itself."""
    try:
        return "" if answer(2) == 4 else "it is not four"
    except Exception as error:
        return f"it raised {error}"


def test_a_right_answer_is_called_right(said):
    assert said(asked(number(4.5)), 4.5) == "✓ right!"


def test_a_wrong_answer_is_told_with_the_first_hint_and_then_the_stronger_one(said):
    exercise = asked(number(4.5))
    assert said(exercise, 4) == "✗ 4 is not right. Hint: Count first."
    assert said(exercise, 4) == "✗ 4 is not right. Hint: Count first."  # the same once more is no new try
    assert said(exercise, 5) == "✗ 5 is not right. Hint: Use a table."
    assert said(exercise, 6) == "✗ 6 is not right. Hint: Use a table."  # there is no stronger one
    assert said(exercise, 4.5) == "✓ right!"


def test_a_function_that_was_written_anew_is_another_answer_and_one_that_was_run_again_is_not(said):
    exercise = asked(function(lambda x: x + 1, {"one": (1,)}))
    source = "def f(x):\n    return {}\n"

    def made(body, blank_lines=0):
        names = {}
        exec(compile("\n" * blank_lines + source.format(body), "cell", "exec"), names)
        return names["f"]

    assert said(exercise, made("x")).endswith("gives 1, which is not right. Hint: Count first.")
    assert said(exercise, made("x", 3)).endswith("Hint: Count first.")
    assert said(exercise, made("x * 1")).endswith("Hint: Use a table.")  # although it gives the same


def test_a_changed_tensor_is_another_answer(said):
    exercise = asked(values([1.0, 2.0]))
    assert said(exercise, torch.tensor([1.0, 3.0])).endswith("Hint: Count first.")
    assert said(exercise, torch.tensor([1.0, 3.0])).endswith("Hint: Count first.")
    assert said(exercise, torch.tensor([0.0, 3.0])).endswith("Hint: Use a table.")


def test_heading_and_effort_are_what_a_lesson_shows():
    exercise = asked(number(1.5))
    assert exercise.heading == "## Exercise 2.1: the bits in a code"
    assert exercise.effort == "*Build · medium · about 10 minutes.*"
    assert asked(number(1.5), minutes=1).effort.endswith("about 1 minute.*")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", "2"), ("number", 2.1), ("number", "2.01"), ("title", " "), ("title", "a\nb"), ("kind", "guess"),
        ("difficulty", "fiendish"), ("minutes", 0), ("minutes", "10"), ("minutes", True), ("hints", ("one",)),
        ("hints", "two"), ("hints", ("one", " ")), ("fault", 4.5),
    ],
)  # fmt: skip
def test_a_field_that_is_none_of_its_kind_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"^{field}=.*: must be "):
        asked(**{"fault": number(1.5)} | {field: value})


def test_a_fault_of_the_lesson_is_not_told_as_the_learner_s():
    with pytest.raises(TypeError, match="books"):
        asked(lambda answer, *, books: "").check(1)
    with pytest.raises(ExerciseBroken, match="cannot be judged: TypeError"):
        asked(number(lambda books: books)).check(1)
    with pytest.raises(ExerciseBroken, match="cannot be judged: ValueError: want=nan"):
        asked(number(lambda: NAN)).check(1)
    with pytest.raises(ExerciseBroken, match="the reference fails in the case 'one': division by zero"):
        asked(function(lambda x: x / 0, {"one": (1,)})).check(lambda x: x)
    for nothing in (None, True):
        with pytest.raises(ExerciseBroken, match=f"its fault gave {nothing}, and not a text"):
            asked(lambda answer, nothing=nothing: nothing).check(1)


def test_what_only_the_lesson_knows_is_given(said):
    assert said(asked(number(lambda loss: loss / 2)), 1.5, loss=3) == "✓ right!"
    assert said(asked(values(lambda weights: weights * 2)), [2.0, 4.0], weights=torch.tensor([1.0, 2.0])) == "✓ right!"
    assert said(asked(choice(lambda best: best, ["NF4", "INT4"])), "nf4", best="NF4") == "✓ right!"
    cases = function(torch.sum, lambda weights: {"all": (weights,)})
    assert said(asked(cases), lambda x: x.sum(), weights=torch.ones(3)) == "✓ right!"


def test_a_check_leaves_the_random_numbers_as_they_were(said):
    def noisy(x):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        return x

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = torch.get_rng_state().sum(), np.random.get_state()[1].sum(), random.getstate()
    assert said(asked(function(lambda x: x, {"one": (1,)})), noisy) == "✓ right!"
    assert before == (torch.get_rng_state().sum(), np.random.get_state()[1].sum(), random.getstate())


def test_asking_loads_no_library():
    code = "import sys; import qlora_helpers.course.exercises.asking; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---- The learner's code


class Strange:
    def __repr__(self):
        raise RuntimeError("no words")

    def __eq__(self, other):
        raise RuntimeError("no comparison")

    __hash__ = None


ENDLESS = []
ENDLESS.append(ENDLESS)
UNUSUAL = [None, True, "4.5", b"4.5", 2j, NAN, INFINITY, -INFINITY, 10**400, {}, {1}, object(), Strange(), ENDLESS, len, int,
           iter([1]), torch.ones(2, 2), torch.ones(1, device="meta"), torch.tensor([1 + 2j]), torch.empty(0), torch.nn.Linear(1, 1),
           np.array(["a"]), np.array([None]), [1, [2, 3]], range(3), slice(1), lambda: 1, torch.float32, Exception("x"),
           torch.ones(2).to_sparse(), torch.ones(2, requires_grad=True), np.bool_(True), np.datetime64("2020")]  # fmt: skip


@pytest.mark.parametrize("answer", UNUSUAL, ids=lambda answer: type(answer).__name__)
def test_nothing_that_a_learner_gives_raises_or_is_right(answer, said):
    for fault in (
        number(4.25),
        values([4.25, 7.75]),
        choice("a", ["a", "b"]),
        function(lambda x: x + 1, {"one": (1.5,)}),
    ):
        line = said(asked(fault), answer)
        assert line.startswith("✗ ") and line.endswith(" Hint: Count first."), line
        assert "4.25" not in line and "7.75" not in line and "2.5" not in line


@pytest.mark.parametrize("given", UNUSUAL, ids=lambda given: type(given).__name__)
def test_nothing_that_a_learner_s_function_gives_raises_or_is_right(given, said):
    for wanted in (4.25, torch.tensor([4.25, 7.75]), [4.25, 7.75], (4.25, "a"), {"a": 4.25}, "a", False):
        line = said(asked(function(lambda x, wanted=wanted: wanted, {"one": (1,)})), lambda x: given)
        assert line.startswith("✗ in the case “one” your function"), line
        assert "4.25" not in line and "7.75" not in line


@pytest.mark.parametrize("leave", [sys.exit, lambda: sys.exit("no")], ids=["without", "with a message"])
def test_code_that_ends_python_is_shown(leave, said):
    assert said(asked(function(lambda: 1, {"one": ()})), leave).startswith(
        "✗ in the case “one” your function raised SystemExit"
    )
    assert said(asked(lambda answer: answer() or ""), leave).startswith("✗ your code raised SystemExit")


def test_an_error_of_a_learner_s_code_is_told_with_its_case(said):
    cases = {"several codes": (torch.tensor([0.5, 0.5]),), "one code only": (torch.tensor([1.0]),)}

    def fails(shares):
        return 1.0 if len(shares) > 1 else shares[1]

    line = said(asked(function(lambda shares: float(len(shares) - 1), cases)), fails)
    assert line.startswith("✗ in the case “one code only” your function raised IndexError: index 1 is out of bounds")
    assert said(asked(lambda answer: answer.shape), 3).startswith("✗ your code raised AttributeError: 'int' object has")


def test_code_that_recurses_without_end_is_shown_and_a_learner_may_interrupt(said):
    def endless(x):
        return endless(x)

    fault = function(lambda x: x, {"one": (1,)})
    assert said(asked(fault), endless).startswith("✗ in the case “one” your function raised RecursionError")

    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked(fault).check(interrupted)


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
        (map(float, ROW), "your answer is a map, which can be read only once: make it a list."),
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
