"""The shipped books are what books.json says, and the script that makes them checks what it reads."""

from __future__ import annotations

import hashlib
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "src/longrope/assets/books"
BOOKS = json.loads((FOLDER / "books.json").read_text("utf-8"))["books"]


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book["name"])
def test_a_shipped_book_is_the_text_it_is_said_to_be(book: dict[str, str]) -> None:
    text = lzma.decompress((FOLDER / book["file"]).read_bytes())
    assert len(text) == book["bytes"]
    assert hashlib.sha256(text).hexdigest() == book["sha256"]
    assert "\r" not in text.decode("utf-8")


def test_every_book_states_its_source_licence_and_role() -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    for book in BOOKS:
        assert all(book[key] for key in ("title", "author", "source", "licence"))
        assert all(book[key] in readme for key in ("file", "title", "author", "source", "licence"))
    assert [book["role"] for book in BOOKS].count("search") == 1
    assert {book["role"] for book in BOOKS} == {"search", "evaluation"}
    assert {book["file"] for book in BOOKS} == {path.name for path in FOLDER.glob("*.xz")}


def run_script(folder: Path, text: bytes, good: bytes = b"first\n") -> subprocess.CompletedProcess[str]:
    """The script on books that are all `good`, as their hashes say, except the first, which is `text`."""
    rows = ["file\tbytes\ttitle\tauthor\tsource\tlicence\tsha256"]
    digest = hashlib.sha256(good).hexdigest()
    names = ("theodore-dreiser__an-american-tragedy", "victor-hugo__les-miserables", "samuel-pepys__the-diary")
    for name in names:
        (folder / f"{name}.txt").write_bytes(text if name.startswith("theodore") else good)
        rows.append(f'heldout/{name}.txt\t6\tA "title"\tAn author\tgithub:a/b@c d\tCC0-1.0\t{digest}')
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    script = [sys.executable, str(ROOT / "scripts/ship_books.py"), "--books", str(folder)]
    more = ["--manifest", str(folder / "manifest.tsv"), "--out", str(folder / "out")]
    return subprocess.run([*script, *more], capture_output=True, text=True, check=False)


def test_the_script_ships_texts_that_fit_the_manifest(tmp_path: Path) -> None:
    done = run_script(tmp_path, b"first\n")
    assert done.returncode == 0, done.stderr
    books = json.loads((tmp_path / "out/books.json").read_text("utf-8"))["books"]
    assert [(book["title"], book["bytes"], book["excerpt"]) for book in books] == [('A "title"', 6, None)] * 3
    assert lzma.decompress((tmp_path / "out" / books[0]["file"]).read_bytes()) == b"first\n"


def test_a_book_above_its_limit_is_cut_at_a_paragraph_end_and_says_so(tmp_path: Path) -> None:
    paragraph = b"x" * 99_998 + b"\n\n"
    text = (paragraph * 40).removesuffix(b"\n")
    assert run_script(tmp_path, text, text).returncode == 0
    whole, _, diary = json.loads((tmp_path / "out/books.json").read_text("utf-8"))["books"]
    assert (whole["bytes"], whole["excerpt"]) == (3_999_999, None)
    assert diary["bytes"] == 3_199_999  # the last blank line within 3,200,000 bytes, without it
    assert diary["excerpt"] == "the first 3,199,999 of 3,999,999 bytes, cut at a paragraph end"
    assert lzma.decompress((tmp_path / "out" / diary["file"]).read_bytes()) == text[:3_199_999]


def test_the_script_refuses_another_text_in_one_line(tmp_path: Path) -> None:
    done = run_script(tmp_path, b"another\n")
    assert done.returncode == 2
    assert "is not the text of the manifest" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out/books.json").exists()
