"""Sources of text: files, folders, shipped books, names of `datasets`, and documents in memory.

| source | documents |
|---|---|
| `book.txt`, also `.txt.gz`, `.txt.xz` | the file |
| `rows.jsonl`, also `.gz`, `.xz` | one per line, the text at `field` |
| `rows.parquet` | one per row, the column `field` (needs `longrope[train]`) |
| a folder | all of these files in it and below, sorted by path; hidden files and other suffixes are passed over |
| `book:NAME` | a book shipped with the package |
| `hf:NAME[:CONFIG][@SPLIT]` | the rows of a dataset over the network; split `train` if none is named |
| `hf:NAME[:CONFIG]@SPLIT:N` | the first N of them; `@SPLIT[:N]`, as `datasets` writes it, is the same |
| `hf:NAME/FILES` | the rows of JSON-lines or Parquet files in a dataset's repository, `*` standing for any name |
| `hf:…#FIELD` | the same with the text at FIELD |
| a `Document` | itself |
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from longrope.checks import shown
from longrope.data.books import read_book
from longrope.data.documents import Document
from longrope.data.readers import DatasetName, known_suffixes, read_dataset, reader_for
from longrope.errors import LongRopeError

TextSource = str | Path | Document
TextData = TextSource | Sequence[TextSource]
"""The `data` of a job: one source, or several."""


def as_sources(data: TextData) -> list[TextSource]:
    """The sources that `data` names, as a list. Raises LongRopeError (`missing-data`) for anything else."""
    sources = [data] if isinstance(data, str | os.PathLike | Document) else data
    if not isinstance(sources, Sequence) or not all(isinstance(one, str | os.PathLike | Document) for one in sources):
        raise LongRopeError(
            f"expected `data` as a str, a path, a Document or a list of them; found {shown(data)}", code="missing-data"
        )
    return [source if isinstance(source, str | Document) else Path(source) for source in sources]


def read_documents(source: TextSource, *, field: str = "text", limit: int | None = None) -> list[Document]:
    """Read the documents of one source, at most `limit` of them; nothing behind the limit is read or checked.

    A `Path` is always a file or folder; a string may also have a prefix. Identical documents are all returned.
    Raises LongRopeError, naming the path: `missing-data` where nothing is there, `unreadable-file`, `not-text` where it
    is empty, binary or not UTF-8, `no-such-field`, `missing-dependency`.
    """
    if limit is not None and limit < 1:
        raise LongRopeError(f"expected a limit of at least 1 document, found {limit}", code="invalid-setting")
    return list(islice(_iterate(source, field), limit))


def read_all(sources: Sequence[TextSource], *, field: str = "text", limit: int | None = None) -> list[Document]:
    """Read the documents of several sources in their order, each text once: the first of identical ones is kept.

    `limit` counts per source. Raises LongRopeError as `read_documents` does.
    """
    if not sources:
        raise LongRopeError(
            "expected at least one source of text, found none",
            code="missing-data",
            hint="give a file, a folder or book:NAME",
        )
    kept: dict[str, Document] = {}
    for source in sources:
        for document in read_documents(source, field=field, limit=limit):
            kept.setdefault(document.sha256, document)
    return list(kept.values())


def _iterate(source: TextSource, field: str) -> Iterator[Document]:
    if isinstance(source, Document):
        return iter([source])
    if isinstance(source, str):
        prefix, _, rest = source.partition(":")
        if prefix == "book":
            return iter([read_book(rest)])
        if prefix == "hf":
            return read_dataset(DatasetName.parse(rest), field)
    path = Path(source)
    try:
        if source != "" and path.is_dir():
            return _folder(path, field)
        if source != "" and path.exists():
            return _file(path, path.name, field)
    except OSError as error:  # a folder that may not be entered, a text given in place of its name
        raise LongRopeError(f"cannot read {_short(str(source))}: {error.strerror}", code="unreadable-file") from error
    raise LongRopeError(
        f"no text at {_short(str(source))}: there is no file or folder of that name, and it is neither book:NAME (a "
        "shipped book) nor hf:NAME (a dataset)",
        code="missing-data",
    )


def _file(path: Path, name: str, field: str) -> Iterator[Document]:
    reader = reader_for(path)
    if reader is None:
        raise LongRopeError(
            f"expected a file ending in one of {', '.join(known_suffixes())}, found {path}", code="not-text"
        )
    return reader(path, name, field)


def _folder(root: Path, field: str) -> Iterator[Document]:
    """The documents of every readable file below `root`, by sorted path, named relative to it."""

    def refuse(error: OSError) -> None:
        raise LongRopeError(f"cannot read {error.filename}: {error.strerror}", code="unreadable-file") from error

    paths: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    texts = sorted((path.relative_to(root).as_posix(), path) for path in paths if reader_for(path) is not None)
    if not texts:
        raise LongRopeError(
            f"no texts in the folder {root}: expected files ending in {', '.join(known_suffixes())}",
            code="missing-data",
        )
    for name, path in texts:
        yield from _file(path, name, field)


def _short(source: str, width: int = 200) -> str:
    return repr(source if len(source) <= width else source[:width] + "…")
