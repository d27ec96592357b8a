"""Rows as documents: the text at a field of each row of JSON lines, JSON, Parquet or a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from longrope.data.chat import are_messages, chat_document
from longrope.data.documents import Document
from longrope.errors import LongRopeError

DEFAULT_FIELDS = ("text", "messages")

_MISSING = object()


@dataclass(frozen=True)
class RowReader:
    """Reads the text of rows.

    fields: the names of fields; a row's text is at the first that it has and that is not null. `a.b` is field b of the
    object at field a, unless a field of the name `a.b` is there.
    tokenizer: writes chat messages as text, by its chat template.
    """

    fields: tuple[str, ...] = DEFAULT_FIELDS
    tokenizer: PreTrainedTokenizerBase | None = None

    def documents(self, rows: Iterable[tuple[int, Any]], name: str, source: str, unit: str) -> Iterator[Document]:
        """Yield the text of every row (number from 1, value) that is not blank; null is blank.

        A row is an object, or a string, which is its own text. `unit` is the word for a row of `source` in errors.
        Raises LongRopeError: `no-such-field` where a row has none of the fields, or no text there, `not-text` where all
        rows are blank.
        """
        found = False
        for number, row in rows:
            document = self._document(row, f"{name}:{number}", f"{source} {unit} {number}")
            if document is not None:
                found = True
                yield document
        if not found:
            raise no_text(source)

    def _document(self, row: Any, name: str, where: str) -> Document | None:
        """The document of a row; None where it is blank."""
        field, value = ("", row) if row is None or isinstance(row, str) else self._value(row, where)
        if value is None:
            return None
        if isinstance(value, str):
            return Document.of(name, value) if value.strip() else None
        if are_messages(value):
            return chat_document(name, value, self.tokenizer, where)
        if value == [] and field == "messages":
            return None
        raise LongRopeError(
            f"expected text, or chat messages with a role and content, in field {field!r} of {where}, found "
            f"{_kind(value)}",
            code="no-such-field",
            hint="name the text's own with `field`",
        )

    def _value(self, row: Any, where: str) -> tuple[str, Any]:
        """The field of a row that holds its text, and the value there."""
        if not isinstance(row, Mapping):
            raise LongRopeError(f"expected an object with text in {where}, found {_kind(row)}", code="damaged-file")
        found = [(field, value) for field in self.fields if (value := value_at(row, field)) is not _MISSING]
        if not found:
            raise self.no_field("field", where, row)
        return next((pair for pair in found if pair[1] is not None), found[0])

    def no_field(self, kind: str, where: str, names: Iterable[object]) -> LongRopeError:
        """The error for a row or object that has the fields `names`, and none of those that are read."""
        wanted = " or ".join(map(repr, self.fields))
        found = ", ".join(map(str, names)) or "none"
        return LongRopeError(
            f"no {kind} {wanted} in {where}; it has: {found}",
            code="no-such-field",
            hint="name the text's own with `field`",
        )

    def rows_of(self, value: Any, source: str) -> tuple[RowReader, Iterable[Any]]:
        """The reader for the rows of a whole JSON file, and these rows.

        They are the elements of a list at the top. Of an object they are the elements of the list that a field begins
        with (`data.text`: field text of each element of data), those of a list of strings at a field, or those of the
        only list that there is; an object that has its text at a field is one row. Raises LongRopeError
        (`no-such-field`) for an object with no such list, or several.
        """
        if isinstance(value, list):
            return self, value
        if not isinstance(value, Mapping):
            raise LongRopeError(
                f"expected a list of texts or of objects in {source}, found {_kind(value)}", code="damaged-file"
            )
        for field in self.fields:
            head, _, rest = field.partition(".")
            if rest and field not in value and isinstance(value.get(head), list):
                return replace(self, fields=(rest,)), value[head]
        for field in self.fields:
            if (own := value_at(value, field)) is not _MISSING:
                texts = isinstance(own, list) and all(one is None or isinstance(one, str) for one in own)
                return self, own if texts else [value]
        lists = [name for name, one in value.items() if isinstance(one, list)]
        if len(lists) == 1:
            return self, value[lists[0]]
        if lists:
            raise LongRopeError(
                f"expected one list of rows in {source}, found {', '.join(lists)}",
                code="no-such-field",
                hint=f"name the text's own with `field`, as in {lists[0]}.{self.fields[0]}",
            )
        raise self.no_field("field", source, value)


def value_at(row: Mapping[str, Any], field: str) -> Any:
    """The value at `field` of a row, `_MISSING` where there is none; null on the way to it is null."""
    if field in row:
        return row[field]
    head, _, rest = field.partition(".")
    if not rest or head not in row:
        return _MISSING
    inner = row[head]
    if inner is None:
        return None
    return value_at(inner, rest) if isinstance(inner, Mapping) else _MISSING


def no_text(where: str) -> LongRopeError:
    """The error for a text that is empty or blank."""
    return LongRopeError(f"expected text in {where}, found none (it is empty or blank)", code="not-text")


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {', '.join(sorted({type(one).__name__ for one in value}))}" if value else "an empty list"
    return "an object" if isinstance(value, Mapping) else type(value).__name__
