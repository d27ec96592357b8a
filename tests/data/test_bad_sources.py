"""Files that are not text: each a LongRopeError of one line that names the path and the fault."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from longrope.data.sources import read_documents
from longrope.errors import LongRopeError

WriteParquet = Callable[[Path, dict[str, list[str | None]]], None]

FILES = {
    "empty.txt": (b"", "empty"),
    "blank.txt": (b" \n\t\n", "empty or blank"),
    "mark.txt": (b"\xef\xbb\xbf", "empty or blank"),
    "binary.txt": (b"\x7fELF\0\0\1text", "NUL"),
    "utf16.txt": ("whale".encode("utf-16"), "NUL"),
    "latin.txt": ("caf\xe9 au lait".encode("latin-1"), "0xe9 at offset 3"),
    "cut.txt.gz": (gzip.compress(b"whale " * 1000)[:-20], "cannot read"),
    "fake.txt.gz": (b"no gzip at all", "cannot read"),
    "cut.txt.xz": (lzma.compress(b"whale " * 1000)[:-20], "cannot read"),
    "fake.txt.xz": (b"no xz at all", "cannot read"),
    "empty.jsonl": (b"", "found none"),
    "blank.jsonl": (b'{"text": " "}\n', "found none"),
    "bad.jsonl": (b'{"text": "one"}\n{"text": \n', "line 2"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "one"}\n' * 1000)[:-20], "cannot read"),
    "deep.jsonl": (b"[" * 200_000, "line 1"),
    "array.jsonl": (b'["text"]\n', "line 1, found a list of str"),
    "missing.jsonl": (
        b'{"text": "one"}\n\n{"body": "two", "id": 1}\n',
        r"'text' or 'messages' in .* line 3; it has: body, id",
    ),
    "null.jsonl": (b'{"text": null}\n{"text": null}\n', "found none"),
    "number.jsonl": (b'{"text": 7}\n', "field 'text' of .* line 1, found int"),
    "list.jsonl": (b'{"text": ["one", "two"]}\n', "field 'text' of .* line 1, found a list of str"),
    "object.jsonl": (b'{"text": {"en": "one"}}\n', "field 'text' of .* line 1, found an object"),
    "chat.jsonl": (
        b'{"messages": [{"role": "user", "content": "one"}]}\n',
        "line 1 has chat messages, and no tokenizer",
    ),
    "sharegpt.jsonl": (b'{"messages": [{"from": "human", "value": "one"}]}\n', "role and content.* a list of dict"),
    "bad.json": (b'[{"text": "one"},\n', "expected JSON"),
    "number.json": (b"7", "found int"),
    "empty.json": (b"[]", "found none"),
    "lists.json": (b'{"a": [{"text": "one"}], "b": []}', r"one list of rows in .*, found a, b.*as in a\.text"),
    "object.json": (b'{"body": "one"}', "no field 'text' or 'messages' in .*; it has: body"),
    "element.json": (b'["one", 2]', "element 2, found int"),
    "cut.jsonl.zst": (zstandard.compress(b'{"text": "one"}\n' * 1000)[:-4], "cannot read"),
    "fake.txt.zst": (b"no zstd at all", "cannot read"),
    "latin.jsonl": ('{"text": "one"}\n{"text": "\xe9"}\n'.encode("latin-1"), "line 2, found byte 0xe9"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "lone surrogate"),
    "nul.jsonl": (b'{"text": "a\\u0000"}\n', "NUL"),
    "fake.parquet": (b"no parquet at all", "cannot read"),
    "book.pdf": (b"%PDF", "ending in one of"),
}
CODES = {
    "bad.jsonl": "damaged-file",
    "deep.jsonl": "damaged-file",
    "array.jsonl": "damaged-file",
    "missing.jsonl": "no-such-field",
    "number.jsonl": "no-such-field",
    "list.jsonl": "no-such-field",
    "object.jsonl": "no-such-field",
    "sharegpt.jsonl": "no-such-field",
    "chat.jsonl": "no-chat-template",
    "bad.json": "damaged-file",
    "number.json": "damaged-file",
    "lists.json": "no-such-field",
    "object.json": "no-such-field",
    "element.json": "damaged-file",
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file(tmp_path: Path, name: str) -> None:
    content, said = FILES[name]
    code = "unreadable-file" if said == "cannot read" else CODES.get(name, "not-text")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LongRopeError, match=said) as caught:
        read_documents(str(path))
    assert caught.value.code == code
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "void.txt").write_bytes(b"")
    with pytest.raises(LongRopeError, match=r"void\.txt"):
        read_documents(tmp_path)


def test_parquet_without_the_column_and_with_nulls(tmp_path: Path, write_parquet: WriteParquet) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, {"id": ["1"], "body": ["x"]})
    with pytest.raises(LongRopeError, match=r"no column 'text' or 'messages' in .*rows\.parquet; it has: id, body"):
        read_documents(path)
    write_parquet(path, {"text": ["one", None]})
    assert [document.text for document in read_documents(path)] == ["one"]


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_parquet: WriteParquet
) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, {"text": ["one"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LongRopeError, match=r"longrope\[train\]"):
        read_documents(path)


def test_folder_without_texts(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no")
    with pytest.raises(LongRopeError, match=r"no texts in the folder .*\.parquet"):
        read_documents(tmp_path)


def test_missing_source_says_what_was_tried(tmp_path: Path) -> None:
    for source in (str(tmp_path / "nowhere.txt"), "pg19", ""):
        with pytest.raises(LongRopeError, match=r"no file or folder of that name.*book:NAME.*hf:NAME"):
            read_documents(source)
    with pytest.raises(LongRopeError, match="cannot read") as caught:
        read_documents("It was the best of times. " * 1000)
    assert len(str(caught.value)) < 300


def test_a_path_is_never_a_prefix() -> None:
    with pytest.raises(LongRopeError, match="no file or folder"):
        read_documents(Path("book:moby"))


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.txt"
    path.write_text("text")

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # root reads every mode, so the mode itself cannot be the test
    with pytest.raises(LongRopeError, match=r"cannot read .*locked\.txt: Permission denied"):
        read_documents(path)


@pytest.mark.parametrize(
    ("suffix", "packed"),
    [
        (".zst", zstandard.compress),
        (".gz", lambda raw: gzip.compress(raw, 1)),
        (".xz", lambda raw: lzma.compress(raw, preset=0)),
    ],
)
def test_a_file_that_unpacks_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, packed: Callable[[bytes], bytes]
) -> None:
    """Read until the bound and not further, and an ordinary text of the same size is read."""
    monkeypatch.setattr("longrope.data.compressed._ALWAYS", 2**20)
    bomb = tmp_path / f"bomb.jsonl{suffix}"
    bomb.write_bytes(packed(b" " * 2**26))
    with pytest.raises(LongRopeError, match=r"bomb\.jsonl.* unpacks to more than [1-9]\d* MiB") as caught:
        read_documents(bomb)
    assert caught.value.code == "unreadable-file"
    noise = "".join(f"{number * number} " for number in range(200_000)).encode()
    (tmp_path / f"noise.txt{suffix}").write_bytes(packed(noise))
    assert read_documents(tmp_path / f"noise.txt{suffix}")[0].text == noise.decode()


def test_zst_without_zstandard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(LongRopeError, match=r"longrope\[train\]") as caught:
        read_documents(path)
    assert caught.value.code == "missing-dependency"


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl", "long.json"])
def test_a_text_without_white_space_is_no_text(name: str, tmp_path: Path) -> None:
    """A tokenizer takes some 200 bytes of memory for each character; 30 MB took 5.8 GB."""
    text = "abcdefgh" * 4_000_000
    content = {"txt": text, "jsonl": json.dumps({"text": text}), "json": json.dumps([{"text": text}])}
    (tmp_path / name).write_text(content[name.rpartition(".")[2]])
    with pytest.raises(LongRopeError, match="4,000,000 characters without white space") as error:
        read_documents(tmp_path / name)
    assert error.value.code == "not-text"
    assert len(str(error.value)) < 400


def test_a_file_too_large_to_be_one_text_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(10**9 + 1)
    with pytest.raises(LongRopeError, match=r"at most 1 GB.*\.jsonl") as error:
        read_documents(tmp_path / "huge.txt")
    assert error.value.code == "too-large"
