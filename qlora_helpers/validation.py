"""Checks of a value from outside: each returns it, or raises a ValueError with its name, the value and what is allowed.

Only what a single field means is checked here. What depends on other fields, a model or a GPU is checked where that is
known.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable
from numbers import Real

__all__ = ["number", "one_of", "refuse", "switch", "whole"]


def refuse(name: str, value: object, allowed: str) -> ValueError:
    """The error for a value that is not allowed; `allowed` begins with "must be" or names the cure."""
    return ValueError(f"{name}={value!r}: {allowed}")


def whole(name: str, value: object, at_least: int = 1, among: Collection[int] = (), otherwise: str = "") -> int:
    """A whole number: an int, or what converts to one without loss, such as a numpy integer.

    Args:
        at_least: the least that is allowed.
        among: if given, only these are allowed.
        otherwise: what else is allowed, for the message, such as "None for no checkpoints".
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < at_least or (among and number not in among):
        kind = f"one of {', '.join(map(str, among))}" if among else f"a whole number, {at_least} or more"
        raise refuse(name, value, f"must be {kind}{otherwise and f', or {otherwise}'}")
    return number


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is larger than any float
        return False


def number(
    name: str,
    value: object,
    above: float | None = None,
    at_least: float | None = None,
    below: float = math.inf,
    otherwise: str = "",
) -> float:
    """A finite number within its bounds; one of the lower bounds, `above` or `at_least`, must be given."""
    held = isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value) and value < below
    if above is not None:
        held, bound = held and value > above, f"more than {above:g}"
    else:
        held, bound = held and value >= at_least, f"{at_least:g} or more"
    if not held:
        less = "" if below == math.inf else f" and less than {below:g}"
        raise refuse(name, value, f"must be a number, {bound}{less}{otherwise and f', or {otherwise}'}")
    return value if isinstance(value, int | float) else float(value)  # such as a numpy number


def one_of(name: str, value: object, known: Iterable[str], otherwise: str = "") -> str:
    """One of the known names."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise refuse(name, value, f"choose one of {', '.join(known)}{otherwise and f', or {otherwise}'}")
    return value


def switch(name: str, value: object) -> bool:
    """True or False, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise refuse(name, value, "must be True or False")
    return value
