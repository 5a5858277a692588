"""Checks of a value from outside: each returns it, or raises a ValueError with its name, the value and what is allowed.

Only what a single field means is checked here. What depends on other fields, a model or a GPU is checked where that is
known.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Collection, Iterable
from numbers import Real

__all__ = ["LARGEST", "number", "one_of", "refuse", "shown", "switch", "whole"]

LARGEST = 2**63 - 1  # what torch takes for a whole number
_LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # float32's


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 20

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write thousands of digits
        return repr(value) if value.bit_length() < 2_000 else f"an integer of {value.bit_length():,} bits"


def shown(value: object) -> str:
    """A value for a message: as Python shows it, cut if it is long."""
    text = _Short().repr(value)
    return text if len(text) <= 600 else f"{text[:600]}…"


def refuse(name: str, value: object, allowed: str) -> ValueError:
    """The error for a value that is not allowed; `allowed` begins with "must be" or names the cure."""
    return ValueError(f"{name}={shown(value)}: {allowed}")


def _is_boolean(value: object) -> bool:
    """Whether a value is a bool, or one of numpy's or torch's."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def whole(
    name: str,
    value: object,
    at_least: int = 1,
    at_most: int | None = None,
    among: Collection[int] = (),
    otherwise: str = "",
) -> int:
    """A whole number: an int, or what converts to one without loss, such as a numpy integer.

    Args:
        at_least, at_most: the least and the most that are allowed; by default the most is what 64 bits hold.
        among: if given, only these are allowed.
        otherwise: what else is allowed, for the message, such as "None for no checkpoints".
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    most = LARGEST if at_most is None else at_most
    held = number is not None and not _is_boolean(value) and at_least <= number <= most
    if not held or (among and number not in among):
        bounds = f"{at_least} or more" if at_most is None else f"{at_least} to {at_most}"
        if at_most is None and number is not None and number > LARGEST:
            bounds += ", in 64 bits"  # larger ones fail deep in torch
        kind = f"one of {', '.join(map(str, among))}" if among else f"a whole number, {bounds}"
        raise refuse(name, value, f"must be {kind}{otherwise and f', or {otherwise}'}")
    return number


def _plain(value: object) -> int | float | None:
    """A real number of any library as an int or a float; None for what is none, or is too large for a float."""
    if not isinstance(value, Real) or _is_boolean(value):
        return None
    try:
        as_float = float(value)
        return operator.index(value)
    except OverflowError:
        return None
    except TypeError:  # not a whole number
        return as_float


def number(
    name: str,
    value: object,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float = math.inf,
    below: float = math.inf,
    otherwise: str = "",
) -> float:
    """A finite number within its bounds; one of the lower bounds, `above` or `at_least`, must be given."""
    number = _plain(value)
    too_large = number is not None and _LARGEST_FLOAT < abs(number) < math.inf  # fails deep in torch
    held = number is not None and math.isfinite(number) and number < below and number <= at_most and not too_large
    if above is not None:
        held, bound = held and number > above, f"more than {above:g}"
    else:
        bound = f"{at_least:g} or more" if at_most == math.inf else f"{at_least:g} to {at_most:g}"
        held = held and number >= at_least
    if not held:
        less = ", that float32 can hold" if too_large else "" if below == math.inf else f" and less than {below:g}"
        raise refuse(name, value, f"must be a number, {bound}{less}{otherwise and f', or {otherwise}'}")
    return number


def one_of(name: str, value: object, known: Iterable[str], otherwise: str = "") -> str:
    """One of the known names."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise refuse(name, value, f"choose one of {', '.join(known)}{otherwise and f', or {otherwise}'}")
    return known[known.index(value)]  # a plain text, where the value is one of numpy's


def switch(name: str, value: object) -> bool:
    """True or False, or one of numpy's; nothing that merely counts as one of them."""
    of_numpy = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")  # and no array of them
    if not (isinstance(value, bool) or of_numpy):
        raise refuse(name, value, "must be True or False")
    return bool(value)
