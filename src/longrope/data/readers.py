"""Readers of documents from one file (text, JSON lines, Parquet) or from a dataset of the `datasets` library.

A text file is one document: UTF-8 (a byte-order mark is dropped), line ends read as `\n`. A line of a `.jsonl` file, a
row of a `.parquet` file or of a dataset is one document; a row with blank text is skipped, a row without the field is
an error. Files ending in `.gz` or `.xz` are decompressed. Datasets are streamed over the network, never with remote
code.
"""

from __future__ import annotations

import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from longrope.data.documents import Document
from longrope.errors import LongRopeError, one_line
from longrope.storage import parse_json

_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)
_PARQUET_ROWS = 64  # rows held in memory at once: rows are whole documents and may be large

Reader = Callable[[Path, str, str], Iterator[Document]]


def reader_for(path: Path) -> Reader | None:
    """The reader for a file of this name, `(path, name, field) -> documents`; None where its suffix is unknown."""
    name = path.name.lower()
    for suffixes, reader in _READERS:
        if name.endswith(suffixes):
            return reader
    return None


def known_suffixes() -> tuple[str, ...]:
    """The suffixes of all files that `reader_for` has a reader for."""
    return tuple(suffix for suffixes, _ in _READERS for suffix in suffixes)


def read_text(path: Path, name: str, field: str = "text") -> Iterator[Document]:
    """Yield the one document of a text file (`field` has no meaning). Raises LongRopeError as `decode_text` does."""
    try:
        with _open(path) as file:
            raw = file.read()
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    yield Document.of(name, decode_text(raw, str(path)))


def decode_text(raw: bytes, where: str) -> str:
    """`raw` as UTF-8 text with `\\n` line ends.

    Raises LongRopeError (`not-text`), naming `where`, where it is empty, binary or not UTF-8.
    """
    if not raw.strip():
        raise _no_text(where)
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


def read_jsonl(path: Path, name: str, field: str = "text") -> Iterator[Document]:
    """Yield one document per line: the string at `field` of its JSON object. Errors name the line, counted from 1."""

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in _lines(path):
            if line.strip():
                where = f"{path} line {number}"
                yield number, parse_json(decode_text(line, where), where)

    yield from _documents(rows(), name, field, str(path), "line")


def _documents(
    rows: Iterable[tuple[int, dict[str, Any]]], name: str, field: str, source: str, unit: str
) -> Iterator[Document]:
    """Yield the text at `field` of every row (number from 1, fields) that is not blank.

    `unit` is the word for a row of `source` in errors. Raises LongRopeError: `no-such-field` where a row has no text at
    `field`, `not-text` where all rows are blank.
    """
    found = False
    for number, row in rows:
        where = f"{source} {unit} {number}"
        if field not in row:
            raise _no_field("field", field, where, row)
        text = row[field]
        if not isinstance(text, str):
            raise LongRopeError(
                f"expected text in field {field!r} of {where}, found {type(text).__name__}", code="no-such-field"
            )
        if text.strip():
            found = True
            yield Document.of(f"{name}:{number}", text)
    if not found:
        raise _no_text(source)


def read_parquet(path: Path, name: str, field: str = "text") -> Iterator[Document]:
    """Yield one document per row of the column `field`. Needs pyarrow (`missing-dependency`)."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise _needs("pyarrow", str(path)) from error
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise _no_field("column", field, str(path), columns)
            batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field])
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from _documents(enumerate(rows, start=1), name, field, str(path), "row")
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


# In any order: no suffix is the end of another.
_READERS: tuple[tuple[tuple[str, ...], Reader], ...] = (
    ((".txt", ".txt.gz", ".txt.xz"), read_text),
    ((".jsonl", ".jsonl.gz", ".jsonl.xz"), read_jsonl),
    ((".parquet",), read_parquet),
)


def _open(path: Path) -> IO[bytes] | gzip.GzipFile | lzma.LZMAFile:
    """The bytes of a file, decompressed when it ends in `.gz` or `.xz`."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case _:
            return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of a file, split at `\\n` only, as JSON lines are; one line is in memory."""
    try:
        with _open(path) as file:
            yield from enumerate(file, start=1)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> LongRopeError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return LongRopeError(f"cannot read {path}: {reason}", code="unreadable-file")


def _no_text(where: str) -> LongRopeError:
    return LongRopeError(f"expected text in {where}, found none (it is empty or blank)", code="not-text")


def _no_field(kind: str, field: str, where: str, names: Iterable[object]) -> LongRopeError:
    found = ", ".join(map(str, names)) or "none"
    return LongRopeError(f"no {kind} {field!r} in {where}; it has: {found}", code="no-such-field")


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


def read_dataset(wanted: DatasetName, field: str) -> Iterator[Document]:
    """Yield one document per row of a dataset, streamed: the text at the field that `wanted` names, else at `field`.

    Raises LongRopeError: `missing-dependency` without `datasets`, `unreadable-file` where the dataset cannot be read,
    `no-such-field` where a row has no text at `field`.
    """
    try:
        import datasets
    except ImportError as error:
        raise _needs("datasets", f"hf:{wanted.name}") from error
    label = wanted.label
    path, arguments = wanted.arguments()
    try:
        rows = datasets.load_dataset(path, streaming=True, **arguments)
        if wanted.first is not None:
            rows = rows.take(wanted.first)
        yield from _documents(enumerate(rows, start=1), label, wanted.field or field, label, "row")
    except LongRopeError:
        raise
    except Exception as error:  # datasets raises whatever its HTTP client and file formats raise: no common type
        raise LongRopeError(f"cannot read {label}: {one_line(error)}", code="unreadable-file") from error
