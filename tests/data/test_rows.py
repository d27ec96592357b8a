"""The field of rows that holds their text: its name, its absence, its type, and the shapes of JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from longrope.data.sources import Field, Rows, as_sources, read_all, read_documents
from longrope.errors import LongRopeError


def texts(path: Path, field: Field = ("text", "messages")) -> list[str]:
    return [document.text for document in read_documents(path, field=field)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines, or a value as JSON."""

    def written(name: str, value: Any) -> Path:
        lines = [json.dumps(row) for row in value] if name.endswith(".jsonl") else [json.dumps(value, indent=1)]
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    return written


ROWS = [
    {"meta": {"body": "one", "tags": ["a"]}, "a.b": "dotted"},
    {"meta": {"body": None}, "a.b": "two dots"},
    {"meta": None, "a.b": " "},
    {"meta": {"body": "four"}, "a.b": None},
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_nested_field_and_nulls_on_the_way(tmp_path: Path, write: Callable[..., Path], name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        write(name, ROWS)
    assert texts(path, "meta.body") == ["one", "four"]
    assert texts(path, "a.b") == ["dotted", "two dots"]  # a field of that very name comes before a path
    with pytest.raises(LongRopeError, match=r"'meta\.title' in") as caught:
        texts(path, "meta.title")
    assert caught.value.code == "no-such-field"
    with pytest.raises(LongRopeError, match=r"'meta' of .* 1, found an object") as caught:
        texts(path, "meta")
    assert caught.value.code == "no-such-field"


def test_several_fields_for_files_of_several_kinds(write: Callable[..., Path]) -> None:
    first = write("a.jsonl", [{"content": "one", "text": "not this"}, {"content": None, "text": "two"}])
    second = write("b.jsonl", [{"body": {"en": "three"}}])
    sources = as_sources([str(first), second], field=["content", "text", "body.en"])
    assert [document.text for document in read_all(sources)] == ["one", "two", "three"]
    mixed = [Rows(first, ("text",)), Rows(str(second), ("body.en",))]
    assert [document.text for document in read_all(mixed)] == ["not this", "two", "three"]


def test_a_field_that_some_rows_lack_is_an_error(write: Callable[..., Path]) -> None:
    path = write("a.jsonl", [{"content": "one"}, {"body": "two"}])
    with pytest.raises(LongRopeError, match=r"no field 'content' in .* line 2; it has: body"):
        texts(path, "content")


@pytest.mark.parametrize("field", ["", 3, [], ["a", None], ["a", ""]])
def test_field_is_a_name(field: Any) -> None:
    with pytest.raises(LongRopeError, match="`field`") as caught:
        as_sources("a.jsonl", field)
    assert caught.value.code == "invalid-setting"


def test_field_without_data_is_refused() -> None:
    with pytest.raises(LongRopeError, match="there is no `data`"):
        as_sources((), "text")


@pytest.mark.parametrize(
    ("value", "field", "found"),
    [
        (["one", None, " ", "two"], "text", ["one", "two"]),
        ([{"text": "one"}, "two", {"text": None}], "text", ["one", "two"]),
        ({"version": 1, "data": [{"text": "one"}, {"text": "two"}]}, "text", ["one", "two"]),
        ({"a": [1], "data": [{"text": "one"}]}, "data.text", ["one"]),
        ({"features": [], "rows": [{"row": {"text": "one"}}]}, "rows.row.text", ["one"]),
        ({"id": [1, 2], "text": ["one", "two"]}, "text", ["one", "two"]),
        ({"id": 1, "text": "one"}, "text", ["one"]),
        ({"meta": {"text": "one"}, "tags": ["x"]}, "meta.text", ["one"]),
        ({"a.b": ["one"], "a": ["two"]}, "a.b", ["one"]),
        ("one", "text", None),
    ],
)
def test_shapes_of_json_files(write: Callable[..., Path], value: Any, field: str, found: list[str] | None) -> None:
    path = write("rows.json", value)
    if found is not None:
        assert texts(path, field) == found
        return
    with pytest.raises(LongRopeError, match="expected a list of texts or of objects"):
        texts(path, field)


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "c4.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert [document.name for document in read_documents(path)] == ["c4.json:1", "c4.json:2"]
    path.write_text('\n{"text": "one"}\n\n{"text": broken}\n')
    with pytest.raises(LongRopeError, match="line 4"):
        read_documents(path)


def test_strings_as_json_lines_and_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"one"\n{"text": "two"}\nnull\n')
    assert texts(path) == ["one", "two"]
    (tmp_path / "rows.json").write_bytes(b'\xef\xbb\xbf["one"]')
    assert texts(tmp_path / "rows.json") == ["one"]


def test_zst_of_several_frames_and_a_long_window(tmp_path: Path) -> None:
    """As `zstd --long=31` writes dumps of many gigabytes, frame after frame."""
    long = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    frames = [zstandard.ZstdCompressor(compression_params=long).compress(b'{"text": "one"}\n{"te')]
    frames.append(zstandard.compress(b'xt": "two"}\n'))
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(frames))
    assert texts(tmp_path / "rows.jsonl.zst") == ["one", "two"]


def test_a_folder_of_mixed_files(tmp_path: Path, write: Callable[..., Path]) -> None:
    write("a.jsonl", [{"content": "one"}])
    write("b.json", {"rows": [{"content": "two"}]})
    (tmp_path / "c.txt").write_text("three")
    pq.write_table(pa.table({"content": ["four"]}), tmp_path / "d.parquet")
    assert texts(tmp_path, "content") == ["one", "two", "three", "four"]
