"""Documents from a `datasets` name: the one source that uses the network, streamed, never with remote code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from longrope.data.documents import Document
from longrope.data.readers import text_of
from longrope.errors import LongRopeError, one_line

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
