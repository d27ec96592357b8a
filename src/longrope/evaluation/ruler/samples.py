"""One RULER sample as text, and the largest haystack with which it fits a length. Knows no task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longrope.data.tokens import Ids
from longrope.errors import LongRopeError


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt up to where the model answers, and the strings that a right answer holds."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class FittedSample:
    """A sample as token ids, and how many tokens are left for the reply: together at most the length asked for."""

    ids: Ids
    room: int
    answers: tuple[str, ...]


def fit(
    make: Callable[[int], Sample],
    tokens: Callable[[Sample], int],
    length: int,
    smallest: int,
    largest: int | None = None,
) -> Sample:
    """The sample of the largest size that takes at most `length` tokens.

    `make(size)` is the sample with `size` units of haystack (words, sentences, lines, documents), `smallest` to
    `largest`; `tokens` counts what it takes, the room for its reply included. The tokens grow nearly evenly with the
    size, so interpolation finds it in a few steps; every second step halves the interval, as words are not all alike.

    Raises LongRopeError when the smallest does not fit, saying how many tokens that takes.
    """
    best = make(smallest)
    low, low_tokens = smallest, tokens(best)
    if low_tokens > length:
        raise LongRopeError(f"needs at least {low_tokens} tokens with this tokenizer; found a length of {length}")
    while True:
        high = 2 * low if largest is None else min(2 * low, largest)
        sample = make(high)
        high_tokens = tokens(sample)
        if high_tokens > length:
            break
        if high == low:
            return sample
        best, low, low_tokens = sample, high, high_tokens
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (length - low_tokens) / (high_tokens - low_tokens)
        size = min(max(low + int(share * (high - low)), low + 1), high - 1)
        sample = make(size)
        taken = tokens(sample)
        if taken <= length:
            best, low, low_tokens = sample, size, taken
        else:
            high, high_tokens = size, taken
        halve = not halve
    return best
