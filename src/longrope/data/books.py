"""The books shipped with the package: public-domain texts for a first search and its evaluation."""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal, get_args

from longrope.data.documents import Document
from longrope.data.readers import decode_text
from longrope.errors import LongRopeError

Role = Literal["search", "evaluation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedBook:
    """One shipped book: its name in `book:NAME`, its role, the source of its text and its licence."""

    name: str
    title: str
    author: str
    role: Role
    source: str
    licence: str
    file: str


def shipped_books() -> list[ShippedBook]:
    """The books in the package, in the order of `books.json`. Raises LongRopeError where the package lacks them."""
    index = _folder() / "books.json"
    try:
        rows = json.loads(index.read_text(encoding="utf-8"))["books"]
        return [_shipped_book(row) for row in rows]
    except FileNotFoundError as error:
        raise LongRopeError(
            "this installation of longrope ships no books", code="missing-data", hint="give a text file instead"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LongRopeError(
            f"the list of shipped books is damaged ({error})", code="damaged-file", hint="install longrope again"
        ) from error


def read_book(name: str) -> Document:
    """Read a shipped book. Raises LongRopeError (`missing-data`), listing all names, for any other `name`."""
    books = {book.name: book for book in shipped_books()}
    if name not in books:
        raise LongRopeError(
            f"no shipped book is called {name!r}; there are: {', '.join(books) or 'none'}", code="missing-data"
        )
    file = books[name].file
    try:
        raw = (_folder() / file).read_bytes()
        if file.endswith(".xz"):
            raw = lzma.decompress(raw)
    except (OSError, lzma.LZMAError) as error:
        raise LongRopeError(
            f"cannot read the shipped book {name} ({file}): {error}", code="damaged-file", hint="install longrope again"
        ) from error
    return Document.of(f"book:{name}", decode_text(raw, f"the shipped book {name}"))


def _shipped_book(row: dict[str, Any]) -> ShippedBook:
    if row["role"] not in get_args(Role):
        raise ValueError(f"book {row['name']} has the unknown role {row['role']!r}")
    return ShippedBook(**{name: row[name] for name in ShippedBook.__slots__})


def _folder() -> Traversable:
    return files("longrope") / "assets" / "books"
