"""An exercise prints one line for any answer, never raises for what a learner wrote, and never tells the right answer."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from qlora_helpers.course.exercises.asking import choice, function, number, values
from qlora_helpers.course.exercises.judging import ExerciseBroken
from tests.course.exercises.made_up import SAID, asked

NAN, INFINITY = float("nan"), float("inf")
NOT_SOLVED = f"○ {SAID}not solved yet. Replace the dots (...) in the cell above, run that cell, then run this one.\n"


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


def test_a_model_with_other_weights_is_another_answer_and_the_same_one_loaded_again_is_not(said):
    exercise = asked(lambda model: "it does not learn.")

    def model(value: float):
        made = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(made.weight, value)
        torch.nn.init.zeros_(made.bias)
        return made

    assert said(exercise, model(1.0)).endswith("Count first.")
    assert said(exercise, model(1.0)).endswith("Count first.")
    assert said(exercise, model(2.0)).endswith("Use a table.")


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
