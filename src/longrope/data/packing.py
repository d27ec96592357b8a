"""Rows of N tokens to train on, packed from documents: side by side, in full segments, or chained.

Every document, or piece of one, stands between BOS (where the tokenizer puts one) and EOS, its positions begin at 0,
and attention stays inside it. In the part `chunks` documents are chained and the chain is cut at N instead: positions
run through the row, and so does attention, as LongRoPE trains (2402.13753, §4.1). A `PackedRow` only says which tokens
it holds, so a plan is cheap to hash and to keep; `PackedRows.tensors` makes a row when the Trainer needs it. Masks,
windows and losses are in `train/`.

| part | documents (BOS and EOS counted) | a row holds |
|---|---|---|
| `short` | of at most the original window | as many as fit |
| `pieces` | longer ones, cut into pieces of the original window | as many as fit |
| `medium` | longer than the original window, shorter than those of `long` | as many as fit |
| `long` | from N tokens on, or from `long_from` to `long_to` | one segment of N tokens, or as many documents as fit |
| `chunks` | all that no other part of the mix takes, up to `long_to` | N tokens of the chain |

`short` and `pieces` train the original window, the others the new one (LongRoPE2 §3.3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longrope.data.mix import CHUNKS, LONG, MEDIUM, PARTS, PIECES, SHORT
from longrope.data.tokens import Ids, TokenizedDocument, bos_of
from longrope.errors import LongRopeError
from longrope.storage import sha256_text

IGNORED = -100  # a target without a loss: the default `ignore_index` of torch's cross_entropy
_LOOK_AHEAD = 64  # the next document that fits into a row is looked for among so many


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The ids of the tokens around every document, BOS and EOS; None where the tokenizer has none."""

    bos: int | None
    eos: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """The special tokens of a tokenizer: the EOS it names, and BOS where it really puts one (`bos_of`)."""
        eos = tokenizer.eos_token_id
        return cls(bos_of(tokenizer), eos if isinstance(eos, int) else None)

    @property
    def count(self) -> int:
        """Tokens added to every document: 0, 1 or 2."""
        return (self.bos is not None) + (self.eos is not None)


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Tokens `start` to `stop` of document number `document`; in `chunks`, of the document with BOS and EOS around."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PackedRow:
    """The spans that a row of N tokens holds, in this order; the rest of the row is padding."""

    part: str
    spans: tuple[TokenSpan, ...]

    def tokens(self, special_tokens: SpecialTokens) -> int:
        """Tokens of the row without its padding, BOS and EOS counted."""
        around = 0 if self.part == CHUNKS else special_tokens.count
        return sum(span.stop - span.start + around for span in self.spans)


@dataclass(frozen=True, eq=False)
class PackedRows:
    """A plan of rows of `length` tokens over `documents`; `rows[i:i + group]` are of one part where group divides i.

    round_tokens: by part, the tokens of one round over its documents.
    """

    documents: tuple[TokenizedDocument, ...]
    rows: tuple[PackedRow, ...]
    length: int
    special_tokens: SpecialTokens
    round_tokens: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def tensors(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, positions and targets of row `index`, int64 (N,) each.

        Positions restart at 0 with every document and with the padding. The target of a token is the next token of its
        document; it is IGNORED for a document's last token and for padding, so that no document predicts another. In
        `chunks` nothing restarts, and the target is the next token of the row.
        """
        if self.rows[index].part == CHUNKS:
            return self._chunk(index)
        ids = np.full(self.length, self.special_tokens.eos or 0, dtype=np.int64)
        positions = np.empty(self.length, dtype=np.int64)
        targets = np.full(self.length, IGNORED, dtype=np.int64)
        at = 0
        for span in self.rows[index].spans:
            size = span.stop - span.start + self.special_tokens.count
            own = ids[at : at + size]
            front = self.special_tokens.bos is not None
            own[front : front + span.stop - span.start] = self.documents[span.document].ids[span.start : span.stop]
            if self.special_tokens.bos is not None:
                own[0] = self.special_tokens.bos
            if self.special_tokens.eos is not None:
                own[-1] = self.special_tokens.eos
            positions[at : at + size] = np.arange(size)
            targets[at : at + size - 1] = own[1:]
            at += size
        positions[at:] = np.arange(self.length - at)
        return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(targets)

    def _chunk(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors of a piece of the chain: positions 0 … N − 1, and every token but the last has a target."""
        pieces = [
            _between(self.documents[span.document].ids, self.special_tokens)[span.start : span.stop]
            for span in self.rows[index].spans
        ]
        ids = np.concatenate(pieces).astype(np.int64)
        targets = np.append(ids[1:], IGNORED)
        return torch.from_numpy(ids), torch.arange(self.length), torch.from_numpy(targets)

    def filled(self, index: int) -> int:
        """Tokens of row `index` without its padding."""
        return self.rows[index].tokens(self.special_tokens)

    def scored(self, index: int) -> int:
        """Targets of row `index` that have a loss."""
        row = self.rows[index]
        return self.filled(index) - (1 if row.part == CHUNKS else len(row.spans))

    def rounds(self, shares: Mapping[str, float], rows: int) -> dict[str, float]:
        """The number of times that `rows` rows of these `shares` (part -> share of the tokens) read the documents of
        each part, at most: padding is counted as text."""
        return {part: share * rows * self.length / self.round_tokens[part] for part, share in shares.items()}

    @property
    def tokens_by_part(self) -> dict[str, int]:
        """Tokens of each part that has any, without padding."""
        total = dict.fromkeys(PARTS, 0)
        for index, row in enumerate(self.rows):
            total[row.part] += self.filled(index)
        return {part: tokens for part, tokens in total.items() if tokens}

    @property
    def document_hashes(self) -> tuple[str, ...]:
        """SHA-256 of the documents that some row holds a piece of, sorted."""
        used = {span.document for row in self.rows for span in row.spans}
        return tuple(sorted(self.documents[index].sha256 for index in used))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of documents, special tokens and spans: two plans with the same hash make the same rows."""
        places = [
            f"{row.part} " + " ".join(f"{span.document}:{span.start}:{span.stop}" for span in row.spans)
            for row in self.rows
        ]
        head = f"{self.length} {self.special_tokens.bos} {self.special_tokens.eos}"
        return sha256_text("\n".join([head, *(document.sha256 for document in self.documents), *places]))


def pack(
    documents: Sequence[TokenizedDocument],
    mix: Mapping[str, float],
    *,
    length: int,
    short_length: int,
    count: int,
    group: int,
    special_tokens: SpecialTokens,
    seed: int,
    long_from: int | None = None,
    long_to: int | None = None,
) -> PackedRows:
    """Plan `count` rows of `length` tokens in groups of one part, whose tokens keep to the shares of `mix` all along.

    `short_length` is the original window; `group` the rows that one device computes at once, because one forward has
    one window. `long_from` and `long_to` bound the documents of the part `long`, BOS and EOS counted: by default from
    `length` on, without an end; longer ones are left out. `seed` decides the order of documents; all of a part come
    before one comes again, and a later round cuts segments elsewhere. The same documents in another order give the same
    rows.

    Raises LongRopeError: `too-short-text` when a part has no documents, `invalid-setting` when the lengths or counts do
    not fit each other.
    """
    if not special_tokens.count + 1 < short_length <= length or count < 1 or count % group:
        raise LongRopeError(
            f"expected a length of at least the original window of {short_length} tokens, which is more than BOS and "
            f"EOS, and whole groups of rows; found {length} tokens and {count} rows in groups of {group}",
            code="invalid-setting",
        )
    long_from = length if long_from is None else long_from
    if not short_length <= long_from <= length or (long_to is not None and long_to < long_from):
        raise LongRopeError(
            f"expected documents of the part 'long' from between the original window of {short_length} tokens and the "
            f"length of {length} up to no fewer tokens; found `long_from` {long_from} and `long_to` {long_to}",
            code="invalid-setting",
        )
    unique = {document.sha256: document for document in documents}
    ordered = tuple(unique[digest] for digest in sorted(unique))
    sizes = [len(document.ids) + special_tokens.count for document in ordered]
    bounds = {
        SHORT: (special_tokens.count + 1, short_length),
        PIECES: (short_length + 1, None),
        MEDIUM: (short_length + 1, long_from - 1),
        LONG: (long_from, long_to),
    }
    own = {part: _inside(sizes, *bounds[part]) for part in mix if part != CHUNKS}
    if CHUNKS in mix:
        bounds[CHUNKS] = (special_tokens.count + 1, long_to)
        taken = {index for indices in own.values() for index in indices}
        own[CHUNKS] = [index for index in _inside(sizes, *bounds[CHUNKS]) if index not in taken]
    for part in mix:
        if not own[part]:
            raise _no_documents(part, *bounds[part], ordered, sizes)
    streams = {
        part: _Stream(
            part, ordered, own[part], length=length, short_length=short_length, special_tokens=special_tokens, seed=seed
        )
        for part in mix
    }
    generators = {part: stream.rows() for part, stream in streams.items()}
    rows: list[PackedRow] = []
    given = dict.fromkeys(mix, 0)
    while len(rows) < count:
        # The part that is furthest behind its share of the tokens, this group included.
        total = sum(given.values()) + group * length
        part = max(mix, key=lambda name: mix[name] * total - given[name])
        for _ in range(group):
            row = next(generators[part])
            given[part] += row.tokens(special_tokens)
            rows.append(row)
    round_tokens = {part: stream.round_tokens for part, stream in streams.items()}
    return PackedRows(ordered, tuple(rows), length, special_tokens, round_tokens)


def _inside(sizes: Sequence[int], least: int, most: int | None) -> list[int]:
    """The documents of `least` to `most` tokens."""
    return [index for index, size in enumerate(sizes) if least <= size and (most is None or size <= most)]


def _between(ids: Ids, special_tokens: SpecialTokens) -> Ids:
    """A document with BOS and EOS around, where the tokenizer has them."""
    front = [] if special_tokens.bos is None else [special_tokens.bos]
    back = [] if special_tokens.eos is None else [special_tokens.eos]
    return np.concatenate([np.array(front, ids.dtype), ids, np.array(back, ids.dtype)])


def _no_documents(
    part: str, least: int, most: int | None, documents: Sequence[TokenizedDocument], sizes: Sequence[int]
) -> LongRopeError:
    longest = max(range(len(sizes)), key=sizes.__getitem__, default=None)
    found = "no documents" if longest is None else f"the longest, {documents[longest].name}, {sizes[longest]}"
    bounds = f"at least {least}" if most is None else f"{least} to {most}"
    others = " that no other part takes" if part == CHUNKS else ""
    return LongRopeError(
        f"the part {part!r} of the mix needs documents of {bounds} tokens{others}, found none among {len(sizes)} "
        f"({found})",
        code="too-short-text",
        hint="give other `data`, another `mix` or another `length`",
    )


class _Stream:
    """Endless rows of one part, from its `own` documents (their numbers among `documents`)."""

    def __init__(
        self,
        part: str,
        documents: Sequence[TokenizedDocument],
        own: Sequence[int],
        length: int,
        short_length: int,
        special_tokens: SpecialTokens,
        seed: int,
    ) -> None:
        self.part, self.documents, self.own, self.length = part, documents, own, length
        self.special_tokens, self.seed = special_tokens, seed
        self.cut = {PIECES: short_length, LONG: length}.get(part)

    @property
    def round_tokens(self) -> int:
        """Tokens of one round over the documents, without what is left over where they are cut."""
        total = 0
        for index in self.own:
            size = len(self.documents[index].ids) + self.special_tokens.count
            if self.cut is None or size <= self.cut:
                total += size
            else:
                total += (size - self.special_tokens.count) // (self.cut - self.special_tokens.count) * self.cut
        return total

    def rows(self) -> Iterator[PackedRow]:
        return self._chained() if self.part == CHUNKS else self._side_by_side()

    def _chained(self) -> Iterator[PackedRow]:
        """The chain of whole documents, cut every N tokens; what is left of a document begins the next row."""
        taken: list[TokenSpan] = []
        room = self.length
        for span in self._spans():
            start = 0
            stop = span.stop + self.special_tokens.count
            while start < stop:
                end = min(stop, start + room)
                taken.append(TokenSpan(span.document, start, end))
                room -= end - start
                start = end
                if room == 0:
                    yield PackedRow(self.part, tuple(taken))
                    taken, room = [], self.length

    def _side_by_side(self) -> Iterator[PackedRow]:
        ahead: deque[TokenSpan] = deque()
        spans = self._spans()
        while True:
            taken: list[TokenSpan] = []
            room = self.length
            while True:
                while len(ahead) < _LOOK_AHEAD:
                    ahead.append(next(spans))
                fits = next((at for at, span in enumerate(ahead) if self._size(span) <= room), None)
                if fits is None:
                    break
                taken.append(ahead[fits])
                del ahead[fits]
                room -= self._size(taken[-1])
            yield PackedRow(self.part, tuple(taken))

    def _size(self, span: TokenSpan) -> int:
        return span.stop - span.start + self.special_tokens.count

    def _spans(self) -> Iterator[TokenSpan]:
        """The documents of the part, or pieces of them, round after round."""
        turn = 0
        while True:
            rng = np.random.default_rng([self.seed, list(PARTS).index(self.part), turn])
            spans: list[TokenSpan] = []
            for index in self.own:
                tokens = len(self.documents[index].ids)
                size = tokens if self.cut is None else min(tokens, self.cut - self.special_tokens.count)
                number, spare = divmod(tokens, size)
                phase = int(rng.integers(spare + 1))
                spans += [TokenSpan(index, phase + slot * size, phase + (slot + 1) * size) for slot in range(number)]
            yield from (spans[place] for place in rng.permutation(len(spans)))
            turn += 1
