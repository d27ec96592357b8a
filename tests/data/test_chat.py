"""Chat messages: the text and the tokens are those of the tokenizer's own `apply_chat_template`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from longrope.data.documents import Document
from longrope.data.samples import draw_samples
from longrope.data.sources import read_documents
from longrope.data.tokens import bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.storage import sha256_text

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}"
    "{% if m.tool_calls is defined %}CALL{% endif %}{{ eos_token }}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "Call me."}, {"role": "assistant", "content": "Ishmael."}]


@pytest.fixture
def chat(bos_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    bos_tokenizer.chat_template = TEMPLATE
    return bos_tokenizer


def one(tmp_path: Path, row: Any, tokenizer: Any, field: str = "messages") -> Document:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (document,) = read_documents(path, field=field, tokenizer=tokenizer)
    return document


def test_tokens_are_those_of_the_template(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    """End of sequence is one token, and BOS comes once in front, where the samples put it."""
    document = one(tmp_path, {"messages": MESSAGES}, chat)
    assert document.chat_template == sha256_text(TEMPLATE)
    assert document.name == f"chat.jsonl:1 (chat template {sha256_text(TEMPLATE)[:12]})"
    (tokenized,) = tokenize([document], chat, cache_dir=tmp_path / "cache")
    expected = chat.apply_chat_template(MESSAGES, return_dict=False)
    assert [bos_of(chat), *tokenized.ids] == expected
    assert list(tokenized.ids).count(chat.eos_token_id) == 2
    (again,) = tokenize([document], chat, cache_dir=tmp_path / "cache")
    assert again.ids.tolist() == tokenized.ids.tolist()
    # The same characters in a plain text are characters, and the cache keeps the two apart.
    plain = Document.of("plain", document.text)
    (characters,) = tokenize([plain], chat, cache_dir=tmp_path / "cache")
    assert chat.eos_token_id not in characters.ids
    assert plain.sha256 == document.sha256


def test_a_template_may_write_bos_between_turns(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    chat.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    (tokenized,) = tokenize([one(tmp_path, {"messages": MESSAGES}, chat)], chat, cache_dir=tmp_path)
    samples = draw_samples([tokenized], length=len(tokenized.ids) + 1, count=1, seed=0, bos_token_id=bos_of(chat))
    assert samples.ids[0].tolist() == chat.apply_chat_template(MESSAGES, return_dict=False)


def test_a_first_token_that_samples_do_not_add_stays(tmp_path: Path, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """SmolLM2's BOS is the mark of a turn, and its tokenizer adds none."""
    plain_tokenizer.chat_template = TEMPLATE
    assert one(tmp_path, {"messages": MESSAGES}, plain_tokenizer).text.startswith("<s><|user|>")


def test_messages_are_found_where_rows_have_no_text(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [{"messages": MESSAGES}, {"text": "plain"}, {"messages": []}, {"messages": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_documents(path, tokenizer=chat)
    assert [document.chat_template is None for document in found] == [False, True]


def test_parts_and_nulls_of_content(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "Call "}, {"type": "text", "text": "me."}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Ishmael."}]
    assert (
        one(tmp_path, {"chat": {"m": messages}}, chat, "chat.m").text == one(tmp_path, {"m": MESSAGES}, chat, "m").text
    )
    silent = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    assert one(tmp_path, {"m": silent}, chat, "m").text == "<|user|>a</s><|assistant|></s>"
    for content, kind in (([{"type": "image_url", "image_url": {}}], "image_url"), (7, "int"), ([7], "int")):
        with pytest.raises(LongRopeError, match=rf"line 1, found content of the type {kind}") as caught:
            one(tmp_path, {"m": [{"role": "user", "content": content}]}, chat, "m")
        assert caught.value.code == "not-text"


def test_parquet_gives_every_message_every_key(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    """A template asks whether a key is there."""
    messages = [MESSAGES[0], MESSAGES[1] | {"tool_calls": [{"name": "f"}]}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "chat.parquet")
    (document,) = read_documents(tmp_path / "chat.parquet", tokenizer=chat)
    assert document.text == one(tmp_path, {"messages": messages}, chat).text
    assert document.text.count("CALL") == 1


def test_the_text_does_not_change_with_the_date(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    chat.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    assert one(tmp_path, {"messages": MESSAGES}, chat).text == "26 Jul 2024 Call me."


def test_refused_in_one_line(tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(LongRopeError, match=r"line 1 has chat messages, and the tokenizer has no chat") as caught:
        one(tmp_path, {"messages": MESSAGES}, bos_tokenizer)
    assert caught.value.code == "no-chat-template"
    bos_tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(LongRopeError, match=r"refuses the messages of .* line 1: .*roles must alternate") as caught:
        one(tmp_path, {"messages": MESSAGES}, bos_tokenizer)
    assert "\n" not in str(caught.value)
