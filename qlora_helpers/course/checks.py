"""Checks for the numbers in a lesson.

`check` raises when a number is not what the lesson says. Otherwise it prints one line: for an exact quantity its value;
for a measured or trained one the bound, or the wanted value with its tolerance, and in brackets what was measured here.
All of it but the brackets is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from qlora_helpers import validation
from qlora_helpers.course import check_lines

__all__ = ["CheckFailed", "check"]


class CheckFailed(AssertionError):
    """A number is not what the lesson says."""


def _exactly_equal(name: str, got: Any, want: Any) -> bool:
    if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor):
        either = isinstance(got, torch.Tensor) or isinstance(want, torch.Tensor)
        return not either and bool(got == want)
    if got.device != want.device:
        raise ValueError(
            f"check({name!r}): got is on {got.device}, want on {want.device}. Two devices add up in different orders, so "
            "floats computed on both differ in their last bits: compute both on one device, or pass rel= or abs=. What was "
            "only stored or gathered there can be brought back with .cpu()"
        )
    return got.dtype == want.dtype and torch.equal(got, want)


def _is_finite(value: Any) -> bool:
    """Whether a value is a number, or a tensor of one, that others can be near to."""
    try:
        return not isinstance(value, bool | str) and math.isfinite(value)
    except (TypeError, ValueError, OverflowError):  # no number, several of them, or one that no float can hold
        return False


def _holds(within: Callable[[], bool]) -> bool:
    """Whether a comparison holds; what cannot be compared with a number does not."""
    try:
        return bool(within())
    except TypeError:
        return False


def check(
    name: str,
    got: Any,
    want: Any = None,
    *,
    rel: float | None = None,
    abs: float | None = None,
    exact: bool = False,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    """Compare a number with what it should be, and say exactly how it was compared.

    Use one of: `want` with `rel` (a relative tolerance), `want` with `abs` (an absolute one), `want` with
    `exact=True`, or a bound: `at_least`, `at_most` or both. `exact=True` is for counts and texts, for codes and values
    gathered from a table, and for floats that the same operations produced on the same device.

    Raises:
        CheckFailed: the check fails; the message has both values and the tolerance.
        ValueError: none or more than one of these ways is used; a tolerance is not a positive number; `want` with a
            tolerance, or a bound, is not finite, so that everything or nothing would hold; or two tensors on different
            devices are to be exactly equal.
    """
    exact = validation.switch("exact", exact)
    bounded = at_least is not None or at_most is not None
    ways = [rel is not None, abs is not None, exact, bounded]
    if sum(ways) != 1:
        raise ValueError(f"check({name!r}): use exactly one of rel=, abs=, exact=True, or at_least=/at_most=")
    if (want is not None) if bounded else (want is None and not exact):
        raise ValueError(f"check({name!r}): pass want with rel, abs or exact, and no want with at_least or at_most")
    for word, tolerance in (("rel", rel), ("abs", abs)):
        if tolerance is not None and not (_is_finite(tolerance) and tolerance > 0):
            raise ValueError(
                f"check({name!r}): {word}={tolerance!r} must be a positive number; for equality, exact=True"
            )
    for word, bound in (("at_least", at_least), ("at_most", at_most)):
        if bound is not None and not _is_finite(bound):
            raise ValueError(
                f"check({name!r}): {word}={bound!r} must be a finite number: it would hold always or never"
            )

    measured = ""
    if exact:
        holds, held = _exactly_equal(name, got, want), "exactly"
        said = "equal, bit for bit" if isinstance(want, torch.Tensor) else check_lines.shown(want)
    elif bounded:
        holds = _holds(lambda: (at_least is None or got >= at_least) and (at_most is None or got <= at_most))
        parts = [f"at least {check_lines.shown(at_least)}"] * (at_least is not None)
        parts += [f"at most {check_lines.shown(at_most)}"] * (at_most is not None)
        said = held = " and ".join(parts)
        if holds:
            measured = check_lines.beside(got, *(bound for bound in (at_least, at_most) if bound is not None))
    else:
        allowed = abs if abs is not None else rel * math.fabs(want) if _is_finite(want) else math.inf
        if not (_is_finite(want) and _is_finite(allowed)):
            raise ValueError(f"check({name!r}): want={want!r} has no numbers near it: pass exact=True, or a bound")
        holds = _holds(lambda: math.fabs(got - want) <= allowed)  # false for NaN
        held = f"within {check_lines.shown(abs)}" if abs is not None else f"within {rel * 100:g} %"
        wanted = check_lines.rounded(want, allowed)
        said = f"{wanted}, {held}"
        if holds and (found := check_lines.rounded(got, allowed)) != wanted:
            measured = found
    if not holds:
        wanted = held if bounded else f"{check_lines.shown(want)}, {held}"
        raise CheckFailed(f"{name}: got {check_lines.shown(got)}, want {wanted}")
    print(f"✓ {name}: {said}{measured and f' (measured {measured})'}")
