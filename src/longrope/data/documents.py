"""The text document: what every source yields and every hash is of. Not where documents come from (sources.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from longrope.errors import LongRopeError
from longrope.storage import sha256_bytes


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    name: where it came from, for people (`book.txt`, `books.jsonl:12`, `book:NAME`).
    sha256: of the text as UTF-8; it alone says whether two documents are the same.
    """

    name: str
    text: str
    sha256: str

    @classmethod
    def of(cls, name: str, text: str) -> Document:
        """The document of `text`, hashed. Raises LongRopeError where `text` is blank, holds NUL or is no Unicode."""
        if not text.strip():
            raise LongRopeError(f"expected text in {name}, found none (it is empty or blank)")
        if "\0" in text:
            raise LongRopeError(f"expected text in {name}, found NUL characters: it is binary")
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise LongRopeError(
                f"expected valid Unicode in {name}, found a lone surrogate at character {error.start}"
            ) from error
        return cls(name, text, sha256_bytes(encoded))


class Duplicate(NamedTuple):
    """A document that was dropped because its text is that of another, kept one."""

    name: str
    same_as: str


def drop_duplicates(documents: Iterable[Document]) -> tuple[list[Document], list[Duplicate]]:
    """(documents with every text once, what was dropped): the first of identical texts stays, the order is kept."""
    kept: dict[str, Document] = {}
    dropped: list[Duplicate] = []
    for document in documents:
        first = kept.setdefault(document.sha256, document)
        if first is not document:
            dropped.append(Duplicate(document.name, first.name))
    return list(kept.values()), dropped
