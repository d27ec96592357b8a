"""Lengths in tokens as people write them: `4096`, `128k`, `2M`, with k = 1024."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import BeforeValidator

from longrope.errors import LongRopeError

LONGEST = 2**40
"""Tokens: a million times the longest window that was published."""
_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}


def parse_length(text: str | int) -> int:
    """The tokens of a length such as `4096`, `128k` or `2M`.

    Raises LongRopeError (`invalid-length`) when `text` is not a positive whole number of tokens.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15})\s*([kKmM]?)\s*", str(text))
    length = int(match[1]) * _UNITS[match[2].lower()] if match else 0
    if length <= 0:
        shown = str(text) if len(str(text)) <= 60 else f"{str(text)[:57]}..."
        raise LongRopeError(
            f"a length must be a positive whole number of tokens such as 4096, 128k or 2M; found {shown!r}",
            code="invalid-length",
        )
    if length > LONGEST:
        raise LongRopeError(f"expected a length of at most {LONGEST} tokens, found {length}", code="invalid-length")
    return length


def parse_duration(text: str) -> float:
    """The seconds of a duration such as `3h55m`, `90m`, `45s`, `1d12h` or `03:55:00`.

    Raises LongRopeError (`invalid-duration`) for anything else, and for nothing.
    """
    text = text.strip()
    if (match := re.fullmatch(r"(?:([0-9]{1,3})-)?([0-9]{1,4}):([0-9]{2}):([0-9]{2})", text)) or (
        text
        and (match := re.fullmatch(r"(?:([0-9]{1,3})d)?(?:([0-9]{1,5})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,8})s)?", text))
    ):
        parts = [int(part or 0) for part in match.groups()]
    else:
        parts = []
    seconds = sum(part * size for part, size in zip(parts, (86_400, 3600, 60, 1), strict=False))
    if seconds <= 0:
        raise LongRopeError(
            f"expected a duration such as 3h55m, 90m or 03:55:00, found {text!r}", code="invalid-duration"
        )
    return float(seconds)


def _length_setting(value: str | int | None) -> int | None:
    try:
        return None if value is None else parse_length(value)
    except LongRopeError as error:  # pydantic adds the setting's name to a ValueError
        raise ValueError(str(error)) from error


Length = Annotated[int, BeforeValidator(_length_setting)]
"""The type of a setting that is a length: an int or text such as `128k`."""


def parse_lengths(lengths: str | int | Iterable[str | int]) -> list[int]:
    """The tokens of several lengths in their order: a list, or text such as `32k,128k`.

    Raises LongRopeError (`invalid-length`) as `parse_length` does, and for text without a length.
    """
    if isinstance(lengths, str):
        return [parse_length(part) for part in lengths.split(",") if part.strip()] or [parse_length(lengths)]
    return [parse_length(length) for length in ([lengths] if isinstance(lengths, int) else lengths)]


def format_length(length: int) -> str:
    """The shortest exact form: 131072 -> `128k`, 2097152 -> `2M`, 1000 -> `1000`."""
    for unit, size in (("M", _UNITS["m"]), ("k", _UNITS["k"])):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def doubling_lengths(shortest: int, longest: int) -> list[int]:
    """`shortest`, 2·`shortest`, 4·`shortest`, … below `longest`, and then `longest`."""
    lengths, length = [], shortest
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]
