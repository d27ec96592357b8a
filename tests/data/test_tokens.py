"""Tokenising: ids without BOS, once per text and tokenizer, from a cache that may break but never lies."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from longrope.data import tokens
from longrope.data.documents import Document
from longrope.data.tokens import TokenizedDocument, bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.written import temporary

BOOK = Document.of("book", "Call me Ishmael; it was the worst of times, at 12 knots. " * 8)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the documents that were really tokenised."""
    seen: list[str] = []
    encode = tokens._encode

    def counted(document: Document, tokenizer: PreTrainedTokenizerFast) -> tokens.Ids:
        seen.append(document.name)
        return encode(document, tokenizer)

    monkeypatch.setattr(tokens, "_encode", counted)
    return seen


def one(tokenizer: object, folder: Path, document: Document = BOOK) -> TokenizedDocument:
    (result,) = tokenize([document], tokenizer, cache_dir=folder)  # type: ignore[arg-type]
    return result


def test_ids_are_the_text_without_bos(tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    result = one(bos_tokenizer, tmp_path)
    assert (result.name, result.sha256, result.ids.dtype) == ("book", BOOK.sha256, np.int32)
    assert 0 not in result.ids
    assert bos_tokenizer.decode(result.ids) == BOOK.text
    assert not result.ids.flags.writeable


def test_special_tokens_in_a_text_are_text(tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    document = Document.of("markup", "a <s> b </s> c")
    ids = one(bos_tokenizer, tmp_path, document).ids
    assert not {0, 1} & set(ids.tolist())
    assert bos_tokenizer.decode(ids) == document.text


def test_no_warning_about_long_texts(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(one(bos_tokenizer, tmp_path).ids) > bos_tokenizer.model_max_length
        assert not caplog.records
        bos_tokenizer(BOOK.text)
        assert "longer than" in caplog.text  # the warning was there to be suppressed, and still is for others
    finally:
        logger.removeHandler(caplog.handler)


def test_cached_per_text_and_tokenizer(
    tmp_path: Path,
    bos_tokenizer: PreTrainedTokenizerFast,
    same_bos_tokenizer: PreTrainedTokenizerFast,
    calls: list[str],
) -> None:
    first = one(bos_tokenizer, tmp_path)
    bos_tokenizer("a", padding="max_length", truncation=True, max_length=4)  # leaves its state in the backend
    again = one(same_bos_tokenizer, tmp_path, Document.of("another name", BOOK.text))
    assert calls == ["book"]
    assert again.name == "another name"
    np.testing.assert_array_equal(again.ids, first.ids)
    assert one(bos_tokenizer, tmp_path).ids.tolist() == first.ids.tolist()
    assert calls == ["book"]
    one(bos_tokenizer, tmp_path, Document.of("new", "another text"))
    bos_tokenizer.add_tokens(["Ishmael"])
    changed = one(bos_tokenizer, tmp_path)
    assert calls == ["book", "new", "book"]
    assert changed.ids.tolist() != first.ids.tolist()


def _cut(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-7])


def _flip(entry: Path) -> None:
    data = bytearray(entry.read_bytes())
    data[-4] ^= 1
    entry.write_bytes(bytes(data))


def _empty(entry: Path) -> None:
    entry.write_bytes(b"")


def _pickle(entry: Path) -> None:
    np.save(entry, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def _other_type(entry: Path) -> None:
    np.save(entry, np.load(entry).astype(np.int64))


def _only_digest(entry: Path) -> None:
    np.save(entry, np.load(entry)[:8])


def _folder(entry: Path) -> None:
    entry.unlink()
    entry.mkdir()


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _pickle, _other_type, _only_digest, _folder])
def test_damaged_entry_is_computed_again(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast, calls: list[str], damage: object
) -> None:
    first = one(bos_tokenizer, tmp_path)
    (entry,) = tmp_path.iterdir()
    assert callable(damage)
    damage(entry)
    np.testing.assert_array_equal(one(bos_tokenizer, tmp_path).ids, first.ids)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == [entry]  # nothing temporary is left
    if entry.is_file():
        one(bos_tokenizer, tmp_path)
        assert len(calls) == 2


def test_unwritable_cache_is_done_without(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast, calls: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "cache"
    first, second = one(bos_tokenizer, folder), one(bos_tokenizer, folder)
    np.testing.assert_array_equal(first.ids, second.ids)
    assert len(calls) == 2


def test_full_disk_leaves_no_half_entry(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert one(bos_tokenizer, tmp_path).ids.size
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    temporary(tmp_path / "0123.npy").write_bytes(b"half")
    one(bos_tokenizer, tmp_path)
    (entry,) = tmp_path.iterdir()
    assert entry.suffix == ".npy"


def test_default_folder(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for _ in range(2):
        tokenize([BOOK], bos_tokenizer)
    assert calls == ["book"]
    assert len(list((tmp_path / ".cache" / "longrope" / "tokens").glob("*.npy"))) == 1


def test_slow_tokenizer(tmp_path: Path, calls: list[str]) -> None:
    ids = [one(ByT5Tokenizer(), tmp_path).ids for _ in range(2)]
    assert ids[0].tolist() == [byte + 3 for byte in BOOK.text.encode()] == ids[1].tolist()
    assert calls == ["book"]
    one(ByT5Tokenizer(extra_ids=3), tmp_path)
    assert len(calls) == 2


def test_a_tokenizer_that_makes_nothing_is_an_error(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(LongRopeError, match="no tokens of book"):
        one(nothing, tmp_path)


def test_bos_is_found_by_encoding(
    bos_tokenizer: PreTrainedTokenizerFast, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert bos_of(bos_tokenizer) == 0
    assert plain_tokenizer.bos_token_id == 0
    assert bos_of(plain_tokenizer) is None
    assert bos_of(ByT5Tokenizer()) is None
