"""Lengths in tokens as people write them: `4096`, `128k`, `2M`, with k = 1024."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import BeforeValidator

from longrope.errors import LongRopeError

_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}


def parse_length(text: str | int) -> int:
    """The tokens of a length such as `4096`, `128k` or `2M`.

    Raises LongRopeError (`invalid-length`) when `text` is not a positive whole number of tokens.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15})\s*([kKmM]?)\s*", str(text))
    length = int(match[1]) * _UNITS[match[2].lower()] if match else 0
    if length <= 0:
        raise LongRopeError(
            f"a length must be a positive whole number of tokens such as 4096, 128k or 2M; found {str(text)!r}",
            code="invalid-length",
        )
    return length


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


def format_bytes(size: float) -> str:
    """`1 MB`, `5.8 GB`: three digits at most, k = 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"
