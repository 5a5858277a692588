"""How an article's claim gets its verdict: fixed rules, applied to computed numbers and outcomes.

The five verdicts:

- right: true as written; a number agrees to half a unit of its last digit.
- rounded: close enough to work with: a number within 5 %, or a sentence that is true but incomplete.
- outdated: written for an older version; today's library refuses it, warns that it will be removed, or can do more.
- wrong: not true.
- depends: true in one setting and not in another; both are shown.

A function that judges a claim is registered under the claim's id. It never reads the table: the claimed number is in
its code, because it is what is tested; everything else is computed.
"""

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

VERDICTS = ("right", "rounded", "outdated", "wrong", "depends")
NOWHERE = tempfile.gettempdir()  # for trainers that must be told where to write, and write nothing
NEAR = 0.05  # of the true value: the largest error that still counts as rounded


@dataclass(frozen=True)
class Finding:
    """What was computed for one claim.

    Attributes:
        verdict: one of VERDICTS.
        value: what is true, as the table shows it; empty if there is no number to show.
        claimed: the article's number, as the table shows it; empty if it gives none.
        shown: further computed numbers that the table's statement may use.
    """

    verdict: str
    value: str = ""
    claimed: str = ""
    shown: tuple[str, ...] = ()


COMPUTED: dict[str, Callable[[], Finding]] = {}


def claim(*ids: str) -> Callable:
    """Register a function as the judge of these claims.

    Raises:
        ValueError: another function already judges one of them.
    """

    def register(function: Callable[[], Finding]) -> Callable[[], Finding]:
        once = cache(function)
        for key in ids:
            if key in COMPUTED:
                raise ValueError(
                    f"claim {key} is judged by {COMPUTED[key].__name__} and by {function.__name__}: keep one"
                )
            COMPUTED[key] = once
        return once

    return register


def with_unit(number: str, unit: str) -> str:
    return f"{number} {unit}".strip()


def number(claimed: str, value: float, unit: str = "", digits: int = 0, shown: Collection[str] = ()) -> Finding:
    """Judge a number: right within half a unit of the last claimed digit, rounded within 5 %, otherwise wrong.

    Args:
        claimed: as the article writes it, such as "0.34" or "41,943,040".
        value: the true one.
        digits: the decimal places with which the true one is shown.
    """
    said = float(claimed.replace(",", ""))
    half = 0.5 * 10.0 ** -len(claimed.partition(".")[2])
    off = abs(said - value)
    verdict = "right" if off <= half * (1 + 1e-9) else "rounded" if off <= NEAR * abs(value) else "wrong"
    return Finding(verdict, with_unit(f"{value:,.{digits}f}", unit), with_unit(claimed, unit), tuple(shown))


def by_setting(*outcomes: bool, value: str = "", claimed: str = "", shown: Collection[str] = ()) -> Finding:
    """Judge a sentence by its outcomes in one or more settings: right if all hold, wrong if none does, else depends."""
    if not outcomes:
        raise ValueError("by_setting() needs the outcome of at least one setting")
    verdict = "right" if all(outcomes) else "depends" if any(outcomes) else "wrong"
    return Finding(verdict, value, claimed, tuple(shown))


def parts(claimed: Collection, true: Collection, value: str = "", shown: Collection[str] = ()) -> Finding:
    """Judge a list: right if it is the true one, rounded if it is incomplete, wrong if it contains something untrue."""
    said, found = set(claimed), set(true)
    verdict = "right" if said == found else "rounded" if said < found else "wrong"
    return Finding(verdict, value, shown=tuple(shown))


def refusal(function: Callable, /, *args, **keywords) -> str:
    """The exception that a call raises, such as "TypeError: …"; empty if it raises none."""
    try:
        function(*args, **keywords)
    except Exception as error:  # any refusal is a finding
        return f"{type(error).__name__}: {error}"
    return ""


def still_taken(function: Callable, keyword: str, /, *args, **others) -> Finding:
    """Judge a library's keyword: right if the installed version takes it, outdated if it raises a TypeError for it."""
    said = refusal(function, *args, **others)
    if not said:
        return Finding("right")
    if said.startswith("TypeError") and f"'{keyword}'" in said:
        return Finding("outdated", "TypeError")
    raise RuntimeError(f"{keyword}: expected a TypeError about it, and got {said}")
