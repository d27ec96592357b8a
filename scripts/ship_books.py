"""Make the books that the package ships: compressed texts, `books.json` and a README that states source and licence.

It reads UTF-8 texts and a manifest (tab-separated: file, bytes, title, author, source, licence, sha256), and checks
every text against the manifest's SHA-256 first. The same texts give the same bytes. It downloads nothing.

    python scripts/ship_books.py --books BOOKS_DIR --manifest MANIFEST.tsv
"""

from __future__ import annotations

import argparse
import csv
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.storage import sha256_bytes, write_json_atomic, write_text_atomic

ASSETS = Path(__file__).resolve().parent.parent / "src/longrope/assets/books"
XZ_PRESET = 9 | lzma.PRESET_EXTREME


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """One book to ship: `name` in the package, `text` is its file in the folder of books."""

    name: str
    text: str
    role: str  # search or evaluation: no book is both
    translator: str | None = None
    limit: int | None = None  # bytes; the text ends at the last paragraph end within them


BOOKS = (
    Book(name="an-american-tragedy", text="theodore-dreiser__an-american-tragedy.txt", role="search"),
    Book(
        name="les-miserables",
        text="victor-hugo__les-miserables.txt",
        role="evaluation",
        translator="Isabel F. Hapgood",
    ),
    Book(
        name="the-diary-of-samuel-pepys",
        text="samuel-pepys__the-diary.txt",
        role="evaluation",
        limit=3_200_000,
    ),
)


def read_manifest(path: Path) -> dict[str, dict[str, str]]:
    """Rows of the manifest by file name (without its folder)."""
    with path.open(encoding="utf-8", newline="") as file:
        return {Path(row["file"]).name: row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}


def cut_at_paragraph(text: bytes, limit: int | None) -> bytes:
    """`text`, or its longest beginning of at most `limit` bytes that ends with a paragraph."""
    if limit is None or len(text) <= limit:
        return text
    end = text.rfind(b"\n\n", 0, limit)
    if end < 0:
        raise LongRopeError(f"expected a paragraph end within the first {limit:,} bytes, found none")
    return text[: end + 1]


def ship(book: Book, folder: Path, rows: dict[str, dict[str, str]], out: Path) -> dict[str, Any]:
    """Write `book` compressed to `out`; its entry in `books.json`."""
    if book.text not in rows:
        raise LongRopeError(f"expected a row for {book.text} in the manifest, found none")
    row, whole = rows[book.text], (folder / book.text).read_bytes()
    if sha256_bytes(whole) != row["sha256"]:
        raise LongRopeError(f"{folder / book.text} is not the text of the manifest: expected SHA-256 {row['sha256']}")
    text = cut_at_paragraph(whole, book.limit)
    file = f"{book.name}.txt.xz"
    extent = f"the first {len(text):,} of {len(whole):,} bytes, cut at a paragraph end"
    (out / file).write_bytes(lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=XZ_PRESET))
    return {
        "name": book.name,
        "file": file,
        "title": row["title"],
        "author": row["author"],
        "translator": book.translator,
        "role": book.role,
        "bytes": len(text),
        "sha256": sha256_bytes(text),
        "excerpt": None if text == whole else extent,
        "source": row["source"],
        "licence": row["licence"],
    }


def readme(books: list[dict[str, Any]]) -> str:
    """Source and licence of every book, as Markdown."""
    lines = [
        "# Books",
        "",
        "Made by `scripts/ship_books.py`. The search reads one book; what is measured is measured on the others.",
        "`books.json` holds the same facts; `sha256` and `bytes` there are of the uncompressed UTF-8 text.",
        "",
        "| file | work | used for | text | source | licence |",
        "|---|---|---|---|---|---|",
    ]
    for book in books:
        work = f"{book['author']}, *{book['title']}*"
        if book["translator"]:
            work += f", translated by {book['translator']}"
        extent = f"excerpt: {book['excerpt']}" if book["excerpt"] else f"complete, {book['bytes']:,} bytes"
        lines.append(
            f"| `{book['file']}` | {work} | {book['role']} | {extent} | `{book['source']}` | {book['licence']} |"
        )
    lines += [
        "",
        "Sources are `github:owner/repository@commit path`. The texts are plain paragraphs, without markup.",
        "The works are in the public domain in the United States; elsewhere the law of your country decides. Standard",
        "Ebooks dedicates its own contributions to the public domain (CC0 1.0) and has no part in this project.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of the book texts")
    parser.add_argument("--manifest", type=Path, required=True, help="tab-separated manifest of those texts")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where to write (default: the package's assets)")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = read_manifest(args.manifest)
        books = [ship(book, args.books, rows, args.out) for book in BOOKS]
        write_json_atomic(args.out / "books.json", {"books": books})
        write_text_atomic(args.out / "README.md", readme(books))
    except LongRopeError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:
        parser.exit(2, f"expected to read or write {error.filename}: {error.strerror}\n")
    for book in books:
        print(f"{book['file']}: {(args.out / book['file']).stat().st_size:,} bytes, text {book['bytes']:,}")


if __name__ == "__main__":
    main()
