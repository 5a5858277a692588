"""An exercise: what it is called, how long it takes, and whether an answer to it is right.

    entropy = Exercise(
        number="2.1", title="the bits in a code", kind="build", difficulty="medium", minutes=10,
        hints=("a first hint", "a stronger one"),
        fault=function(reference, cases={"one code only": (torch.tensor([1.0]),), "equal shares": (torch.ones(4) / 4,)}),
    )
    entropy.check(entropy_of_the_learner)

`check` prints one line and never raises for what a learner wrote. No line has the right answer in it. Whether an answer
is right is decided by `fault`: a function that returns an empty string, or says what is wrong. `number`, `values`,
`function` and `choice` make such functions.

The room loads no library: torch and NumPy are used if the answer, or the wanted value, comes from them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import random
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.course.exercises.judging import ExerciseBroken, Fault
from qlora_helpers.course.exercises.judging import choice as choice  # with the three below, for the lessons' modules
from qlora_helpers.course.exercises.judging import function as function
from qlora_helpers.course.exercises.judging import number as number
from qlora_helpers.course.exercises.judging import values as values
from qlora_helpers.course.exercises.reading import as_array, is_array, is_tensor, raised

__all__ = ["DIFFICULTIES", "KINDS", "Exercise"]

KINDS = ("predict", "build", "run")
DIFFICULTIES = ("easy", "medium", "hard")
NOT_SOLVED = "not solved yet. Replace the dots (...) in the cell above, run that cell, then run this one."


class _Dots(BaseException):
    """A learner's function has given back the dots of its stub. No fault's own `except Exception` may catch this."""


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson.

    Args:
        number: the lesson's number and its own, such as "2.1".
        title: what it is about, in a few words.
        kind: "predict" (think first), "build" (write it), or "run" (configure, train or debug a real run).
        difficulty: "easy", "medium" or "hard".
        minutes: how long it takes, about.
        hints: two or more, each stronger than the one before. None may have the answer in it.
        fault: called with the answer, and by name with what else the lesson knows; empty if the answer is right, and
            otherwise what is wrong with it.

    Raises:
        ValueError: a field is not one of these.
    """

    number: str
    title: str
    kind: str
    difficulty: str
    minutes: int
    hints: Sequence[str]
    fault: Fault = field(repr=False)
    _wrong: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> ValueError:
            return ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")

        if not isinstance(self.number, str) or not re.fullmatch(r"[1-9]\d*\.[1-9]\d*", self.number):
            raise refuse("number", "the lesson's number and the exercise's, such as '2.1'")
        if not isinstance(self.title, str) or not self.title.strip() or "\n" in self.title:
            raise refuse("title", "a few words on one line")
        for name, allowed in (("kind", KINDS), ("difficulty", DIFFICULTIES)):
            if getattr(self, name) not in allowed:
                raise refuse(name, f"one of {', '.join(allowed)}")
        if isinstance(self.minutes, bool) or not isinstance(self.minutes, int) or self.minutes < 1:
            raise refuse("minutes", "a whole number, 1 or more")
        is_list = isinstance(self.hints, Sequence) and not isinstance(self.hints, str)
        if not is_list or len(self.hints) < 2 or not all(isinstance(hint, str) and hint.strip() for hint in self.hints):
            raise refuse("hints", "two texts or more, each stronger than the one before")
        if not callable(self.fault):
            raise refuse("fault", "a function of the answer, such as number(4.5)")

    @property
    def heading(self) -> str:
        """The exercise's heading in its lesson, in Markdown."""
        return f"## Exercise {self.number}: {self.title}"

    @property
    def effort(self) -> str:
        """What the line below the heading begins with, in Markdown."""
        minutes = "1 minute" if self.minutes == 1 else f"{self.minutes} minutes"
        return f"*{self.kind.capitalize()} · {self.difficulty} · about {minutes}.*"

    def check(self, answer: Any, **given: Any) -> None:
        """Print whether an answer is right; `...` means not solved yet. What a learner wrote never makes it raise.

        Args:
            given: what the exercise needs from the lesson, by name.

        Raises:
            ExerciseBroken: not the answer but the exercise is at fault.
            TypeError: what is `given` is not what the exercise takes.
        """
        said = f"Exercise {self.number}, {self.title.rstrip('?')}"  # a colon follows
        fault = self.judge(answer, **given)
        if fault is None:
            print(f"○ {said}: {NOT_SOLVED}")
        elif not fault:
            print(f"✓ {said}: right!")
        else:
            tried = f"{fault} {_identity(answer)}"
            if tried not in self._wrong:  # the same answer once more earns no stronger hint
                self._wrong.append(tried)
            hint = self.hints[min(len(self._wrong), len(self.hints)) - 1]
            print(f"✗ {said}: {fault} Hint: {hint}")

    def judge(self, answer: Any, **given: Any) -> str | None:
        """What is wrong with an answer, in words; empty if it is right, None if it is not solved yet.

        Raises:
            ExerciseBroken, TypeError: as for `check`.
        """
        inspect.signature(self.fault).bind(answer, **given)  # what is not given is the lesson's fault
        with _dice_kept():
            try:
                fault = None if _has_dots(answer) else self.fault(_asked(answer), **given)
            except _Dots:
                return None
            except ExerciseBroken:
                raise
            except (Exception, SystemExit) as error:  # a learner's code may fail in any way; the failure is shown
                return None if _is_of_dots(error) else raised("your code", error)
        if not (fault is None and _has_dots(answer)) and not isinstance(fault, str):
            raise ExerciseBroken(f"Exercise {self.number}: its fault gave {fault!r}, and not a text")
        return fault


@contextlib.contextmanager
def _dice_kept() -> Iterator[None]:
    """Leave the random numbers of Python, NumPy and torch as they were, so that a check changes nothing after it."""
    python = random.getstate()
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    of_numpy = numpy.random.get_state() if numpy else None
    of_torch = torch.get_rng_state() if torch else None
    try:
        yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(of_numpy)
        if torch:
            torch.set_rng_state(of_torch)


# ---- Dots, and who gave what


def _has_dots(answer: Any) -> bool:
    """Whether an answer is the dots of a stub, or a list, tuple or dictionary with dots left in it."""
    if isinstance(answer, Mapping):
        return any(map(_has_dots, answer.values()))
    if isinstance(answer, list | tuple | Set):
        return any(map(_has_dots, answer))
    return answer is ...


def _is_of_dots(error: BaseException) -> bool:
    """Whether an error comes from computing with dots that were left in."""
    return "ellipsis" in str(error).lower()


def _only_dots(x): ...


def _only_dots_and_words(x):
    """Words."""


def _is_stub(function: types.FunctionType) -> bool:
    """Whether a function has nothing but dots, or words, in its body."""
    stubs = {_only_dots.__code__.co_code, _only_dots_and_words.__code__.co_code}
    return function.__code__.co_code in stubs


def _asked(answer: Any) -> Any:
    """An answer; a function among answers tells when it gives back dots, or computes with them."""
    if not isinstance(answer, types.FunctionType):
        return answer

    @functools.wraps(answer)
    def asked(*arguments: Any, **named: Any) -> Any:
        try:
            got = answer(*arguments, **named)
        except Exception as error:
            if _is_of_dots(error):
                raise _Dots from error
            raise
        if _has_dots(got) or (got is None and _is_stub(answer)):
            raise _Dots
        return got

    return asked


def _identity(answer: Any) -> str:
    """A text that two answers share only if they are alike: a function by its code, numbers and models by their values."""
    try:
        if isinstance(answer, types.FunctionType):
            said = repr([answer.__defaults__, *_parts(answer.__code__)])
        elif is_tensor(answer) or is_array(answer):
            array = as_array(answer)
            said = array if isinstance(array, str) else f"{array.shape}{array.tobytes()!r}"
        elif hasattr(answer, "named_parameters"):  # a model: two of one architecture have the same repr
            values = [(name, weight.double().sum().item()) for name, weight in answer.named_parameters()]
            said = f"{answer!r}{values}"
        else:
            said = repr(answer)
    except Exception:  # of a learner's own class
        said = type(answer).__name__
    return hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()


def _parts(code: types.CodeType) -> Iterator[tuple]:
    """What code does, without the place in which it is written; also the code of the functions within it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    yield code.co_code, [constant for constant in code.co_consts if constant not in inner], code.co_names
    for part in inner:
        yield from _parts(part)
