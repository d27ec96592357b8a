"""Racing: candidates are scored text by text, and dropped as soon as they cannot be expected in the top k.

All candidates share their texts, so a candidate is compared with the k-th best one on the very texts that both were
scored on: paired differences vary far less than losses. Algorithm 1 scores every candidate on every text; it runs
unchanged on top of this, with an infinite loss for a dropped candidate. Beyond the papers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from longrope.search.evaluator import EvalRequest, Evaluate
from longrope.search.knots import Vector

DEVIATIONS = 2.0
"""The distance behind the k-th best, in standard deviations, at which a candidate is dropped. Of candidates as good as
the k-th best, chance drops 1 in 44."""


class Racing:
    """The losses of generations, with a paired test after every text; it remembers the best candidates so far.

    `tokens`: how many tokens of each text are scored, which weighs it. `keep`: k. Until k candidates are known on all
    texts, none is dropped.
    """

    def __init__(self, tokens: Sequence[int], keep: int) -> None:
        self._weights: Vector = np.asarray(tokens, dtype=np.float64) / sum(tokens)
        self._keep, self._known = keep, max(2, keep)  # a spread needs two
        self._elite: list[Vector] = []  # the losses (texts,) of the best candidates known, best first

    def losses(self, evaluate: Evaluate, requests: Sequence[EvalRequest]) -> list[float]:
        """The loss of every request of a generation, infinity where it was dropped. One batch for each text."""
        losses: list[list[float]] = [[] for _ in requests]
        racing = list(range(len(requests)))  # the places of those not dropped
        for text in range(len(self._weights)):
            results = evaluate([_on_one_text(requests[place], text) for place in racing])
            for place, result in zip(racing, results, strict=True):
                losses[place].append(result.loss)
            scored = text + 1
            if scored < len(self._weights) and len(self._elite) == self._known:
                limit = self._limit(scored)
                racing = [place for place in racing if self._behind(losses[place]) <= limit]
            if not racing:
                break
        whole = [np.asarray(losses[place]) for place in racing]
        finite = [own for own in whole if np.isfinite(own).all()]
        self._elite = sorted([*self._elite, *finite], key=self._mean)[: self._known]
        means = dict(zip(racing, map(self._mean, whole), strict=True))
        return [means.get(place, math.inf) for place in range(len(requests))]

    def _mean(self, losses: Vector) -> float:
        """The loss over all texts: Σ NLL / Σ tokens."""
        return float(losses @ self._weights)

    def _behind(self, losses: Sequence[float]) -> float:
        """The mean difference from the k-th best on the texts that a candidate was scored on."""
        weights = self._weights[: len(losses)]
        differences = np.asarray(losses) - self._elite[self._keep - 1][: len(losses)]
        behind = float(differences @ weights / weights.sum())
        return behind if math.isfinite(behind) else math.inf

    def _limit(self, scored: int) -> float:
        """The most that a candidate may lie behind after `scored` texts.

        The spread of paired differences is that of the best against the k-th; the texts that are left to score decide
        how far the mean over all of them can still move (finite population correction).
        """
        texts, last = len(self._weights), self._keep - 1
        differences = np.stack(self._elite[:last] + self._elite[last + 1 :]) - self._elite[last]
        within = differences - differences.mean(axis=1, keepdims=True)
        deviation = math.sqrt(float((within**2).sum()) / (len(within) * (texts - 1)))
        return DEVIATIONS * deviation * math.sqrt(1.0 / scored - 1.0 / texts)


def _on_one_text(request: EvalRequest, text: int) -> EvalRequest:
    return replace(request, row=request.row | {"samples": [text]}, samples=(text,))
