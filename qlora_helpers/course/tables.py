"""A table of results as aligned text: words at the left of their column, numbers at its right.

show_table(["format", "error", "recall"], [("NF4", 0.09201, 0.983), ("INT4", 0.1, 0.9715)], ["", ".4f", ".1%"])

format   error  recall
------  ------  ------
NF4     0.0920   98.3%
INT4    0.1000   97.2%
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

__all__ = ["as_table", "show_table"]

NOTHING = "–"  # stands for None
GAP = "  "


def as_table(headings: Sequence[str], rows: Iterable[Sequence[Any]], formats: Sequence[str] | None = None) -> str:
    """The table as text: a line of headings, a rule, and a line for each row.

    Args:
        headings: a name for each column.
        rows: for each row a value for each column: a text, a number, a single-element tensor, or None, shown as a dash.
        formats: for each column how `format` writes its numbers, such as ".4f", ".1%" or ",d"; empty for as they are.
            Texts and None stand in any column as they are.

    Raises:
        ValueError: there are no columns, a row or `formats` has not one entry for each column, or a number cannot be
            written as its column's format says.
    """
    if isinstance(headings, str) or not headings:
        raise ValueError(f"headings={headings!r}: must be a list with a name for each column")
    formats = [""] * len(headings) if formats is None else formats
    if isinstance(formats, str) or len(formats) != len(headings):
        raise ValueError(
            f"formats={formats!r}: must have one entry for each of {len(headings)} columns, such as '.2f' or ''"
        )
    plain = [[_plain(value) for value in row] for row in rows]
    for at, row in enumerate(plain):
        if len(row) != len(headings):
            raise ValueError(f"rows[{at}]={row!r}: must have one value for each of {len(headings)} columns")
    columns = []
    for at, (heading, spec) in enumerate(zip(headings, formats, strict=True)):
        values = [row[at] for row in plain]
        cells = [str(heading), *(_written(value, spec, heading) for value in values)]
        width = max(map(len, cells))
        cells.insert(1, "-" * width)
        of_numbers = any(map(_is_number, values))
        columns.append([cell.rjust(width) if of_numbers else cell.ljust(width) for cell in cells])
    return "\n".join(GAP.join(line).rstrip() for line in zip(*columns, strict=True))


def show_table(headings: Sequence[str], rows: Iterable[Sequence[Any]], formats: Sequence[str] | None = None) -> None:
    """Print `as_table` of the same arguments, and an empty line, so that what is printed next is no row of it."""
    print(as_table(headings, rows, formats), end="\n\n")


def _plain(value: Any) -> Any:
    """A value; a tensor or an array with a single element as a plain number."""
    if hasattr(value, "item") and not isinstance(value, str) and getattr(value, "shape", None) is not None:
        try:
            return value.item()
        except (RuntimeError, ValueError) as error:  # torch's and NumPy's
            raise ValueError(
                f"a value has the shape {tuple(value.shape)}: a table takes one number in each place"
            ) from error
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | decimal.Decimal) and not isinstance(value, bool)


def _written(value: Any, spec: str, heading: str) -> str:
    if value is None:
        return NOTHING
    if not _is_number(value):
        return str(value)
    try:
        return format(value, spec)
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {heading!r}: {value!r} cannot be written as {spec!r}: {error}") from error
