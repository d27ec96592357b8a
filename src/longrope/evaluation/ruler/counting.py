"""RULER's aggregation tasks: the words of a list that are most common, the coded words of a text that are most frequent
(scripts/data/synthetic/common_words_extraction.py and freq_words_extraction.py)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence

from longrope.evaluation.ruler.samples import Sample
from longrope.evaluation.ruler.words import draw_words

COMMON = 10
SMALLEST_LIST = 10
SMALLEST_TEXT = 64  # words: in a shorter text the fourth and the fifth most frequent may tie
SHORT = 4096
"""Below this length the list repeats its words less often."""
LIST_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that"
    " appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10"
    " words that appear most often in the list are:"
)
CODED_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared"
    " coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the"
    " three most frequently appeared words in the above coded text? Answer: According to the coded text above, the"
    " three most frequently appeared words are:"
)
LETTERS = 6
ZETA_2 = math.pi**2 / 6  # ζ(α) of the frequencies k^−α / ζ(α), for RULER's α = 2


def common_words(size: int, rng: random.Random, length: int) -> Sample:
    """`size` different words, ten of them common, behind one solved example."""
    short = length < SHORT
    solved = _list(*((20, 3, 1) if short else (40, 10, 3)), rng)
    asked = _list(size, *((6, 1) if short else (30, 3)), rng)
    return Sample(f"{solved.prompt} {numbered(solved.answers)}\n{asked.prompt}", asked.answers)


def _list(different: int, common: int, uncommon: int, rng: random.Random) -> Sample:
    drawn = draw_words(rng, different)
    words = drawn[:COMMON] * common + drawn[COMMON:] * uncommon
    rng.shuffle(words)
    return Sample(LIST_PROMPT.format(context=numbered(words)), tuple(drawn[:COMMON]))


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, start=1))


def coded_vocabulary(room: int) -> int:
    """How many coded words there are where `room` tokens are left for the prompt; the three asked for at least."""
    return max(room // 50, 4)


def frequent_words(size: int, rng: random.Random, vocabulary: int) -> Sample:
    """About `size` words from `vocabulary` coded ones, with Zipf's frequencies; the most frequent are dots."""
    coded: dict[str, None] = {}
    while len(coded) < vocabulary:
        coded["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
    ranked = ["...", *list(coded)[1:]]
    words = [word for rank, word in enumerate(ranked, start=1) for _ in range(int(size * rank**-2.0 / ZETA_2))]
    rng.shuffle(words)
    return Sample(CODED_PROMPT.format(context=" ".join(words)), tuple(ranked[1:4]))
