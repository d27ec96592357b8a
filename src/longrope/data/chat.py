"""Chat messages as text, through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from longrope.data.documents import Document
from longrope.data.tokens import bos_of
from longrope.errors import LongRopeError, one_line
from longrope.storage import sha256_text

DATE = datetime(2024, 7, 26)
"""The date that chat templates write in place of today's: a text must not change from day to day."""


def are_messages(value: Any) -> bool:
    """True if `value` is a list of chat messages: `{"role": …, "content": …}`."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) and "role" in one for one in value)


def chat_document(
    name: str, messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None, where: str
) -> Document:
    """The text of a conversation as the chat template of `tokenizer` writes it, whole, without a prompt to answer.

    BOS in front is left out where the tokenizer puts one in front of every text. Content in parts is joined.

    Raises LongRopeError, naming `where`: `no-chat-template` where there is none, `not-text` for content that is no
    text and for messages that the template refuses.
    """
    template = None if tokenizer is None else _template(tokenizer)
    if tokenizer is None or template is None:
        raise LongRopeError(
            f"{where} has chat messages, and {'no tokenizer is' if tokenizer is None else 'the tokenizer has no'} "
            f"{'here to write' if tokenizer is None else 'chat template that would write'} them as text",
            code="no-chat-template",
            hint="give a `field` that holds text"
            if tokenizer is None
            else "give the `tokenizer` of a chat model, or a `field` that holds text",
        )
    plain = [
        {name: value for name, value in message.items() if value is not None}  # Parquet has every key in every message
        | {"content": _content(message.get("content"), where)}
        for message in messages
    ]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, chat_template=_on_one_date(template))
    except Exception as error:  # whatever a template raises
        raise LongRopeError(
            f"the tokenizer's chat template refuses the messages of {where}: {one_line(error)}", code="not-text"
        ) from error
    if bos_of(tokenizer) is not None:
        text = text.removeprefix(tokenizer.bos_token)
    digest = sha256_text(template)
    return Document.of(f"{name} (chat template {digest[:12]})", text, digest)


def _on_one_date(template: str) -> str:
    """Return `template` with DATE as the date of its function `strftime_now`."""
    if "strftime_now" not in template:
        return template
    parts = "".join(f".replace('%{part}', '{DATE.strftime(f'%{part}')}')" for part in "aAbBdHIjmMpSyY")
    return "{%- macro strftime_now(form) -%}{{ form" + parts + " }}{%- endmacro %}\n" + template


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that `apply_chat_template` uses; None where there is none."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        return None
    return template


def _content(content: Any, where: str) -> str:
    """The text of one message: itself, its parts joined, or nothing for null."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            continue
        kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
        raise LongRopeError(
            f"expected chat messages of text in {where}, found content of the type {kind}", code="not-text"
        )
    return "".join(part["text"] for part in parts)
