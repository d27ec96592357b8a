"""The English words of RULER's keys and lists, from the `wonderwords` package that RULER takes them from."""

from __future__ import annotations

import random
from functools import cache

from longrope.errors import LongRopeError
from longrope.storage import sha256_text


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """The nouns, adjectives or verbs of the installed `wonderwords`. Raises LongRopeError where it is missing."""
    try:
        from wonderwords import RandomWord  # type: ignore[import-untyped]
    except ImportError as error:
        raise LongRopeError(
            "RULER needs the list of words of the package wonderwords",
            code="missing-dependency",
            hint='pip install "longrope[eval]"',
        ) from error
    return tuple(RandomWord.read_words(f"{kind}list.txt"))


@cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, each word once, sorted."""
    return tuple(sorted({*word_list("noun"), *word_list("adjective"), *word_list("verb")}))


def words_sha256() -> str:
    """SHA-256 of the words: two runs with the same one drew from the same list."""
    return sha256_text("\n".join(all_words()))


def draw_pair(rng: random.Random) -> str:
    """A key: an adjective and a noun, `numerous-kite`."""
    return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"


def draw_words(rng: random.Random, count: int) -> list[str]:
    """`count` different words; adjective-noun pairs where the list has fewer. Raises LongRopeError beyond those."""
    if count <= len(all_words()):
        return rng.sample(all_words(), count)
    adjectives, nouns = word_list("adjective"), word_list("noun")
    if count > len(adjectives) * len(nouns):
        raise LongRopeError(
            f"expected at most {len(adjectives) * len(nouns)} different words, found {count}", code="invalid-setting"
        )
    places = rng.sample(range(len(adjectives) * len(nouns)), count)
    return [f"{adjectives[place // len(nouns)]}-{nouns[place % len(nouns)]}" for place in places]
