"""The line that `check` prints, and what of it is the same on every machine.

    ✓ NF4 loses little: at most 0.05 (measured 0.0112)
    ✓ peak, in GB: 10.72, within 3 % (measured 10.69)

What was measured stands in brackets, for learners: it may differ between machines, and is not compared. Everything else
is. A wanted value has the digits that its tolerance leaves it, and no more.
"""

from __future__ import annotations

import decimal
import math
import operator
import re
from typing import Any

__all__ = ["beside", "compared", "rounded", "shown", "without_measured"]

MEASURED = re.compile(r"^(✓ .*) \(measured [^()\n]*\)$", re.MULTILINE)
NUMBER = r"-?[\d,]+(?:\.\d+)?(?:e[-+]\d+)?"
WITHIN = re.compile(rf"^(✓ .*: )({NUMBER})(, within ({NUMBER})( %)?)$", re.MULTILINE)


def shown(value: Any) -> str:
    """A number with up to ten digits, its thousands apart; anything else as Python shows it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"


def _plain(value: Any) -> int | float:
    """A finite number of any library as one of Python."""
    try:
        return operator.index(value)
    except TypeError:
        return float(value)


def rounded(value: Any, allowed: float) -> str:
    """A finite number with the digits that a tolerance leaves: up to one behind the first digit of the tolerance.

    Args:
        allowed: how far it may be off, in its own unit.
    """
    plain = _plain(value)
    if not allowed:
        return shown(plain)
    place = math.floor(math.log10(allowed)) - 1
    if isinstance(plain, int) and place <= 0:
        return shown(plain)
    exact = decimal.Decimal(plain if isinstance(plain, int) else repr(plain))
    with decimal.localcontext(prec=400):
        kept = exact.quantize(decimal.Decimal((0, (1,), place)))
    return shown(int(kept) if isinstance(plain, int) else float(kept))


def beside(value: Any, *bounds: float) -> str:
    """A measured value with three digits, or as many as show on which side of its bounds it lies."""
    try:
        plain = _plain(value)
    except (TypeError, ValueError, RuntimeError):
        return str(value)
    if isinstance(plain, int) or not math.isfinite(plain):
        return shown(plain)
    for digits in range(3, 10):
        text = f"{plain:,.{digits}g}"
        near = float(f"{plain:.{digits}g}")
        if all((near < bound) == (plain < bound) and (near > bound) == (plain > bound) for bound in bounds):
            return text if "e" not in text or abs(plain) < 1e-4 else shown(near)
    return shown(plain)


def without_measured(text: str) -> str:
    """A cell's output without the values that a check measured."""
    return MEASURED.sub(r"\1", text)


def _as_rounded(line: re.Match) -> str:
    """The line of a check with its wanted value rounded as today: stored outputs may have more of its digits."""
    plain = line[2].replace(",", "")
    wanted = float(plain) if re.search(r"[.e]", plain) else int(plain)
    tolerance = float(line[4].replace(",", ""))
    allowed = abs(wanted) * tolerance / 100 if line[5] else tolerance
    return f"{line[1]}{rounded(wanted, allowed)}{line[3]}"


def compared(text: str) -> str:
    """What of a cell's output must be the same on every machine."""
    return WITHIN.sub(_as_rounded, without_measured(text))
