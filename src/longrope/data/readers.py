"""Readers of documents from one file (text, JSON lines, JSON, Parquet) or from a dataset of the `datasets` library.

A text file is one document: UTF-8 (a byte-order mark is dropped), line ends read as `\n`. A line of a `.jsonl` file, an
element of a `.json` file's list, a row of a `.parquet` file or of a dataset is one document (`rows.py`); a row with
blank text is skipped, a row without the field is an error. Files ending in `.gz`, `.xz` or `.zst` are decompressed
(`compressed.py`). Datasets are streamed over the network, never with remote code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longrope.data.compressed import COMPRESSIONS, open_bytes
from longrope.data.documents import Document
from longrope.data.rows import RowReader, no_text
from longrope.errors import LongRopeError, one_line
from longrope.quantities import format_bytes
from longrope.storage import parse_json_value

_LARGEST = 10**9  # bytes of a file that is read at once
_PARQUET_ROWS = 64  # rows held in memory at once: rows are whole documents and may be large

Reader = Callable[[Path, str, RowReader], Iterator[Document]]


def reader_for(path: Path) -> Reader | None:
    """The reader for a file of this name, `(path, name, rows) -> documents`; None where its suffix is unknown."""
    name = path.name.lower()
    for suffixes, reader in _READERS:
        if name.endswith(suffixes):
            return reader
    return None


def known_suffixes() -> tuple[str, ...]:
    """The suffixes of all files that `reader_for` has a reader for."""
    return tuple(suffix for suffixes, _ in _READERS for suffix in suffixes)


def read_text(path: Path, name: str, rows: RowReader) -> Iterator[Document]:
    """Yield the one document of a text file, which has no fields. Raises LongRopeError as `decode_text` does."""
    yield Document.of(name, decode_text(_read(path), str(path)))


def decode_text(raw: bytes, where: str) -> str:
    """`raw` as UTF-8 text with `\n` line ends.

    Raises LongRopeError (`not-text`), naming `where`, where it is empty, binary or not UTF-8.
    """
    if not raw.strip():
        raise no_text(where)
    if b"\0" in raw:
        raise LongRopeError(f"expected text in {where}, found NUL bytes: it is binary or not UTF-8", code="not-text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LongRopeError(
            f"expected UTF-8 text in {where}, found byte 0x{raw[error.start]:02x} at offset {error.start}",
            code="not-text",
            hint="convert it to UTF-8 first",
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_jsonl(path: Path, name: str, rows: RowReader) -> Iterator[Document]:
    """Yield one document per line: the text of its JSON object, or its JSON string. Errors name the line, from 1."""
    yield from rows.documents(_json_lines(path), name, str(path), "line")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):  # split at `\n` only; one line is in memory
            if line.strip():
                where = f"{path} line {number}"
                yield number, parse_json_value(decode_text(line, where), where)


def read_json(path: Path, name: str, rows: RowReader) -> Iterator[Document]:
    """Yield one document per element of the list that a JSON file holds (`RowReader.rows_of`), numbered from 1.

    Datasets of JSON lines are called `.json` too: where the first line is a whole object and more follow, they are
    read as such.
    """
    text = decode_text(_read(path), str(path))
    first, _, more = text.lstrip().partition("\n")
    if first.lstrip().startswith("{") and more.strip() and _is_json(first):
        yield from read_jsonl(path, name, rows)
        return
    reader, values = rows.rows_of(parse_json_value(text, str(path)), str(path))
    yield from reader.documents(enumerate(values, start=1), name, str(path), "element")


def read_parquet(path: Path, name: str, rows: RowReader) -> Iterator[Document]:
    """Yield one document per row of the columns that `rows` wants. Needs pyarrow (`missing-dependency`)."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise _needs("pyarrow", str(path)) from error
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            fields = (field if field in columns else field.partition(".")[0] for field in rows.fields)
            wanted = [column for column in dict.fromkeys(fields) if column in columns]
            if not wanted:
                raise rows.no_field("column", str(path), columns)
            batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted)
            values = (row for batch in batches for row in batch.to_pylist())
            yield from rows.documents(enumerate(values, start=1), name, str(path), "row")
    except (pa.ArrowException, OSError) as error:
        raise LongRopeError(f"cannot read {path}: {one_line(error)}", code="unreadable-file") from error


def _compressed(suffix: str) -> tuple[str, ...]:
    return tuple(suffix + compression for compression in COMPRESSIONS)


# In any order: no suffix is the end of another.
_READERS: tuple[tuple[tuple[str, ...], Reader], ...] = (
    (_compressed(".txt"), read_text),
    (_compressed(".jsonl"), read_jsonl),
    (_compressed(".json"), read_json),
    ((".parquet",), read_parquet),
)


def _read(path: Path) -> bytes:
    with open_bytes(path) as file:
        whole = path.stat().st_size <= _LARGEST
        content = file.read(_LARGEST + 1) if whole else b""
    if whole and len(content) <= _LARGEST:
        return content
    raise LongRopeError(
        f"expected at most {format_bytes(_LARGEST)} in {path}, which is read at once; found more",
        code="too-large",
        hint="give it as .jsonl, a document per line",
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _needs(library: str, what: str) -> LongRopeError:
    return LongRopeError(
        f"reading {what} needs {library}, which is not installed",
        code="missing-dependency",
        hint="pip install 'longrope[train]'",
    )


_FORM = re.compile(
    r"(?P<name>[^:@#]+)(?::(?P<config>[^:@#]+))?"
    r"(?:@(?P<split>[^:@#\[\]]+)(?:\[:(?P<bracketed>[1-9]\d*)\]|:(?P<first>[1-9]\d*))?)?"
    r"(?:#(?P<field>[^:@#]+))?"
)
_FILES = re.compile(r".+/[^/]+\.(?:jsonl?(?:\.(?:gz|xz|zst))?|(?P<parquet>parquet))")
"""Files inside a dataset's repository, such as `owner/name/train/*.jsonl.zst`."""


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A dataset and its rows: `NAME[:CONFIG][@SPLIT[:N]][#FIELD]`, the first N rows of a split, the text at FIELD.

    `NAME` is that of a dataset, or `NAME/FILES`: JSON lines or Parquet in its repository, with `*` for any name, which
    are read as they are even where the dataset has a loading script. `@SPLIT[:N]` as `datasets` writes it is understood
    too.
    """

    name: str
    config: str | None
    split: str
    first: int | None
    field: str | None = None

    @classmethod
    def parse(cls, text: str) -> DatasetName:
        """Parse `text`; the split is `train` where none is named. Raises LongRopeError where it has another form."""
        match = _FORM.fullmatch(text)
        if match is None or (match["config"] and _FILES.fullmatch(match["name"])):
            raise LongRopeError(
                f"expected hf:NAME[:CONFIG] or hf:NAME/FILES.jsonl, then [@SPLIT] or @SPLIT:N (the first N rows, "
                f"N at least 1), then [#FIELD], found hf:{text}",
                code="missing-data",
            )
        first = match["bracketed"] or match["first"]
        return cls(
            match["name"], match["config"], match["split"] or "train", int(first) if first else None, match["field"]
        )

    @property
    def label(self) -> str:
        """The dataset and its split, for people."""
        return f"hf:{self.name}" + (f":{self.config}" if self.config else "") + f"@{self.split}"

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """The first argument of `datasets.load_dataset`, and the others by name."""
        files = _FILES.fullmatch(self.name)
        if files is None:
            return self.name, {"name": self.config, "split": self.split}
        here = Path(self.name).parent.is_dir()  # a local folder stands for a repository
        found = self.name if here else f"hf://datasets/{self.name}"
        return "parquet" if files["parquet"] else "json", {"data_files": {self.split: found}, "split": self.split}


def read_dataset(wanted: DatasetName, rows: RowReader) -> Iterator[Document]:
    """Yield one document per row of a dataset, streamed: the text at the field that `wanted` names, or as `rows` says.

    Raises LongRopeError: `missing-dependency` without `datasets`, `unreadable-file` where the dataset cannot be read,
    and those of `RowReader.documents`.
    """
    try:
        import datasets
    except ImportError as error:
        raise _needs("datasets", f"hf:{wanted.name}") from error
    label = wanted.label
    path, arguments = wanted.arguments()
    try:
        found = datasets.load_dataset(path, streaming=True, **arguments)
        if wanted.first is not None:
            found = found.take(wanted.first)
        own = rows if wanted.field is None else replace(rows, fields=(wanted.field,))
        yield from own.documents(enumerate(found, start=1), label, label, "row")
    except LongRopeError:
        raise
    except Exception as error:  # datasets raises whatever its HTTP client and file formats raise: no common type
        raise LongRopeError(f"cannot read {label}: {one_line(error)}", code="unreadable-file") from error
