"""Sources of text: files, folders, shipped books, names of `datasets`, and documents in memory.

| source | documents |
|---|---|
| `book.txt`, also `.txt.gz`, `.txt.xz`, `.txt.zst` | the file |
| `rows.jsonl`, also `.gz`, `.xz`, `.zst` | one per line, the text at `field` |
| `rows.json`, also `.gz`, `.xz`, `.zst` | one per element of its list: a string, or an object as in `.jsonl` |
| `rows.parquet` | one per row, the column `field` (needs `longrope[train]`) |
| a folder | all of these files in it and below, sorted by path; hidden files and other suffixes are passed over |
| `book:NAME` | a book shipped with the package |
| `hf:NAME[:CONFIG][@SPLIT]` | the rows of a dataset over the network; split `train` if none is named |
| `hf:NAME[:CONFIG]@SPLIT:N` | the first N of them; `@SPLIT[:N]`, as `datasets` writes it, is the same |
| `hf:NAME/FILES` | the rows of JSON-lines or Parquet files in a dataset's repository, `*` standing for any name |
| `hf:…#FIELD` | the same with the text at FIELD |
| a `Document` | itself |
| `Rows(SOURCE, fields)` | the source, with the text at these fields |

Chat messages at `field` are written as text by the tokenizer's chat template.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from longrope.checks import shown
from longrope.data.books import read_book
from longrope.data.documents import Document
from longrope.data.readers import DatasetName, known_suffixes, read_dataset, reader_for
from longrope.data.rows import DEFAULT_FIELDS, RowReader
from longrope.errors import LongRopeError
from longrope.input_files import require_regular


@dataclass(frozen=True, slots=True)
class Rows:
    """A source whose rows have their text, or chat messages, at the first of `fields` that a row has."""

    source: str | Path
    fields: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.source)


TextSource = str | Path | Document | Rows
TextData = TextSource | Sequence[TextSource]
"""The `data` of a job: one source, or several."""


Field = str | Sequence[str]
"""The `field` of a job: the field of rows that holds their text, or several: the first that a row has counts."""


def as_sources(data: TextData, field: Field | None = None) -> list[TextSource]:
    """The sources that `data` names, as a list, with the `field` of their rows where it is given.

    Raises LongRopeError: `missing-data` for anything else, `invalid-setting` for a field that is no name, or of no
    data.
    """
    sources = [data] if isinstance(data, str | os.PathLike | Document | Rows) else data
    kinds = (str, os.PathLike, Document, Rows)
    if not isinstance(sources, Sequence) or not all(isinstance(one, kinds) for one in sources):
        raise LongRopeError(
            f"expected `data` as a str, a path, a Document or a list of them; found {shown(data)}", code="missing-data"
        )
    plain = [source if isinstance(source, str | Document | Rows) else Path(source) for source in sources]
    fields = as_fields(field)
    if fields is None:
        return plain
    if not plain:
        raise LongRopeError(
            "`field` says where the rows of `data` have their text, and there is no `data`", code="invalid-setting"
        )
    return [source if isinstance(source, Document | Rows) else Rows(source, fields) for source in plain]


def as_fields(field: Field | None) -> tuple[str, ...] | None:
    """The names of `field`; None where none is given. Raises LongRopeError (`invalid-setting`) for anything that is no
    name."""
    if field is None:
        return None
    fields = (field,) if isinstance(field, str) else tuple(field) if isinstance(field, Sequence) else ()
    if not fields or not all(isinstance(name, str) and name for name in fields):
        raise LongRopeError(
            f"expected `field` as the name of a field, or several; found {shown(field)}", code="invalid-setting"
        )
    return fields


def read_documents(
    source: TextSource,
    *,
    field: Field = DEFAULT_FIELDS,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
) -> list[Document]:
    """Read the documents of one source, at most `limit` of them; nothing behind the limit is read or checked.

    `field` is that of rows, where the source does not say it; `tokenizer` writes chat messages as text.

    A `Path` is always a file or folder; a string may also have a prefix. Identical documents are all returned.
    Raises LongRopeError, naming the path: `missing-data` where nothing is there, `unreadable-file`, `not-text` where it
    is empty, binary or not UTF-8, `no-such-field`, `no-chat-template`, `missing-dependency`.
    """
    if limit is not None and limit < 1:
        raise LongRopeError(f"expected a limit of at least 1 document, found {limit}", code="invalid-setting")
    fields = source.fields if isinstance(source, Rows) else as_fields(field) or DEFAULT_FIELDS
    own = source.source if isinstance(source, Rows) else source
    return list(islice(_iterate(own, RowReader(fields, tokenizer)), limit))


def read_all(
    sources: Sequence[TextSource],
    *,
    field: Field = DEFAULT_FIELDS,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
) -> list[Document]:
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
        for document in read_documents(source, field=field, tokenizer=tokenizer, limit=limit):
            kept.setdefault(document.sha256, document)
    return list(kept.values())


def _iterate(source: str | Path | Document, rows: RowReader) -> Iterator[Document]:
    if isinstance(source, Document):
        return iter([source])
    if isinstance(source, str):
        prefix, _, rest = source.partition(":")
        if prefix == "book":
            return iter([read_book(rest)])
        if prefix == "hf":
            return read_dataset(DatasetName.parse(rest), rows)
    path = Path(source)
    try:
        if source != "" and path.is_dir():
            return _folder(path, rows)
        if source != "" and path.exists():
            return _file(path, path.name, rows)
    except OSError as error:  # a folder that may not be entered, a text given in place of its name
        raise LongRopeError(f"cannot read {_short(str(source))}: {error.strerror}", code="unreadable-file") from error
    raise LongRopeError(
        f"no text at {_short(str(source))}: there is no file or folder of that name, and it is neither book:NAME (a "
        "shipped book) nor hf:NAME (a dataset)",
        code="missing-data",
    )


def _file(path: Path, name: str, rows: RowReader) -> Iterator[Document]:
    require_regular(path)
    reader = reader_for(path)
    if reader is None:
        raise LongRopeError(
            f"expected a file ending in one of {', '.join(known_suffixes())}, found {path}", code="not-text"
        )
    return reader(path, name, rows)


def _folder(root: Path, rows: RowReader) -> Iterator[Document]:
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
        yield from _file(path, name, rows)


def _short(source: str, width: int = 200) -> str:
    return repr(source if len(source) <= width else source[:width] + "…")
