"""Lengths in tokens as people write them: `4096`, `128k`, `2M`, with k = 1024."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

from longrope.errors import LongRopeError

_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}


def parse_length(text: str | int) -> int:
    """Tokens of a length such as `4096`, `128k` or `2M`.

    Raises LongRopeError when `text` is not a positive whole number of tokens.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15})\s*([kKmM]?)\s*", str(text))
    length = int(match[1]) * _UNITS[match[2].lower()] if match else 0
    if length <= 0:
        raise LongRopeError(
            f"a length must be a positive whole number of tokens such as 4096, 128k or 2M; found {str(text)!r}"
        )
    return length


Length = Annotated[int, BeforeValidator(lambda value: value if value is None else parse_length(value))]
"""The type of a setting that is a length: an int or text such as `128k`."""


def parse_lengths(text: str) -> list[int]:
    """Tokens of a comma-separated list of lengths, in the order given."""
    return [parse_length(part) for part in text.split(",") if part.strip()] or [parse_length(text)]


def format_length(length: int) -> str:
    """The shortest exact form: 131072 -> `128k`, 2097152 -> `2M`, 1000 -> `1000`."""
    for unit, size in (("M", _UNITS["m"]), ("k", _UNITS["k"])):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def doubling_lengths(shortest: int, longest: int) -> list[int]:
    """`shortest`, twice, four times, … as long as that is below `longest`, and `longest`."""
    lengths, length = [], shortest
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]
