"""The two checks that every number of a geometry or a scaling passes, and how a found value is shown in an error."""

from __future__ import annotations

import math
import numbers

from longrope.errors import LongRopeError


def shown(value: object) -> str:
    """`repr` of a value on one line, short enough for an error message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def whole_number(field: str, value: object, minimum: int) -> int:
    """`value` as int; raises LongRopeError naming `field` when it is not a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < minimum:
        raise LongRopeError(f"{field} must be a whole number, {minimum} or more; found {shown(value)}")
    return int(value)


def positive_number(field: str, value: object) -> float:
    """`value` as float; raises LongRopeError naming `field` when it is not a finite number above 0."""
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and number > 0:
            return number
    raise LongRopeError(f"{field} must be a finite number above 0; found {shown(value)}")
