"""What a learner's answer is: numbers of any library as plain ones, and words for what is no number."""

from __future__ import annotations

import decimal
import fractions
import math
import sys
import types
from collections.abc import Iterator, Mapping, Set
from numbers import Real
from typing import Any

__all__ = [
    "ZERO",
    "as_array",
    "epsilon",
    "exact",
    "is_array",
    "is_finite",
    "is_tensor",
    "near",
    "one_number",
    "raised",
    "rounding",
    "shown",
]

ZERO = 1e-9  # how near to zero an answer must be where zero is right: a relative tolerance allows nothing there

# ---- Words


def raised(who: str, error: BaseException) -> str:
    """That somebody's code raised an error, and what the error says."""
    said = str(error).strip().splitlines()
    return f"{who} raised {type(error).__name__}{f': {_cut(said[0], 200)}' if said else ''}".rstrip(".") + "."


def _cut(text: str, most: int) -> str:
    """A text, cut if it is long."""
    return text if len(text) <= most else f"{text[:most]}…"


def shown(value: Any) -> str:
    """A value for a message: short, and never the wanted one."""
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, int):
        return f"{value:,}" if value.bit_length() < 200 else f"a whole number of {value.bit_length()} bits"
    if isinstance(value, float):
        return f"{value:,.10g}"
    if is_tensor(value) or is_array(value):
        what = "tensor" if is_tensor(value) else "array"
        shape = tuple(value.shape)
        if not shape:
            return shown(value.item())
        return f"{'an' if what == 'array' else 'a'} {what} of shape {shape}"
    if isinstance(value, str):
        return repr(_cut(value, 60))
    if isinstance(value, types.FunctionType):
        return f"the function {value.__name__}"
    if isinstance(value, list | tuple | Set | Mapping) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        return _cut(repr(value), 80)
    except Exception:  # a learner's own class
        return f"a {type(value).__name__}"


def _kind_of(value: Any) -> str:
    """What something is that is no number and no function."""
    if value is None:
        return "None, which is what a function without a return gives"
    if isinstance(value, bool):
        return f"{value}, and not a number"
    if isinstance(value, str):
        return f"{shown(value)}, which is text: leave the quotation marks out"
    if isinstance(value, complex):
        return f"{shown(value)}, which is a complex number"
    if callable(value):
        return f"{shown(value)}, and not a number: call it"
    return f"{shown(value)}, and not a number"


# ---- Numbers of any library


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor; torch is not imported for that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: Any) -> bool:
    """Whether this is an array or a number of NumPy, which is not imported for that."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray | numpy.generic)


def epsilon(value: Any) -> float:
    """How far apart neighbouring values are in a floating point format of few bits, relative to their size."""
    if is_tensor(value):
        torch = sys.modules["torch"]
        return torch.finfo(value.dtype).eps if value.dtype.is_floating_point else 0.0
    if is_array(value) and value.dtype.kind == "f":
        return float(sys.modules["numpy"].finfo(value.dtype).eps)
    return 0.0


def one_number(value: Any) -> tuple[Real | decimal.Decimal, float] | str:
    """A number of any library as a plain one, with its format's epsilon; or what is wrong with it, in words."""
    if is_tensor(value) or is_array(value):
        array = as_array(value)
        if isinstance(array, str):
            return f"your answer {array}."
        if array.size != 1:
            return f"your answer is {shown(value)}, and not one number."
        of_32_bits = is_tensor(value) and value.dtype.is_floating_point and value.dtype.itemsize == 4
        one = (array.astype("float32") if of_32_bits else array).reshape(())[()]
        plain = float(str(one)) if array.dtype.kind == "f" else one.item()  # with no more digits than its format has
        if isinstance(plain, bool | complex | str):
            return f"your answer is {_kind_of(plain)}."
        return plain, epsilon(value)
    if isinstance(value, bool) or not isinstance(value, Real | decimal.Decimal):
        return f"your answer is {_kind_of(value)}."
    return value, 0.0


def exact(value: Real | decimal.Decimal) -> fractions.Fraction:
    """A finite number without any rounding."""
    return fractions.Fraction(
        value if isinstance(value, int | float | fractions.Fraction | decimal.Decimal) else float(value)
    )


def is_finite(value: Any) -> bool:
    """Whether a number is neither infinite nor NaN."""
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds is finite
        return True


def rounding(value: Real | decimal.Decimal) -> fractions.Fraction:
    """Half a unit of a number's own last digit, if it is written with three significant digits or more; else zero."""
    if isinstance(value, decimal.Decimal):
        _, digits, exponent = value.as_tuple()
    elif isinstance(value, int):
        digits, exponent = tuple(str(abs(value))) if abs(value) < 10**30 else (), 0
    elif isinstance(value, float):
        _, digits, exponent = decimal.Decimal(repr(value)).as_tuple()
        if value == int(value):  # 4130.0 says no digit behind the point
            digits, exponent = tuple(str(abs(int(value)))), 0
    else:
        return fractions.Fraction(0)
    return fractions.Fraction(10) ** exponent / 2 if len(digits) >= 3 else fractions.Fraction(0)


def near(got: Real | decimal.Decimal, want: Real | decimal.Decimal, rel: float) -> bool:
    """Whether a finite number is the wanted one: within the tolerance, or rounded to three digits or more."""
    off, size = abs(exact(got) - exact(want)), abs(exact(want))
    allowed = fractions.Fraction(rel) * size if size else fractions.Fraction(ZERO)
    return off <= max(allowed, rounding(got) * (1 + fractions.Fraction(1, 10**9)))


def as_array(value: Any) -> Any:
    """Numbers of any library as a NumPy array; or what they are instead, as a verb with its object."""
    import numpy

    if is_tensor(value):
        torch = sys.modules["torch"]
        if value.device.type == "meta":
            return "is on the meta device, and has no values"
        value = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        value = value.cpu()
        if value.is_complex():
            return "has complex numbers"
        return (value.to(torch.float64) if value.dtype.is_floating_point else value).resolve_neg().numpy()
    if isinstance(value, str):
        return f"is {_kind_of(value)}"
    if isinstance(value, Mapping):
        return "is a dictionary, and not a list of numbers"
    if isinstance(value, Set):
        return "is a set, which has no order: make it a list"
    if isinstance(value, Iterator):
        return f"is a {type(value).__name__}, which can be read only once: make it a list"
    if isinstance(value, list | tuple):
        parts = [as_array(part) if is_tensor(part) else part for part in value]
        if any(isinstance(part, str) and is_tensor(of) for part, of in zip(parts, value, strict=True)):
            return next(part for part in parts if isinstance(part, str))
        value = [float(part) if isinstance(part, fractions.Fraction | decimal.Decimal) else part for part in parts]
    try:
        array = numpy.asarray(value)
    except ValueError:
        return "has rows of different lengths"
    if array.dtype.kind == "c":
        return "has complex numbers"
    if array.dtype.kind not in "biuf":
        strange = _first_strange(value)
        return (
            f"has something in it that is no number: {shown(strange)}"
            if strange is not ...
            else f"is {_kind_of(value)}"
        )
    return array


def _first_strange(value: Any) -> Any:
    """The first thing within a list that is no number; dots if it is no list."""
    if not isinstance(value, list | tuple):
        return ...
    for part in value:
        inner = _first_strange(part)
        if inner is not ...:
            return inner
        if not isinstance(part, Real | list | tuple) and not is_array(part):
            return part
    return ...
