"""`Document`: one text with its name and its hash. `sources.py` reads documents from files, folders and datasets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from longrope.errors import LongRopeError
from longrope.storage import sha256_bytes

_LARGEST = 100_000_000  # characters of a text: a tokenizer needs some 200 bytes for each
_LONGEST_RUN = 4_000_000  # characters without white space
_RUN = re.compile(rf"\S{{{_LONGEST_RUN + 1}}}")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with its name and its hash.

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
        if len(text) > _LONGEST_RUN and (found := _RUN.search(text)):
            raise LongRopeError(
                f"expected words in {name}, found more than {_LONGEST_RUN:,} characters without white space from "
                f"character {found.start():,}: it is no text",
                code="not-text",
            )
        if len(text) > _LARGEST:
            raise LongRopeError(
                f"expected at most {_LARGEST:,} characters in {name}, one text, found {len(text):,}",
                code="too-large",
                hint="give it as .jsonl, a document per line",
            )
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise LongRopeError(
                f"expected valid Unicode in {name}, found a lone surrogate at character {error.start}", code="not-text"
            ) from error
        return cls(name, text, sha256_bytes(encoded), chat_template)
