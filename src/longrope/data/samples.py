"""Samples of exactly L' tokens from tokenised documents, drawn by seed. Prepared once and shared by all candidates."""

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
    """Where a sample's text lies: its document, and the offset of its first token there (BOS not counted)."""

    document: str
    document_sha256: str
    offset: int


@dataclass(frozen=True, eq=False)
class Samples:
    """Texts of one length.

    ids: int64 (N, length), BOS first in every row if `has_bos`.
    rows: N origins, in the order of `ids`.
    """

    ids: torch.Tensor
    rows: tuple[SampleOrigin, ...]
    has_bos: bool

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64 or len(self.rows) != self.ids.shape[0]:
            raise ValueError(
                f"ids must be int64 (N, length) with N origins: {self.ids.dtype} {tuple(self.ids.shape)}, "
                f"{len(self.rows)} origins"
            )

    @property
    def length(self) -> int:
        """Tokens in every sample, BOS included."""
        return self.ids.shape[1]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the shape and the ids: two runs with the same one scored the same tokens."""
        head = f"{tuple(self.ids.shape)} ".encode()
        return sha256_bytes(head + self.ids.cpu().numpy().astype("<i8").tobytes())

    @property
    def document_hashes(self) -> tuple[str, ...]:
        """The documents that the samples were taken from, sorted, each once."""
        return tuple(sorted({row.document_sha256 for row in self.rows}))


def draw_samples(
    documents: Sequence[TokenizedDocument], *, length: int, count: int, seed: int, bos_token_id: int | None
) -> Samples:
    """`count` samples of exactly `length` tokens: BOS where there is one, then consecutive tokens of one document.

    Places are those of `draw_places`. Raises LongRopeError where the documents are too few or too short, or where a
    text holds the BOS id itself (one BOS, in front, is what the model was trained on).
    """
    if length < 2:
        raise LongRopeError(f"expected samples of at least 2 tokens (one to predict), found {length}")
    front = [] if bos_token_id is None else [bos_token_id]
    span = length - len(front)
    by_hash = {document.sha256: document for document in documents}
    rows = draw_places(documents, span=span, count=count, seed=seed)
    ids = np.empty((count, length), dtype=np.int64)
    for sample, row in zip(ids, rows, strict=True):
        text = by_hash[row.document_sha256].ids[row.offset : row.offset + span]
        check_no_bos(text, bos_token_id, row)
        sample[: len(front)] = front
        sample[len(front) :] = text
    return Samples(torch.from_numpy(ids), rows, has_bos=bos_token_id is not None)


def check_no_bos(text: Ids, bos_token_id: int | None, row: SampleOrigin) -> None:
    """Raise LongRopeError where a text, which lies at `row`, holds the BOS id itself."""
    if bos_token_id is not None and (text == bos_token_id).any():
        raise LongRopeError(
            f"the text of {row.document} holds the BOS token ({bos_token_id}), which belongs only in front; "
            "tokenise it with special tokens split"
        )


def draw_places(
    documents: Sequence[TokenizedDocument], *, span: int, count: int, seed: int
) -> tuple[SampleOrigin, ...]:
    """`count` non-overlapping places of `span` consecutive tokens, one per document first, then in further rounds.

    Every document of n tokens is cut into n // span slots behind a drawn phase; a round takes the next of its slots
    in drawn order. The same (documents, span, count, seed) gives the same places whatever order the documents are
    listed in, and a smaller count gives the first of them. Identical documents count once.

    Raises LongRopeError for numbers that describe no draw, or where there are fewer places than `count`.
    """
    if span < 1 or count < 1 or seed < 0:
        raise LongRopeError(f"expected span and count from 1 and a seed from 0, found {span}, {count} and {seed}")
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
        raise _too_little(unique, span, count, possible)
    slots = [slots[place] for place in rng.permutation(len(slots))]
    rounds = max(map(len, slots))
    places = (own[turn] for turn in range(rounds) for own in slots if turn < len(own))
    return tuple(place for place, _ in zip(places, range(count), strict=False))


def assert_disjoint(searched: Iterable[str], documents: Iterable[Document | TokenizedDocument]) -> None:
    """Check that no document to evaluate on has a hash among `searched`. Raises LongRopeError naming those that do."""
    hashes = frozenset(searched)
    shared = sorted({document.name for document in documents if document.sha256 in hashes})
    if shared:
        raise LongRopeError(
            f"expected evaluation texts that the search has not seen, found {len(shared)} it has: "
            f"{', '.join(shared)}; evaluate on other documents"
        )


def _too_little(documents: Sequence[TokenizedDocument], span: int, count: int, possible: int) -> LongRopeError:
    if not documents:
        return LongRopeError(f"expected documents to draw {count} samples of {span} tokens from, found none")
    longest = max(documents, key=lambda document: len(document.ids))
    found = sum(len(document.ids) for document in documents)
    return LongRopeError(
        f"need {count} samples of {span} consecutive tokens of one document, found {possible}: {found} tokens in "
        f"{len(documents)} documents, the longest {longest.name} with {len(longest.ids)}; give longer or more "
        "documents, or ask for fewer or shorter samples"
    )
