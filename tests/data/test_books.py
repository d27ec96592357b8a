"""The shipped books, from a list made here and, where the package has it, from its own."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from longrope.data import books
from longrope.data.books import shipped_books
from longrope.data.sources import read_documents
from longrope.errors import LongRopeError

ROW = {
    "name": "whale",
    "file": "whale.txt.xz",
    "role": "search",
    "title": "The Whale",
    "author": "H. M.",
    "source": "somewhere",
    "licence": "public domain",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(books, "_folder", lambda: tmp_path)
    return tmp_path


def write(folder: Path, *rows: dict[str, str]) -> None:
    (folder / "books.json").write_text(json.dumps({"books": rows}))


def test_rows_and_text(folder: Path) -> None:
    write(folder, ROW | {"sha256": "more is fine"}, ROW | {"name": "tale", "file": "tale.txt", "role": "evaluation"})
    (folder / "whale.txt.xz").write_bytes(lzma.compress(b"Call me Ishmael.\r\n"))
    (folder / "tale.txt").write_text("It was the best of times.")
    rows = shipped_books()
    assert [(row.name, row.title, row.author, row.role, row.licence) for row in rows] == [
        ("whale", "The Whale", "H. M.", "search", "public domain"),
        ("tale", "The Whale", "H. M.", "evaluation", "public domain"),
    ]
    (whale,) = read_documents("book:whale")
    assert (whale.name, whale.text) == ("book:whale", "Call me Ishmael.\n")
    assert read_documents("book:tale")[0].text == "It was the best of times."


def test_unknown_name_lists_the_names(folder: Path) -> None:
    write(folder, ROW, ROW | {"name": "tale"})
    with pytest.raises(LongRopeError, match="'moby'; there are: whale, tale"):
        read_documents("book:moby")


def test_a_damaged_installation_is_one_line(folder: Path) -> None:
    with pytest.raises(LongRopeError, match="ships no books"):
        shipped_books()
    (folder / "books.json").write_text("{")
    with pytest.raises(LongRopeError, match="damaged"):
        shipped_books()
    write(folder, {"name": "whale"})
    with pytest.raises(LongRopeError, match=r"damaged.*role"):
        shipped_books()
    write(folder, ROW | {"role": "both"})
    with pytest.raises(LongRopeError, match="unknown role 'both'"):
        shipped_books()
    write(folder, ROW)
    with pytest.raises(LongRopeError, match=r"whale\.txt\.xz"):
        read_documents("book:whale")
    (folder / "whale.txt.xz").write_bytes(b"no xz")
    with pytest.raises(LongRopeError, match=r"whale\.txt\.xz"):
        read_documents("book:whale")


def test_the_books_of_the_package() -> None:
    rows = shipped_books()
    assert {row.role for row in rows} == {"search", "evaluation"}
    hashes = {read_documents(f"book:{row.name}")[0].sha256 for row in rows}
    assert len(hashes) == len(rows)
