"""Needles in real text: a grid of depth × length, many needles in one document, each asked for on its own.

A document is read once under one window, and every question is asked from its keys and values: ten depths cost one
long forward and ten short ones. The sentences are those of data/needles.py (LongRoPE2, App. C; RULER). Prompts are put
together from token ids; document, question and room for the answer are exactly `length` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from longrope.callbacks import Callbacks
from longrope.data.needles import ANSWER, NEEDLE, QUESTION, draw_key, draw_number, prompt_start
from longrope.data.samples import draw_origins
from longrope.data.tokens import Ids, TokenizedDocument, encode_continuation
from longrope.errors import LongRopeError
from longrope.evaluation.base import EvalTask, PreparedTask, ScaledMethod, Suite
from longrope.evaluation.results import EvalRow, mean_and_stderr
from longrope.evaluation.retrieval import (
    forced_reply,
    greedy_reply,
    ids_sha256,
    joined,
    leading_number,
    number_room,
    row_tensor,
)
from longrope.models.devices import device_of
from longrope.models.generation.cache import prefill
from longrope.models.scaled import ScaledModel
from longrope.models.shared_texts import sharing_processes
from longrope.rope.baselines import Method
from longrope.rope.scaling import Window

SUITE = "needle"
DIGITS = 7
MOST_DEPTHS = 100
"""The most depths of a grid: so many keys surely have questions of equally many tokens, whatever the tokenizer."""
SHARE = 0.5
"""The share of the shortest documents that their needles may take together; the rest is text."""


@dataclass(frozen=True)
class Needle:
    """One fact of a document and the question for it, as token ids. `depth` in [0, 1] is its place in the text."""

    depth: float
    number: str
    sentence: list[int]
    question: list[int]
    answer: list[int]


@dataclass(frozen=True, eq=False)
class NeedleDocument:
    """Instruction, text and its needles: `context` and any of the questions and its room are `length` tokens."""

    context: Ids
    needles: tuple[Needle, ...]


@dataclass(frozen=True, eq=False)
class NeedleGrid:
    """Documents of one length with `trials` needles at every depth. `sources`: SHA-256 of a document -> its name."""

    length: int
    room: int
    documents: tuple[NeedleDocument, ...]
    sources: dict[str, str]

    @cached_property
    def sha256(self) -> str:
        return ids_sha256(
            ids
            for document in self.documents
            for ids in (document.context, *(joined(needle.question, needle.answer) for needle in document.needles))
        )


def grid_depths(count: int) -> tuple[float, ...]:
    """`count` depths evenly spaced from 0, directly behind the instruction, to 1, directly before the question."""
    return tuple(np.linspace(0.0, 1.0, count).tolist()) if count > 1 else (0.5,)


def needles_that_fit(tokenizer: PreTrainedTokenizerBase, shortest: int, depths: int, seed: int) -> int:
    """The number of needles in a document that leaves documents of `shortest` tokens half text: 1 … `depths`.

    A run uses the same number at every length, or its lengths would not be comparable.
    """
    (needle,) = _draw_alike(tokenizer, (0.5,), np.random.default_rng(seed))
    spare = shortest - len(prompt_start(tokenizer)) - len(needle.question)
    return int(min(max(SHARE * spare // len(needle.sentence), 1), depths))


def draw_grid(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    depths: Sequence[float],
    trials: int,
    per_document: int,
    seed: int,
) -> NeedleGrid:
    """`trials` needles at each of `depths`, `per_document` or fewer to a document, drawn by `seed`.

    Where the depths need several documents, neighbouring depths go to different ones. The text comes from the places of
    `draw_origins`: one per document first. The needles of a document have questions of equally many tokens.

    Raises LongRopeError for too many depths, when instruction, needles and question alone are longer than `length`, or
    when the documents are too few or too short.
    """
    if not 1 <= len(depths) <= MOST_DEPTHS:
        raise LongRopeError(f"expected 1 to {MOST_DEPTHS} needle depths, found {len(depths)}", code="invalid-setting")
    rng = np.random.default_rng(seed)
    begin = prompt_start(tokenizer)
    groups = -(-len(depths) // per_document)
    drawn = [_draw_alike(tokenizer, depths[group::groups], rng) for _ in range(trials) for group in range(groups)]
    room = number_room(tokenizer, [needle.number for needles in drawn for needle in needles])
    texts = [
        length - len(begin) - sum(len(needle.sentence) for needle in needles) - len(needles[0].question) - room
        for needles in drawn
    ]
    if min(texts) < 1:
        raise LongRopeError(
            f"expected needle documents longer than instruction, {per_document} needles, question and answer, which "
            f"take {length - min(texts)} tokens of this tokenizer; found a length of {length}",
            code="too-short-length",
        )
    places = draw_origins(documents, span=max(texts), count=len(drawn), seed=seed)
    by_hash = {document.sha256: document for document in documents}
    made = []
    for needles, size, place in zip(drawn, texts, places, strict=True):
        text = by_hash[place.document_sha256].ids[place.offset : place.offset + size]
        made.append(NeedleDocument(joined(begin, *_with_needles(text, needles)), needles))
    return NeedleGrid(length, room, tuple(made), {place.document_sha256: place.document for place in places})


def _draw_alike(
    tokenizer: PreTrainedTokenizerBase, depths: Sequence[float], rng: np.random.Generator
) -> tuple[Needle, ...]:
    """A needle per depth, keys all different and questions of equally many tokens, so that one document fits all."""
    alike: dict[int, dict[str, Needle]] = {}
    while True:
        key, number = draw_key(rng), draw_number(rng, DIGITS)
        question = encode_continuation(tokenizer, QUESTION.format(key=key))
        family = alike.setdefault(len(question), {})
        sentence, answer = (
            encode_continuation(tokenizer, form.format(key=key, number=number)) for form in (NEEDLE, ANSWER)
        )
        family.setdefault(key, Needle(depths[len(family)], number, sentence, question, answer))
        if len(family) == len(depths):
            return tuple(family.values())


def _with_needles(text: Ids, needles: Sequence[Needle]) -> list[Ids | list[int]]:
    """The pieces of the text with every needle's sentence between them, at its depth to the token."""
    pieces: list[Ids | list[int]] = []
    begin = 0
    for needle in sorted(needles, key=lambda needle: needle.depth):
        at = round(needle.depth * len(text))
        pieces += [text[begin:at], needle.sentence]
        begin = at
    return [*pieces, text[begin:]]


def measure_needles(
    scaled: ScaledModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: NeedleGrid,
    method: Method,
    *,
    callbacks: Callbacks | None = None,
) -> list[EvalRow]:
    """Two rows per depth: `accuracy`, the share of numbers said exactly, and `answer_logprob`, in nats per token.

    The log-probability is Σ over answer tokens / their number, given the question; its standard error is over needles.
    Where processes share texts, every question costs a forward of its document, and replies are `forced_reply`.
    """
    callbacks = callbacks or Callbacks()
    scaled.model.eval()
    window = method.window(grid.length)
    replies, losses = [], []
    with torch.inference_mode():
        for document in grid.documents:
            for reply, nlls in _replies(scaled, tokenizer, document, window, grid.room + 1):
                replies.append(reply)
                losses.append(nlls)
            callbacks.on_eval_step()
    return needle_rows(grid, replies, losses, method.name)


def _replies(
    scaled: ScaledModel, tokenizer: PreTrainedTokenizerBase, document: NeedleDocument, window: Window, room: int
) -> Iterator[tuple[str, list[float]]]:
    """For every needle the reply, and the loss of each token of its answer in nats.

    `room`: tokens of a reply. One more than the answer's shows whether the number goes on; it is never fed.
    """
    if sharing_processes(scaled.model) > 1:
        with scaled.using(window):
            for asked in document.needles:
                text = joined(document.context, asked.question)
                yield forced_reply(scaled, tokenizer, text, asked.answer)
        return
    device = device_of(scaled.model)
    read = prefill(scaled, row_tensor(document.context, device), window)
    for asked in document.needles:
        nll = read.score(row_tensor(asked.question + asked.answer, device))[-len(asked.answer) :]
        yield greedy_reply(read, tokenizer, asked.question, room), nll.tolist()


def needle_rows(
    grid: NeedleGrid, replies: Sequence[str], losses: Sequence[Sequence[float]] | None, name: str
) -> list[EvalRow]:
    """The rows of `measure_needles` from a reply for every needle, and the losses of every answer's tokens if known."""
    asked = [needle for document in grid.documents for needle in document.needles]
    rows = []
    for depth in sorted({needle.depth for needle in asked}):
        at = [place for place, needle in enumerate(asked) if needle.depth == depth]
        hits = [float(leading_number(replies[place]) == asked[place].number) for place in at]
        rows.append(EvalRow(SUITE, name, grid.length, "accuracy", *mean_and_stderr(hits), len(at), {"depth": depth}))
        if losses is not None:
            answers = [losses[place] for place in at]
            tokens = [loss for answer in answers for loss in answer]
            _, stderr = mean_and_stderr([-sum(answer) / len(answer) for answer in answers])
            found = -sum(tokens) / len(tokens), stderr
            rows.append(EvalRow(SUITE, name, grid.length, "answer_logprob", *found, len(at), {"depth": depth}))
    return rows


class NeedleSuite(Suite):
    """The needle grid: depth × length."""

    name = SUITE

    @cached_property
    def per_document(self) -> int:
        """Needles in one document, the same at every length."""
        context = self.context
        asked, depths = context.config.needles, context.config.depths
        fitting = needles_that_fit(context.tokenizer, min(context.lengths), depths, context.seed)
        return fitting if asked is None else min(asked, depths)

    @property
    def documents_per_trial(self) -> int:
        return -(-self.context.config.depths // self.per_document)

    def check(self) -> None:
        context = self.context
        for document in self.draw(min(context.lengths), trials=1).documents:
            context.check_ids(document.context)
        count = context.config.trials * self.documents_per_trial
        draw_origins(context.tokenized, span=max(context.lengths), count=count, seed=context.seed)

    def settings(self) -> dict[str, Any]:
        config = self.context.config
        counts = {"trials": config.trials, "depths": config.depths, "needles_per_document": self.per_document}
        return {**counts, "digits": DIGITS}

    def tasks(self) -> Iterator[EvalTask]:
        for length in self.context.lengths:
            yield EvalTask(self.name, "", length, self.context.config.trials * self.documents_per_trial)

    def prepare(self, task: EvalTask, original: ScaledMethod) -> PreparedTask:
        grid, tokenizer = self.draw(task.length, self.context.config.trials), self.context.tokenizer
        return PreparedTask(
            grid.sha256,
            grid.sources,
            lambda scaled, method, callbacks: measure_needles(scaled, tokenizer, grid, method, callbacks=callbacks),
        )

    def draw(self, length: int, trials: int) -> NeedleGrid:
        """The grid of `length` tokens with `trials` needles at every depth."""
        return draw_grid(
            self.context.tokenized,
            self.context.tokenizer,
            length=length,
            depths=grid_depths(self.context.config.depths),
            trials=trials,
            per_document=self.per_document,
            seed=self.context.seed,
        )
