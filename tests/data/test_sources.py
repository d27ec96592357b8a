"""Every form of source, and what is kept of identical documents."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import zstandard

from longrope.data.documents import Document
from longrope.data.readers import DatasetName
from longrope.data.sources import as_sources, read_all, read_documents
from longrope.errors import LongRopeError

TEXT = "Call me Ishmael.\nÆon — 鯨.\n"


WriteParquet = Callable[[Path, dict[str, list[str | None]]], None]


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "whale.txt"
    path.write_text(TEXT, encoding="utf-8")
    (document,) = read_documents(str(path))
    assert (document.name, document.text) == ("whale.txt", TEXT)
    assert document.sha256 == sha256(TEXT.encode()).hexdigest()
    assert read_documents(path) == [document]


def test_byte_order_mark_and_line_ends_do_not_make_another_document(tmp_path: Path) -> None:
    (tmp_path / "unix.txt").write_bytes(TEXT.encode())
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    (unix,), (windows,) = (read_documents(tmp_path / name) for name in ("unix.txt", "windows.txt"))
    assert unix.sha256 == windows.sha256


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.compress)]
)
def test_compressed_files(tmp_path: Path, suffix: str, compress: object) -> None:
    assert callable(compress)
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(TEXT.encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(json.dumps({"text": TEXT}).encode() + b"\n"))
    assert read_documents(tmp_path / f"a.txt{suffix}")[0].text == TEXT
    (tmp_path / f"c.json{suffix}").write_bytes(compress(json.dumps([TEXT]).encode()))
    assert read_documents(tmp_path / f"b.jsonl{suffix}")[0].text == TEXT
    assert read_documents(tmp_path / f"c.json{suffix}")[0].text == TEXT


def test_jsonl_field_line_numbers_and_blank_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"body": "first\u2028still first"}, {"body": " \n"}, {"body": "third", "text": "other"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    documents = read_documents(path, field="body")
    assert [(document.name, document.text) for document in documents] == [
        ("rows.jsonl:1", "first\u2028still first"),
        ("rows.jsonl:5", "third"),
    ]


def test_parquet_reads_one_column(tmp_path: Path, write_parquet: WriteParquet) -> None:
    path = tmp_path / "rows.parquet"
    texts: list[str | None] = [f"text {number}" for number in range(150)]
    texts[1] = "  "
    write_parquet(path, {"id": [str(number) for number in range(150)], "body": texts})
    documents = read_documents(path, field="body")
    assert [document.text for document in documents] == [text for text in texts if text and text.strip()]
    assert documents[1].name == "rows.parquet:3"


def test_folder_is_sorted_recursive_and_passes_over_what_is_no_text(
    tmp_path: Path, write_parquet: WriteParquet
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "two.txt").write_text("two")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    write_parquet(tmp_path / "c.parquet", {"text": ["three"]})
    for name in ("picture.png", ".hidden/x.txt", "._a.txt"):
        (tmp_path / name).write_bytes(b"\0")
    documents = read_documents(tmp_path)
    assert [document.name for document in documents] == ["a.jsonl:1", "b/two.txt", "c.parquet:1"]


def test_limit_stops_before_what_lies_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\nbroken\n')
    assert [document.text for document in read_documents(path, limit=2)] == ["one", "two"]
    with pytest.raises(LongRopeError, match="line 3"):
        read_documents(path, limit=3)
    with pytest.raises(LongRopeError, match="at least 1"):
        read_documents(path, limit=0)


def test_identical_documents_are_kept_once(tmp_path: Path) -> None:
    for name, text in (("a.txt", "same"), ("b.txt", "other"), ("c.txt", "same")):
        (tmp_path / name).write_text(text)
    assert [document.name for document in read_documents(tmp_path)] == ["a.txt", "b.txt", "c.txt"]
    assert [document.name for document in read_all([tmp_path])] == ["a.txt", "b.txt"]
    assert [document.name for document in read_all([tmp_path / "c.txt", tmp_path])] == ["c.txt", "b.txt"]


def test_read_all_wants_a_source() -> None:
    with pytest.raises(LongRopeError) as error:
        read_all([])
    assert error.value.code == "missing-data"


def test_data_is_one_source_or_several() -> None:
    document = Document.of("mine", "text")
    assert as_sources("book:moby") == ["book:moby"]
    assert as_sources(Path("a")) == [Path("a")]
    assert as_sources(document) == [document]
    assert as_sources(["a", Path("b"), document]) == ["a", Path("b"), document]
    assert as_sources(()) == []
    for wrong in (3, None, ["a", 3], {"a"}):
        with pytest.raises(LongRopeError) as error:
            as_sources(wrong)  # type: ignore[arg-type]
        assert error.value.code == "missing-data"


class TestDatasets:
    """`hf:` on a local folder: the real `datasets` library, without the network."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "set"
        folder.mkdir()
        for split in ("train", "test"):
            rows = [{"text": f"{split} {number}", "n": number} for number in range(3)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        return folder

    def test_splits_and_limits(self, folder: Path) -> None:
        assert [document.text for document in read_documents(f"hf:{folder}")] == ["train 0", "train 1", "train 2"]
        for first in ("[:2]", ":2"):
            found = read_documents(f"hf:{folder}@test{first}")
            assert [document.text for document in found] == ["test 0", "test 1"]
        assert [document.name for document in read_documents(f"hf:{folder}:default@test", limit=1)] == [
            f"hf:{folder}:default@test:1"
        ]

    def test_files_of_a_repository_and_fields(self, folder: Path) -> None:
        """Files are read as they are: a loading script beside them is not run."""
        (folder / "set.py").write_text("raise SystemExit")
        (folder / "code.jsonl").write_text(json.dumps({"content": "code 0"}) + "\n")
        found = {
            f"hf:{folder}/test.jsonl": ["test 0", "test 1", "test 2"],
            f"hf:{folder}/t*.jsonl@train:4": ["test 0", "test 1", "test 2", "train 0"],
            f"hf:{folder}/code.jsonl#content": ["code 0"],
        }
        for source, texts in found.items():
            assert [document.text for document in read_documents(source)] == texts

    def test_what_datasets_is_asked_for(self) -> None:
        asked = {
            "a/b": ("a/b", {"name": None, "split": "train"}),
            "a/b:c@d:3#e": ("a/b", {"name": "c", "split": "d"}),
            "a/b/c/*.jsonl.zst": (
                "json",
                {"data_files": {"train": "hf://datasets/a/b/c/*.jsonl.zst"}, "split": "train"},
            ),
            "a/b/*.parquet@x": ("parquet", {"data_files": {"x": "hf://datasets/a/b/*.parquet"}, "split": "x"}),
        }
        assert {text: DatasetName.parse(text).arguments() for text in asked} == asked
        assert DatasetName.parse("a/b:c@d:3#e") == DatasetName("a/b", "c", "d", 3, "e")

    def test_errors_are_one_line(self, folder: Path) -> None:
        for source, said in (
            (f"hf:{folder}@absent", "absent"),
            (f"hf:{folder}:noconfig", "noconfig"),
            (f"hf:{folder}/nowhere", "nowhere"),
            ("hf:", "hf:NAME"),
            ("hf:a@b@c", "hf:NAME"),
            ("hf:a/b.jsonl:c", "hf:NAME/FILES"),
            ("hf:a#", "FIELD"),
            *((f"hf:a@b{first}", "N at least 1") for first in (":", ":0", "[:0]", "[2]", ":2]", ":x", ":-1", ":2:3")),
        ):
            with pytest.raises(LongRopeError, match=said) as caught:
                read_documents(source)
            assert "\n" not in str(caught.value)
        with pytest.raises(LongRopeError, match=r"no field 'body' in hf:.* row 1; it has: text, n"):
            read_documents(f"hf:{folder}", field="body")
        with pytest.raises(LongRopeError, match=r"field 'n' of hf:.* row 1, found int"):
            read_documents(f"hf:{folder}", field="n")

    def test_missing_library_names_the_extra(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(LongRopeError, match=r"longrope\[train\]"):
            read_documents(f"hf:{folder}")
