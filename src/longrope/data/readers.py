"""Readers of one file each, as iterators of documents: text, JSON lines, Parquet; and which file is read how.

A text file is one document: UTF-8 (a byte-order mark is dropped), line ends read as `\n`. A line of a `.jsonl` file or
a row of a `.parquet` file is one document; a row whose text is blank holds no document and is passed over, a row
without the field is an error. Files may be compressed where the suffix says so (`.gz`, `.xz`).

Documents from a `datasets` name: the one source that uses the network, streamed, never with remote code.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from longrope.data.documents import Document
from longrope.errors import LongRopeError, one_line

_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)
_PARQUET_ROWS = 64  # rows held in memory at once: rows are whole documents and may be large

Reader = Callable[[Path, str, str], Iterator[Document]]


def reader_for(path: Path) -> Reader | None:
    """The reader `(path, name, field) -> documents` for a file of this name, or None where its suffix is not known."""
    name = path.name.lower()
    for suffixes, reader in _READERS:
        if name.endswith(suffixes):
            return reader
    return None


def known_suffixes() -> tuple[str, ...]:
    """The suffixes that `reader_for` knows."""
    return tuple(suffix for suffixes, _ in _READERS for suffix in suffixes)


def read_text(path: Path, name: str, field: str = "text") -> Iterator[Document]:
    """The one document of a text file (it has no `field`). Raises LongRopeError where it is not UTF-8 text."""
    try:
        with _open(path) as file:
            raw = file.read()
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    yield Document.of(name, decode_text(raw, str(path)))


def decode_text(raw: bytes, where: str) -> str:
    """`raw` as UTF-8 text with `\\n` line ends. Raises LongRopeError, naming `where`, where it is empty or binary."""
    if not raw.strip():
        raise LongRopeError(f"expected text in {where}, found none (it is empty or blank)")
    if b"\0" in raw:
        raise LongRopeError(f"expected text in {where}, found NUL bytes: it is binary or not UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LongRopeError(
            f"expected UTF-8 text in {where}, found byte 0x{raw[error.start]:02x} at offset {error.start}; "
            "convert it to UTF-8 first"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_jsonl(path: Path, name: str, field: str = "text") -> Iterator[Document]:
    """One document per line: the string at `field` of its JSON object. Errors name the line, counted from 1."""
    found = False
    for number, line in _lines(path):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(decode_text(line, where))
        except (ValueError, RecursionError) as error:
            raise LongRopeError(f"expected a JSON object in {where}, found: {_short(line)}") from error
        if not isinstance(row, dict):
            raise LongRopeError(f"expected a JSON object in {where}, found {type(row).__name__}")
        text = text_of(row, field, where)
        if text.strip():
            found = True
            yield Document.of(f"{name}:{number}", text)
    if not found:
        raise LongRopeError(f"expected texts in {path}, found none (it is empty or blank)")


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The string at `field` of `row`. Raises LongRopeError, naming `where`, if there is none."""
    if field not in row:
        raise LongRopeError(f"no field {field!r} in {where}; it has: {', '.join(map(str, row)) or 'none'}")
    text = row[field]
    if not isinstance(text, str):
        raise LongRopeError(f"expected text in field {field!r} of {where}, found {type(text).__name__}")
    return text


def read_parquet(path: Path, name: str, field: str = "text") -> Iterator[Document]:
    """One document per row of the column `field`. Raises LongRopeError where pyarrow is missing or the column is."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise LongRopeError(
            f"reading {path} needs pyarrow, which is not installed; pip install 'longrope[train]'"
        ) from error
    found = False
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise LongRopeError(f"no column {field!r} in {path}; it has: {', '.join(columns) or 'none'}")
            batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field])
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                text = text_of(row, field, f"{path} row {number}")
                if text.strip():
                    found = True
                    yield Document.of(f"{name}:{number}", text)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    if not found:
        raise LongRopeError(f"expected texts in {path}, found none (it is empty or blank)")


# Longer suffixes need no order: none is the end of another.
_READERS: tuple[tuple[tuple[str, ...], Reader], ...] = (
    ((".txt", ".txt.gz", ".txt.xz"), read_text),
    ((".jsonl", ".jsonl.gz", ".jsonl.xz"), read_jsonl),
    ((".parquet",), read_parquet),
)


def _open(path: Path) -> IO[bytes] | gzip.GzipFile | lzma.LZMAFile:
    """The file's bytes, decompressed where the suffix says so."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case _:
            return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of a file, one line in memory; split at `\\n` only, as JSON lines are."""
    try:
        with _open(path) as file:
            yield from enumerate(file, start=1)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> LongRopeError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return LongRopeError(f"cannot read {path}: {reason}")


def _short(line: bytes, width: int = 40) -> str:
    text = line.decode().strip()  # decode_text has seen that it is UTF-8
    return repr(text[:width] + "…" if len(text) > width else text)


_FORM = re.compile(r"(?P<name>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<split>[^:@\[\]]+)(?:\[:(?P<first>\d+)\])?)?")


@dataclass(frozen=True, slots=True)
class DatasetName:
    """`NAME[:CONFIG][@SPLIT]`, or `@SPLIT[:N]` for the first N rows of the split."""

    name: str
    config: str | None
    split: str
    first: int | None

    @classmethod
    def parse(cls, text: str) -> DatasetName:
        """The parts of `text`, split `train` where none is named. Raises LongRopeError where it has another form."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise LongRopeError(f"expected hf:NAME[:CONFIG][@SPLIT] or …@SPLIT[:N], found hf:{text}")
        first = int(match["first"]) if match["first"] is not None else None
        return cls(match["name"], match["config"], match["split"] or "train", first)


def read_dataset(wanted: DatasetName, field: str) -> Iterator[Document]:
    """The rows of a dataset as documents, streamed; a row whose text is blank holds no document and is passed over.

    Raises LongRopeError where `datasets` is missing, the dataset cannot be read, or a row has no text at `field`.
    """
    try:
        import datasets
    except ImportError as error:
        raise LongRopeError(
            f"reading hf:{wanted.name} needs datasets, which is not installed; pip install 'longrope[train]'"
        ) from error
    label = f"hf:{wanted.name}" + (f":{wanted.config}" if wanted.config else "") + f"@{wanted.split}"
    found = False
    try:
        rows = datasets.load_dataset(wanted.name, wanted.config, split=wanted.split, streaming=True)
        if wanted.first is not None:
            rows = rows.take(wanted.first)
        for number, row in enumerate(rows, start=1):
            text = text_of(row, field, f"{label} row {number}")
            if text.strip():
                found = True
                yield Document.of(f"{label}:{number}", text)
    except LongRopeError:
        raise
    except Exception as error:  # datasets raises whatever its HTTP client and file formats raise: no common type
        raise LongRopeError(f"cannot read {label}: {one_line(error)}") from error
    if not found:
        raise LongRopeError(f"expected texts in {label}, found none")
