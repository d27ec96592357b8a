"""Prompts made of token ids, greedy replies to them, and the number in a reply: common to passkey, needle and RULER."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longrope.data.tokens import Ids, encode_continuation
from longrope.models.devices import device_of
from longrope.models.generation.cache import Prefilled
from longrope.models.scaled import ScaledModel
from longrope.models.scoring import answer_scores
from longrope.storage import sha256_bytes


def greedy_reply(
    text: Prefilled, tokenizer: PreTrainedTokenizerBase, question: Sequence[int] | Ids, max_new_tokens: int
) -> str:
    """The greedy reply to `question` (token ids, possibly none) after `text`, without special tokens."""
    scaled = text.scaled
    tokens = text.greedy(row_tensor(question, device_of(scaled.model)), max_new_tokens, stop_tokens(scaled, tokenizer))
    reply: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return reply


def forced_reply(
    scaled: ScaledModel, tokenizer: PreTrainedTokenizerBase, text: Ids, answer: Sequence[int]
) -> tuple[str, list[float]]:
    """The greedy reply to `text` as far as it goes along with `answer`, and the loss of each token of that, in nats.

    One forward of text and answer, under the pinned window: the most likely token after each of them is the greedy one
    as long as those before it are the answer's. A reply that spells the answer in other tokens ends at the first one.
    """
    ids = row_tensor(joined(text, answer), device_of(scaled.model))
    nll, tops = answer_scores(scaled.model, ids, start=len(text) - 1)
    said: list[int] = tops[0].tolist()
    along = next((place for place, token in enumerate(answer) if said[place] != token), len(answer))
    reply: str = tokenizer.decode(said[: along + 1], skip_special_tokens=True)
    return reply, nll[0].tolist()


def stop_tokens(scaled: ScaledModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a reply: the EOS of the model's generation config and of its tokenizer."""
    configured = getattr(scaled.model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*found, tokenizer.eos_token_id) if isinstance(token, int))


def leading_number(text: str) -> str | None:
    """The digits that a reply begins with, in full; None where it begins with something else."""
    match = re.match(r"\s*([0-9]+)", text)
    return match[1] if match else None


def number_room(tokenizer: PreTrainedTokenizerBase, numbers: Iterable[str]) -> int:
    """Tokens that a reply of any of `numbers` may take: its own tokens, or one per digit and one for a space.

    A model need not split digits as its tokenizer does, so replies are compared as text, not as tokens.
    """
    return max(max(len(encode_continuation(tokenizer, f" {number}")), len(number) + 1) for number in numbers)


def joined(*pieces: Sequence[int] | Ids) -> Ids:
    """The ids of all pieces, one after the other: int32, four bytes a token however long the prompt."""
    return np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])


def row_tensor(ids: Sequence[int] | Ids, device: torch.device) -> Tensor:
    """`ids` as int64 (1, T), as models take them."""
    return torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(device)


def ids_sha256(rows: Iterable[Ids]) -> str:
    """SHA-256 over token ids, row by row."""
    digests = (sha256_bytes(np.asarray(row).astype("<i4").tobytes()) for row in rows)
    return sha256_bytes("\n".join(digests).encode())
