"""Checks of numbers that a user gives, and the form in which errors show a value."""

from __future__ import annotations

import math
import numbers

from longrope.errors import LongRopeError


def shown(value: object) -> str:
    """`repr` of a value on one line, short enough for an error message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def whole_number(field: str, value: object, minimum: int) -> int:
    """`value` as int. Raises LongRopeError, naming `field`, when it is no whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < minimum:
        raise LongRopeError(
            f"{field} must be a whole number, {minimum} or more; found {shown(value)}", code="invalid-number"
        )
    return int(value)


def positive_number(field: str, value: object) -> float:
    """`value` as float. Raises LongRopeError, naming `field`, when it is no finite number above 0."""
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and number > 0:
            return number
    raise LongRopeError(f"{field} must be a finite number above 0; found {shown(value)}", code="invalid-number")
