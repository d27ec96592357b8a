"""RULER's needles in a haystack: single, multi-key, multi-value and multi-query (scripts/data/synthetic/niah.py)."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from longrope.evaluation.ruler.samples import Sample
from longrope.evaluation.ruler.words import draw_pair

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text? The "
    "special magic {kind} for {query} mentioned in the provided text is"
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""The depths in per cent at which needles lie between the sentences of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needles:
    """One row of RULER's table: what the haystack is (`essay`, `noise` or `needle`), what keys and values are (`words`,
    `numbers` or `uuids`), and how many keys, values of a key, and keys that are asked for there are."""

    haystack: str = "essay"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def smallest(self) -> int:
        """The fewest lines of haystack: places for all needles."""
        return self.keys * self.values

    def make(self, size: int, rng: random.Random, words: Sequence[str]) -> Sample:
        """A sample with `size` words of `words`, or `size` lines of noise or of other needles."""
        keys = [_draw(self.key, rng) for _ in range(self.keys)]
        values = [[_draw(self.value, rng) for _ in range(self.values)] for _ in keys]
        needles = [self._sentence(key, value) for key, own in zip(keys, values, strict=True) for value in own]
        rng.shuffle(needles)
        if self.haystack == "essay":
            context = _between_sentences(" ".join(words[:size]), needles, rng)
        else:
            noise = self.haystack == "noise"
            lines = [NOISE] * size if noise else [self._sentence(*self._drawn(rng)) for _ in range(size)]
            for place, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
                lines.insert(place, needle)
            context = "\n".join(lines)
        asked = rng.sample(range(self.keys), self.queries)
        names = [keys[index] for index in asked]
        query = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
        answers = tuple(value for index in asked for value in values[index])
        template, kind = (ONE, self.value.removesuffix("s")) if len(answers) == 1 else (SEVERAL, self.value)
        return Sample(template.format(kind=kind, context=context, query=query), answers)

    def _drawn(self, rng: random.Random) -> tuple[str, str]:
        return _draw(self.key, rng), _draw(self.value, rng)

    def _sentence(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)


def _draw(kind: str, rng: random.Random) -> str:
    if kind == "words":
        return draw_pair(rng)
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _between_sentences(text: str, needles: Sequence[str], rng: random.Random) -> str:
    """The text with a needle at as many of the DEPTHS, between two sentences each."""
    sentences = re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"”’'])\s+", text)
    places = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(DEPTHS, len(needles)))
    pieces: list[str] = []
    begin = 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [*sentences[begin:place], needle]
        begin = place
    return " ".join([*pieces, *sentences[begin:]])
