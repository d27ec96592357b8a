"""Checks of numbers that a user gives, and the form in which errors show a value."""

from __future__ import annotations

import math
import numbers

from longrope.errors import LongRopeError

LARGEST_SEED = 2**32 - 1
"""NumPy and transformers take no larger one."""
MOST = 10**6
"""The largest of most counts, far above all that anybody has run; more is a slip, and would take memory or years."""

LARGEST_FACTOR = 1e9
"""The largest rescale factor: a larger one turns angles into noise, and comes from a damaged file."""


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


def count_in(field: str, value: object, minimum: int, maximum: int = MOST) -> int:
    """`value` as int. Raises LongRopeError, naming `field`, unless it is a whole number of `minimum` to `maximum`."""
    number = whole_number(field, value, minimum)
    if number > maximum:
        raise LongRopeError(f"expected {field} of at most {maximum}, found {shown(value)}", code="invalid-number")
    return number


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


def scale_factor(field: str, value: object) -> float:
    """`value` as float. Raises LongRopeError, naming `field`, when it is no number above 0 and up to LARGEST_FACTOR."""
    number = positive_number(field, value)
    if number > LARGEST_FACTOR:
        raise LongRopeError(
            f"expected {field} of at most {LARGEST_FACTOR:g}, found {shown(value)}", code="invalid-number"
        )
    return number
