"""Samples of exactly L' tokens, drawn from tokenised documents by seed, and the check that two draws share no text.

A search draws its samples once and scores every candidate on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from longrope.data.documents import Document
from longrope.data.tokens import Ids, TokenizedDocument
from longrope.errors import LongRopeError
from longrope.storage import sha256_bytes


@dataclass(frozen=True, slots=True)
class SampleOrigin:
    """The place that a sample's text comes from: a document, and the offset of its first token there (without BOS)."""

    document: str
    document_sha256: str
    offset: int


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples of one length.

    ids: int64 (N, length), BOS first in every sample if `has_bos`.
    origins: N of them, in the order of `ids`.
    """

    ids: torch.Tensor
    origins: tuple[SampleOrigin, ...]
    has_bos: bool

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64 or len(self.origins) != self.ids.shape[0]:
            raise ValueError(
                f"ids must be int64 (N, length) with N origins: {self.ids.dtype} {tuple(self.ids.shape)}, "
                f"{len(self.origins)} origins"
            )

    @property
    def length(self) -> int:
        """Tokens of every sample, BOS included."""
        return self.ids.shape[1]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the shape and the ids: two runs with the same one scored the same tokens."""
        head = f"{tuple(self.ids.shape)} ".encode()
        return sha256_bytes(head + self.ids.cpu().numpy().astype("<i8").tobytes())

    @property
    def document_hashes(self) -> tuple[str, ...]:
        """SHA-256 of the documents that the samples come from, sorted, each once."""
        return tuple(sorted({origin.document_sha256 for origin in self.origins}))


def draw_samples(
    documents: Sequence[TokenizedDocument], *, length: int, count: int, seed: int, bos_token_id: int | None
) -> Samples:
    """Draw `count` samples of exactly `length` tokens: BOS where there is one, then consecutive tokens of one document.

    Origins are those of `draw_origins`. Raises LongRopeError: `too-short-text` where the documents are too few or too
    short, `bos-in-text` where a text holds BOS (models were trained with one BOS, in front).
    """
    if length < 2:
        raise LongRopeError(
            f"expected samples of at least 2 tokens (one to predict), found {length}", code="invalid-setting"
        )
    front = [] if bos_token_id is None else [bos_token_id]
    span = length - len(front)
    by_hash = {document.sha256: document for document in documents}
    origins = draw_origins(documents, span=span, count=count, seed=seed)
    ids = np.empty((count, length), dtype=np.int64)
    for sample, origin in zip(ids, origins, strict=True):
        document = by_hash[origin.document_sha256]
        text = document.ids[origin.offset : origin.offset + span]
        check_no_bos(text, bos_token_id, document)
        sample[: len(front)] = front
        sample[len(front) :] = text
    return Samples(torch.from_numpy(ids), origins, has_bos=bos_token_id is not None)


def check_no_bos(text: Ids, bos_token_id: int | None, document: TokenizedDocument) -> None:
    """Raise LongRopeError (`bos-in-text`) where the text from `document` holds the BOS id; a chat template may put it
    there."""
    if bos_token_id is not None and document.chat_template is None and (text == bos_token_id).any():
        raise LongRopeError(
            f"the text of {document.name} holds the BOS token ({bos_token_id}), which belongs only in front",
            code="bos-in-text",
            hint="tokenise it with special tokens split",
        )


def draw_origins(
    documents: Sequence[TokenizedDocument], *, span: int, count: int, seed: int
) -> tuple[SampleOrigin, ...]:
    """Draw `count` places of `span` consecutive tokens that do not overlap: one per document, then in further rounds.

    A document of n tokens is cut into n // span slots after a drawn phase; a round takes the next slot of each document
    in drawn order. The same (documents, span, count, seed) gives the same places in whatever order the documents are
    listed, and a smaller count gives the first of them. Identical documents count once.

    Raises LongRopeError: `invalid-setting` for numbers out of range, `too-short-text` where there are fewer than
    `count` places.
    """
    if span < 1 or count < 1 or seed < 0:
        raise LongRopeError(
            f"expected span and count from 1 and a seed from 0, found {span}, {count} and {seed}",
            code="invalid-setting",
        )
    ordered = sorted(documents, key=lambda document: (document.sha256, document.name), reverse=True)
    unique = list({document.sha256: document for document in ordered}.values())  # by hash, not by listing
    rng = np.random.default_rng(seed)
    slots: list[list[SampleOrigin]] = []
    for document in unique:
        number, spare = divmod(len(document.ids), span)
        phase = int(rng.integers(spare + 1))
        order = rng.permutation(number)
        slots.append([SampleOrigin(document.name, document.sha256, phase + int(slot) * span) for slot in order])
    possible = sum(map(len, slots))
    if possible < count:
        raise _too_short(unique, span, count, possible)
    slots = [slots[place] for place in rng.permutation(len(slots))]
    rounds = max(map(len, slots))
    places = (own[turn] for turn in range(rounds) for own in slots if turn < len(own))
    return tuple(place for place, _ in zip(places, range(count), strict=False))


def shared_names(searched: Iterable[str], documents: Iterable[Document | TokenizedDocument]) -> list[str]:
    """The names of the `documents` whose hashes are among `searched`, sorted."""
    hashes = frozenset(searched)
    return sorted({document.name for document in documents if document.sha256 in hashes})


def require_disjoint(
    searched: Iterable[str],
    documents: Iterable[Document | TokenizedDocument],
    hint: str = "evaluate on other documents",
) -> None:
    """Raise LongRopeError (`seen-texts`), naming them, where some of `documents` have hashes among `searched`."""
    if shared := shared_names(searched, documents):
        raise LongRopeError(
            f"expected evaluation texts that the search has not seen, found {len(shared)} it has: {', '.join(shared)}",
            code="seen-texts",
            hint=hint,
        )


def _too_short(documents: Sequence[TokenizedDocument], span: int, count: int, possible: int) -> LongRopeError:
    if not documents:
        return LongRopeError(
            f"expected documents to draw {count} samples of {span} tokens from, found none", code="missing-data"
        )
    longest = max(documents, key=lambda document: len(document.ids))
    found = sum(len(document.ids) for document in documents)
    return LongRopeError(
        f"need {count} samples of {span} consecutive tokens of one document, found {possible}: {found} tokens in "
        f"{len(documents)} documents, the longest {longest.name} with {len(longest.ids)}",
        code="too-short-text",
        hint="give longer or more documents, or ask for fewer or shorter samples",
    )
