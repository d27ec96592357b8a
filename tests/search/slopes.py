"""Searches by dialogue without a model: a smooth loss with a known minimum, its derivative, and who answers by it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from longrope.rope.closed_forms import ntk_aware, pi, yarn
from longrope.rope.scaling import Window
from longrope.search.dialogue import DialogueSearch, Stage
from longrope.search.evaluator import Answer, Question
from longrope.search.gradient import GradientSearch, GradientSettings
from longrope.search.knots import FactorsAround, phase_scale
from longrope.search.log import SearchLog, read_log
from longrope.search.loop import Conversation, Search, run_search
from tests.search.targets import GEOMETRY, HEADER, TARGET_LENGTH

ORIGINAL, SAMPLES = GEOMETRY.original_length, 4
SEEDS = {
    "pi": pi(GEOMETRY, TARGET_LENGTH),
    "yarn": yarn(GEOMETRY, TARGET_LENGTH),
    "ntk": ntk_aware(GEOMETRY, TARGET_LENGTH),
}
STAGE = Stage(length=TARGET_LENGTH, seeds=SEEDS, samples=SAMPLES)
EASY = FactorsAround(SEEDS["ntk"], phase_scale(GEOMETRY), 8).factors(np.array([0.4, 0.3, 0.6, 0.5, 0.6, 0.4, 0.4, 0.5]))
"""An optimum that 8 knots around NTK can express."""

Reply = Callable[[Question], Answer]
_S = TypeVar("_S", bound=Search)


class Quadratic:
    """Mean squared distance of log λ to an optimum, plus that of log m; every search sample has its own optimum."""

    def __init__(self, optimum: np.ndarray = EASY, attention_factor: float = 1.0, noise: float = 0.02) -> None:
        self.goal, self.attention_goal = np.log(optimum), math.log(attention_factor)
        offsets = noise * np.random.default_rng(0).standard_normal((SAMPLES, len(optimum)))
        self.offsets = offsets - offsets.mean(axis=0)  # the mean of all samples has its minimum at `optimum`

    def __call__(self, question: Question) -> Answer:
        samples = range(SAMPLES) if question.samples is None else question.samples
        goal = self.goal + (self.offsets[list(samples)].mean(axis=0) if question.split == "search" else 0.0)
        factors = np.array(question.window.factors)
        away = np.log(factors) - goal
        far = math.log(question.window.attention_factor) - self.attention_goal
        gradient = (*(2 * away / factors / len(away)).tolist(), 2 * far / question.window.attention_factor)
        return Answer(float(np.mean(away**2) + far**2), gradient if question.gradient else None)


class ReplyEvaluator:
    """Answers by a function of the question; Ctrl-C instead of an answer after `stop_after` of them."""

    def __init__(self, reply: Reply, stop_after: int | None = None) -> None:
        self.reply, self.stop_after, self.asked = reply, stop_after, 0

    def evaluate(self, questions: Sequence[Question]) -> Iterator[Answer]:
        for question in questions:
            if self.asked == self.stop_after:
                raise KeyboardInterrupt
            self.asked += 1
            yield self.reply(question)


def search_of(*stages: Stage, attention_factor: float = 1.0, **settings: object) -> GradientSearch:
    return GradientSearch(stages or (STAGE,), GEOMETRY, GradientSettings(**settings), attention_factor)  # type: ignore[arg-type]


def complete(search: DialogueSearch, reply: Reply) -> list[tuple[Question, Answer]]:
    """Run `search` to its end without a log. Everything it asked, and the answers."""
    said: list[tuple[Question, Answer]] = []
    while not search.done:
        questions = search.ask()
        answers = [reply(question) for question in questions]
        said += zip(questions, answers, strict=True)
        search.tell(answers)
    return said


def logged(path: Path, search: _S, evaluator: ReplyEvaluator, *, resume: bool = False) -> _S:
    """Run `search` to its end with its log at `path`."""
    with (SearchLog.resume if resume else SearchLog.create)(path, HEADER) as log:
        conversation = Conversation(evaluator, log)
        run_search(search, conversation)
        conversation.finish()
    return search


def check_stops_anywhere(folder: Path, make: Callable[[], Search], reply: Reply) -> None:
    """Ctrl-C after 0, 1, 2, … answers: when resumed, the same log byte for byte, the same end, nothing asked twice."""
    whole = ReplyEvaluator(reply)
    expected = logged(folder / "whole", make(), whole)
    log = (folder / "whole").read_bytes()
    rows = [row.row for row in read_log(folder / "whole")[1]]
    assert len({json.dumps(row, sort_keys=True) for row in rows}) <= whole.asked <= len(rows)
    for stop in range(whole.asked):
        path = folder / f"{stop}"
        with pytest.raises(KeyboardInterrupt):
            logged(path, make(), ReplyEvaluator(reply, stop))
        assert log.startswith(path.read_bytes())
        resumed = ReplyEvaluator(reply)
        search = logged(path, make(), resumed, resume=True)
        assert path.read_bytes() == log
        assert resumed.asked == whole.asked - stop
        assert (search.best, search.incumbent) == (expected.best, expected.incumbent)


def error_of(window: Window, optimum: np.ndarray) -> float:
    return float(np.mean((np.log(window.factors) - np.log(optimum)) ** 2))


def validations(said: list[tuple[Question, Answer]]) -> list[tuple[Question, Answer]]:
    return [(question, answer) for question, answer in said if question.split == "validation"]
