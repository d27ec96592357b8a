"""`Document`: one text with its name and its hash. `sources.py` reads documents from files, folders and datasets."""

from __future__ import annotations

from dataclasses import dataclass

from longrope.errors import LongRopeError
from longrope.storage import sha256_bytes


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    name: where it came from, for people (`book.txt`, `books.jsonl:12`, `book:NAME`).
    sha256: of the text as UTF-8; two documents are the same when these are.
    chat_template: SHA-256 of the chat template that wrote the text from messages: its special tokens are then tokens.
    None for plain text, where a special token spelled out stays text.
    """

    name: str
    text: str
    sha256: str
    chat_template: str | None = None

    @classmethod
    def of(cls, name: str, text: str, chat_template: str | None = None) -> Document:
        """Hash `text`. Raises LongRopeError (`not-text`) where it is blank, holds NUL or is no valid Unicode."""
        if not text.strip():
            raise LongRopeError(f"expected text in {name}, found none (it is empty or blank)", code="not-text")
        if "\0" in text:
            raise LongRopeError(f"expected text in {name}, found NUL characters: it is binary", code="not-text")
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise LongRopeError(
                f"expected valid Unicode in {name}, found a lone surrogate at character {error.start}", code="not-text"
            ) from error
        return cls(name, text, sha256_bytes(encoded), chat_template)
