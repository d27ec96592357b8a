"""Positions of a row that skip ahead, so that short rows train a long window (PoSE, Zhu et al. 2023, arXiv 2309.10400).

A row of N tokens meets only distances below N. Where its positions skip ahead, tokens before and behind a skip are
as far apart as in a long text, for the cost of attention over N tokens. What it does not meet is the number of keys of
a long text; `fewer_keys` is what that means for the attention factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SKIPS = 16
"""Places of a row at which positions skip ahead: pieces of N / 16 tokens on average stay whole. PoSE has one."""
TO_THE_END = 0.7
"""The share of rows whose last position is the last one of all; the others end anywhere."""


def skipping_positions(length: int, skip_to: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """The positions of a row of `length` tokens, int64 (N,): from 0, rising, all below `skip_to`; drawn by `seed`.

    They skip ahead at up to `SKIPS` places drawn uniformly; the sizes of the skips are a share of the whole drawn
    uniformly (a flat Dirichlet distribution).
    """
    rng = np.random.default_rng(list(seed))
    spare = skip_to - length
    skipped = spare if rng.random() < TO_THE_END else int(rng.integers(spare + 1))
    ends = np.sort(rng.integers(skipped + 1, size=SKIPS - 1))
    sizes = np.diff(np.concatenate(([0], ends, [skipped])))
    ahead = np.zeros(length, dtype=np.int64)
    np.add.at(ahead, rng.integers(1, length, size=SKIPS), sizes)
    return np.arange(length) + np.cumsum(ahead)


def fewer_keys(length: int, skip_to: int) -> float:
    """√(ln N / ln R): the attention factor of a row of N = `length` keys, over that of a text of R = `skip_to` keys.

    The papers' attention factor √(1 + ln s / ln L) is √(ln L' / ln L): logits are multiplied by the logarithm of the
    number of keys, so that a softmax over more of them is as sure. A row that skips ahead has only N.
    """
    return math.sqrt(math.log(length) / math.log(skip_to))
