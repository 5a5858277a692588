"""Whether an answer is right: `number`, `values`, `function` and `choice` make the functions that say what is wrong.

They are called with the answer, and by name with what else the lesson gives. They return an empty text if it is right.
Otherwise they say what is wrong, and never what was wanted.
"""

from __future__ import annotations

import copy
import decimal
import fractions
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from numbers import Real
from typing import Any

from qlora_helpers.course.exercises.reading import (
    ZERO,
    as_array,
    epsilon,
    exact,
    is_array,
    is_finite,
    is_tensor,
    near,
    one_number,
    raised,
    rounding,
    shown,
)

__all__ = ["ExerciseBroken", "Fault", "choice", "function", "number", "values"]

Fault = Callable[..., str]


class ExerciseBroken(RuntimeError):
    """The exercise itself is at fault, and not the answer: its reference or its wanted value cannot be computed."""


def _when_asked(want: Any, plain: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function that gives the wanted value, checked by `plain`; one that only the lesson knows is computed from it.

    Raises:
        ValueError: by `plain`, at once, if the value is there already; later that is an ExerciseBroken.
    """
    if not callable(want):
        ready = plain(want)
        return lambda **given: ready

    def asked(**given: Any) -> Any:
        try:
            return plain(want(**given))
        except Exception as error:
            raise ExerciseBroken(f"the exercise cannot be judged: {type(error).__name__}: {error}") from error

    return asked


def _tolerance(rel: float | None) -> float | None:
    is_number = isinstance(rel, int | float) and not isinstance(rel, bool)
    if rel is not None and not (is_number and math.isfinite(rel) and rel > 0):
        raise ValueError(f"rel={rel!r}: must be a positive number")
    return rel


def _allowed(rel: float | None, is_whole: bool, usual: float) -> float:
    """The relative tolerance: what was said, or the usual one; a whole number is a count, which is right or wrong."""
    if rel is not None:
        return rel
    return 0.0 if is_whole else usual


def number(want: Any, rel: float | None = None) -> Fault:
    """Right is one number: a Python number, Fraction or Decimal, or one of NumPy or torch with a single element.

    It may be off by `rel` of its size, or rounded: by half a unit of the answer's own last digit, if it has three
    significant digits or more. So 4.13 is right for 4.125, and 4.1 is not.

    Args:
        want: the number, or a function that computes it from what the lesson gives by name.
        rel: by default a millionth; nothing if `want` is an integer, since a count is right or wrong.

    Raises:
        ValueError: `want` is no finite number, or `rel` is not a positive one.
    """
    rel = _tolerance(rel)

    def plain(value: Any) -> Real | decimal.Decimal:
        found = one_number(value)
        if isinstance(found, str) or not is_finite(found[0]):
            raise ValueError(f"want={value!r}: must be a finite number, or a function that computes it")
        return found[0]

    wanted = _when_asked(want, plain)

    def fault(answer: Any, **given: Any) -> str:
        want = wanted(**given)
        found = one_number(answer)
        if isinstance(found, str):
            return found
        got, coarse = found
        if not is_finite(got):
            return f"your answer is {got}."
        allowed = max(_allowed(rel, isinstance(want, int), 1e-6), coarse)
        return "" if near(got, want, allowed) else f"{shown(got)} is not right."

    return fault


MOST_READ = 100_000  # values whose digits are counted one by one


def values(want: Any, rel: float | None = None) -> Fault:
    """Right are these numbers in this order and shape: in a list, a tuple, a NumPy array or a tensor of any float dtype.

    Each may be off by `rel` of its size or by what its dtype cannot tell apart, or be rounded as for `number`.

    Args:
        want: the numbers, or a function that computes them from what the lesson gives by name.
        rel: by default 0.00001; nothing if all that is wanted are integers.

    Raises:
        ValueError: `want` has no numbers, or `rel` is not a positive number.
    """
    rel = _tolerance(rel)

    def plain(value: Any) -> Any:
        array = as_array(value)
        if isinstance(array, str) or not array.size:
            raise ValueError(f"want={shown(value)}: must have numbers, or be a function that computes them")
        return array

    wanted = _when_asked(want, plain)

    def fault(answer: Any, **given: Any) -> str:
        return _fault_of_values(answer, wanted(**given), rel)

    return fault


def _fault_of_values(answer: Any, want: Any, rel: float | None, who: str = "your answer") -> str:
    """What is wrong with several numbers; `want` is a NumPy array."""
    import numpy

    array = as_array(answer)
    if isinstance(array, str):
        return f"{who} {array}."
    if array.dtype.kind == "b" and want.dtype.kind != "b":
        return f"{who} has True and False where numbers are asked for."
    if array.shape != want.shape:
        if not array.shape:
            return f"{who} is a single number, {shown(array.item())}, where several are asked for."
        return f"{who} has the shape {array.shape}, which is not the one that is asked for."
    coarse = max([epsilon(answer), *(map(epsilon, answer) if isinstance(answer, list | tuple) else ())])
    allowed = max(_allowed(rel, want.dtype.kind != "f", 1e-5), coarse)
    wanted, got = want.astype("float64"), array.astype("float64")
    with numpy.errstate(invalid="ignore"):
        size = numpy.abs(wanted)
        largest = size[numpy.isfinite(size)].max(initial=0)
        fits = numpy.abs(got - wanted) <= allowed * size + ZERO * (largest or 1) * (want.dtype.kind == "f")
    fits &= numpy.isfinite(wanted)
    fits |= (got == wanted) | (numpy.isnan(got) & numpy.isnan(wanted))
    wrong = [tuple(int(i) for i in place) for place in numpy.argwhere(~fits)]
    if len(wrong) <= MOST_READ:
        short = array.astype("float32") if is_tensor(answer) and answer.dtype.itemsize <= 4 else array
        wrong = [place for place in wrong if not _rounded(short[place], wanted[place])]
    if not wrong:
        return ""
    where = f" at {_place(wrong[0])}" if array.shape else ""
    first = shown(float(got[wrong[0]])) if array.dtype.kind == "f" else shown(array[wrong[0]].item())
    if array.size == 1:
        return f"{who} has {first}, which is not right."
    return f"{who} has {len(wrong):,} wrong value{'s' * (len(wrong) > 1)} among {array.size:,}; the first is {first}{where}."


def _place(index: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, index))}]"


def _rounded(got: Any, want: float) -> bool:
    """Whether a value of an array is the wanted one, rounded."""
    if not (math.isfinite(got) and math.isfinite(want)):
        return False
    plain = float(str(got)) if got.dtype.kind == "f" else int(got)  # with no more digits than its dtype has
    return abs(exact(plain) - exact(want)) <= rounding(plain) * (1 + fractions.Fraction(1, 10**9))


def function(
    reference: Callable[..., Any],
    cases: Mapping[str, Any] | Callable[..., Mapping[str, Any]],
    rel: float | None = None,
    may_change_its_input: bool = False,
) -> Fault:
    """Right is a function that gives what `reference` gives, in every case. The first case that fails is named.

    Each call gets copies of a case's arguments. Numbers and tensors are compared as by `number` and `values`, several
    results one by one, and everything else by equality.

    Args:
        cases: for each name, a tuple of arguments or a dictionary of them by name; or a function that makes them from
            what the lesson gives by name, if they are large or only the lesson knows them.
        rel: as for `number` and `values`, by what the reference gives.
        may_change_its_input: such as a step of an optimizer. Otherwise a change of its arguments is a fault.

    Raises:
        ValueError: there are no cases, one is neither a tuple nor a dictionary, or `rel` is not a positive number.
    """
    rel = _tolerance(rel)

    def plain(cases: Any) -> Mapping[str, Any]:
        if not isinstance(cases, Mapping) or not cases:
            raise ValueError(f"cases={shown(cases)}: must be a dictionary with a name for each case")
        for name, arguments in cases.items():
            if not isinstance(arguments, tuple | dict):
                raise ValueError(f"cases[{name!r}]={shown(arguments)}: must be a tuple of arguments, or a dictionary")
        return cases

    tried = _when_asked(cases, plain)

    def fault(answer: Any, **given: Any) -> str:
        if not callable(answer):
            said = "None" if answer is None else shown(answer)
            return f"your answer is {said}, and not a function: give its name alone, without calling it."
        for name, arguments in tried(**given).items():
            try:
                wanted = _called(reference, copy.deepcopy(arguments))
            except Exception as error:
                raise ExerciseBroken(f"the reference fails in the case {name!r}: {error}") from error
            mine = copy.deepcopy(arguments)
            case = f"in the case “{name}” your function"
            try:
                got = _called(answer, mine)
            except (Exception, SystemExit) as error:  # a learner's code may fail in any way; the failure is shown
                return raised(case, error)
            if wrong := _fault_of_result(got, wanted, rel, case):
                return wrong
            if not may_change_its_input and not _unchanged(mine, arguments):
                return f"{case} changes what it is given, which later cells would notice: work on a copy."
        return ""

    return fault


def _called(function: Callable[..., Any], arguments: tuple | dict) -> Any:
    return function(**arguments) if isinstance(arguments, dict) else function(*arguments)


def _fault_of_result(got: Any, want: Any, rel: float | None, case: str) -> str:
    """What is wrong with what a function gave back, beginning with its case."""
    if got is None and want is not None:
        return f"{case} gives None: does it end with a return?"
    if is_tensor(want) or is_array(want):
        if not want.shape:
            return _fault_of_one(got, want, rel, case)
        return _fault_of_values(got, as_array(want), rel, f"{case} gives something that")
    if isinstance(want, bool) or want is None or isinstance(want, str):
        plain = got.item() if (is_tensor(got) or is_array(got)) and not got.shape else got  # numpy's bool is a bool
        same = type(plain) is type(want) and plain == want
        return "" if same else f"{case} gives {shown(got)}, which is not right."
    if isinstance(want, Real | decimal.Decimal):
        return _fault_of_one(got, want, rel, case)
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping):
            return f"{case} gives {shown(got)}, and not a dictionary."
        if set(got) != set(want):
            return f"{case} gives a dictionary with the keys {shown(list(got))}, which are not those asked for."
        return next(
            (
                wrong
                for key in want
                if (wrong := _fault_of_result(got[key], want[key], rel, f"{case.removesuffix(',')}, under {key!r},"))
            ),
            "",
        )
    if isinstance(want, list | tuple):
        numbers = as_array(want)
        if not isinstance(numbers, str) and numbers.ndim == 1 and not isinstance(want, tuple):
            return _fault_of_values(got, numbers, rel, f"{case} gives something that")
        several = (
            got.shape if is_tensor(got) or is_array(got) else isinstance(got, Sequence) and not isinstance(got, str)
        )
        if not several:
            return f"{case} gives {shown(got)}, and not several results."
        if len(got) != len(want):
            return f"{case} gives {len(got)} result{'s' * (len(got) != 1)}, which is not as many as asked for."
        parts = zip(got, want, strict=True)
        found = (
            _fault_of_result(one, other, rel, f"{case.removesuffix(',')}, as result {at},")
            for at, (one, other) in enumerate(parts, 1)
        )
        return next((wrong for wrong in found if wrong), "")
    try:
        return "" if bool(got == want) else f"{case} gives {shown(got)}, which is not right."
    except (TypeError, ValueError, RuntimeError):  # what cannot be compared is not equal
        return f"{case} gives {shown(got)}, which is not right."


def _fault_of_one(got: Any, want: Any, rel: float | None, case: str) -> str:
    plain = one_number(want)
    if isinstance(plain, str):
        raise ExerciseBroken(f"the reference gives {shown(want)}")
    found = one_number(got)
    if isinstance(found, str):
        return f"{case}: {found.replace('your answer is', 'it gives', 1).replace('your answer', 'what it gives', 1)}"
    value, coarse = found
    if not is_finite(plain[0]):
        same = value == plain[0] or (math.isnan(plain[0]) and math.isnan(value))
        return "" if same else f"{case} gives {shown(value)}, which is not right."
    if not is_finite(value):
        return f"{case} gives {value}."
    allowed = max(_allowed(rel, isinstance(plain[0], int), 1e-5), coarse)
    return "" if near(value, plain[0], allowed) else f"{case} gives {shown(value)}, which is not right."


def _unchanged(now: Any, before: Any) -> bool:
    """Whether arguments are as they were; what is no tensor, array, number, text, list or dictionary is not compared."""
    if is_tensor(before):
        torch = sys.modules["torch"]
        if now.shape != before.shape or now.dtype != before.dtype:
            return False
        return before.device.type == "meta" or bool(
            torch.equal(now, before) or torch.equal(torch.nan_to_num(now), torch.nan_to_num(before))
        )
    if is_array(before):
        numpy = sys.modules["numpy"]
        return now.shape == before.shape and numpy.array_equal(now, before, equal_nan=before.dtype.kind in "fc")
    if isinstance(before, Mapping):
        return list(now) == list(before) and all(_unchanged(now[key], before[key]) for key in before)
    if isinstance(before, list | tuple):
        return len(now) == len(before) and all(map(_unchanged, now, before))
    if isinstance(before, int | float | str | None):
        return now == before or now != now
    return True


def choice(right: Any, options: Collection[str] | Mapping[str, Collection[Any]]) -> Fault:
    """Right is one of the options, or several of them. Case, blanks, hyphens and underscores do not matter.

    Args:
        right: an option; a set of options, all of which must be named; or a function that gives it.
        options: the options; or a dictionary that says for each how it may also be written, such as
            `{"rank": ["r"], "alpha": ["lora_alpha"]}`.

    Raises:
        ValueError: two options cannot be told apart, or `right` is none of them.
    """
    spelt: dict[str, str] = {}
    for option in options:
        for spelling in (option, *(options[option] if isinstance(options, Mapping) else ())):
            if spelt.setdefault(_plain(spelling), option) != option:
                raise ValueError(f"options={list(options)}: {spelling!r} is two of them, since spelling is forgiven")
    listed = ", ".join(map(str, options))

    def chosen(right: Any) -> set[str]:
        several = {right} if isinstance(right, str) else set(right)
        if not several or not several <= set(options):
            raise ValueError(f"right={right!r}: must be one of {listed}, or a set of them")
        return several

    right_ones = _when_asked(right, chosen)

    def fault(answer: Any, **given: Any) -> str:
        wanted = right_ones(**given)
        several = isinstance(answer, list | tuple | Set) and not isinstance(answer, str)
        answers = list(answer) if several else [answer]
        unknown = [one for one in answers if _plain(one) not in spelt]
        if unknown:
            return f"your answer is {shown(unknown[0])}, which is none of: {listed}."
        if len(wanted) == 1 and len(answers) != 1:
            return f"your answer has {len(answers)} options, where one is asked for."
        if {spelt[_plain(one)] for one in answers} == wanted:
            return ""
        return f"{shown(answer) if several else shown(str(answer))} is not right."

    return fault


def _plain(text: Any) -> str:
    """A word without what does not matter in it."""
    return re.sub(r"[\s_\-‐-―'\"`]", "", unicodedata.normalize("NFKC", str(text)).casefold())
