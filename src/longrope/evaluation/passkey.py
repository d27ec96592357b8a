"""Passkey retrieval (Mohtashami & Jaggi 2023), as LongRoPE measures it: five digits hidden in repeated sentences.

Prompts are put together from token ids: with the room for the answer they are exactly `length` tokens. The score is the
share of greedy replies that are right, not a loss. Needles in real text are in needle.py.
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
from longrope.data.tokens import Ids, bos_prefix, encode, encode_continuation
from longrope.errors import LongRopeError
from longrope.evaluation.base import EvalTask, PreparedTask, ScaledMethod, Suite
from longrope.evaluation.config import EvalConfig
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

SUITE = "passkey"
DIGITS = 5
INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them."
    " I will quiz you about the important information there.\n"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
PASSKEY = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True, eq=False)
class Passkeys:
    """Prompts of one length; `room` tokens are left for each answer, so that prompt and room are `length` tokens.

    prompts: N rows of `length − room` ids. depths: N numbers in [0, 1], where the key lies in the noise, to the nearest
    repetition.
    """

    length: int
    room: int
    prompts: tuple[Ids, ...]
    keys: tuple[str, ...]
    depths: tuple[float, ...]

    @cached_property
    def sha256(self) -> str:
        return ids_sha256(self.prompts)


def draw_passkeys(tokenizer: PreTrainedTokenizerBase, *, length: int, count: int, seed: int) -> Passkeys:
    """`count` prompts, keys and depths drawn uniformly by `seed`.

    Raises LongRopeError when `length` tokens cannot hold instruction, key, question and answer.
    """
    rng = np.random.default_rng(seed)
    keys = tuple(str(key) for key in rng.integers(10 ** (DIGITS - 1), 10**DIGITS, count))
    depths = tuple(rng.uniform(size=count).tolist())
    room = number_room(tokenizer, keys)
    begin, question = bos_prefix(tokenizer) + encode(tokenizer, INSTRUCTION), encode_continuation(tokenizer, QUESTION)
    noise = encode(tokenizer, NOISE)
    prompts = []
    for key, depth in zip(keys, depths, strict=True):
        sentence = encode_continuation(tokenizer, PASSKEY.format(key=key))
        frame = len(begin) + len(sentence) + len(question) + room
        if frame > length:
            raise LongRopeError(
                f"expected passkey prompts of at least {frame} tokens, which instruction, key, question and answer take"
                f" with this tokenizer; found a length of {length}",
                code="too-short-length",
            )
        filler = np.resize(noise, length - frame)  # the sentences over and over
        at = round(depth * (len(filler) // len(noise))) * len(noise)  # between two repetitions
        prompts.append(joined(begin, filler[:at], sentence, filler[at:], question))
    return Passkeys(length, room, tuple(prompts), keys, depths)


def measure_passkeys(
    scaled: ScaledModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Passkeys,
    method: Method,
    *,
    callbacks: Callbacks | None = None,
) -> list[EvalRow]:
    """One row: the share of prompts whose greedy continuation begins with the key and no further digit.

    Where processes share texts, continuations are `forced_reply`.
    """
    callbacks = callbacks or Callbacks()
    scaled.model.eval()
    window = method.window(samples.length)
    replies = []
    with torch.inference_mode():
        for ids, key in zip(samples.prompts, samples.keys, strict=True):
            if sharing_processes(scaled.model) > 1:
                with scaled.using(window):
                    reply, _ = forced_reply(scaled, tokenizer, ids, encode_continuation(tokenizer, f" {key}"))
            else:
                text = prefill(scaled, row_tensor(ids, device_of(scaled.model)), window)
                # One token more than the room shows whether the number goes on; it is never fed: nothing is longer.
                reply = greedy_reply(text, tokenizer, [], samples.room + 1)
            replies.append(reply)
            callbacks.on_eval_step()
    return passkey_rows(samples, replies, method.name)


def passkey_rows(samples: Passkeys, replies: Sequence[str], name: str) -> list[EvalRow]:
    """One row: the share of `replies`, one to each prompt, that begin with its key and no further digit."""
    hits = [float(leading_number(reply) == key) for reply, key in zip(replies, samples.keys, strict=True)]
    return [EvalRow(SUITE, name, samples.length, "accuracy", *mean_and_stderr(hits), len(hits))]


class PasskeySuite(Suite):
    """Passkey retrieval by length; it needs no text."""

    name = SUITE

    @classmethod
    def needs_text(cls, config: EvalConfig) -> bool:
        return False

    def check(self) -> None:
        self.context.check_ids(self.draw(min(self.context.lengths), count=1).prompts[0])

    def settings(self) -> dict[str, Any]:
        return {"trials": self.context.config.trials, "digits": DIGITS}

    def tasks(self) -> Iterator[EvalTask]:
        for length in self.context.lengths:
            yield EvalTask(self.name, "", length, self.context.config.trials)

    def prepare(self, task: EvalTask, original: ScaledMethod) -> PreparedTask:
        drawn, tokenizer = self.draw(task.length, self.context.config.trials), self.context.tokenizer
        return PreparedTask(
            drawn.sha256,
            {},
            lambda scaled, method, callbacks: measure_passkeys(scaled, tokenizer, drawn, method, callbacks=callbacks),
        )

    def draw(self, length: int, count: int) -> Passkeys:
        """`count` prompts of `length` tokens."""
        return draw_passkeys(self.context.tokenizer, length=length, count=count, seed=self.context.seed)
