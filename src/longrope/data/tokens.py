"""Tokenising: documents as token ids, computed once and cached on disk by hash; `samples.py` draws from them.

A special token spelled out in a text stays ordinary text, unless a chat template wrote it; no BOS or EOS is added.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from transformers import PreTrainedTokenizerBase

from longrope.data.documents import Document
from longrope.errors import LongRopeError
from longrope.storage import sha256_text
from longrope.written import sweep, temporary

Ids = npt.NDArray[np.int32]

_FORMAT = "longrope-tokens-1"  # part of every cache key: raise it when the encoding options or the file's layout change
_BEFORE = "a"  # one token, which merges with no white space behind it
_DIGEST_WORDS = 8  # the SHA-256 of the ids as int32 words, stored in front of them to detect damage


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedDocument:
    """A document's token ids, int32 (n,), read-only, without BOS. `sha256` is that of the document's text, and
    `chat_template` the document's."""

    name: str
    sha256: str
    ids: Ids
    chat_template: str | None = None


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, *, cache_dir: Path | None = None
) -> list[TokenizedDocument]:
    """The token ids of the documents, read from the cache where the same tokenizer has encoded the same text before.

    A damaged cache entry is computed again; where the cache cannot be written, nothing is cached. `cache_dir` is
    `default_cache_dir()` by default. Raises LongRopeError (`not-text`) where the tokenizer makes no tokens of a text.
    """
    folder = cache_dir if cache_dir is not None else default_cache_dir()
    identity = tokenizer_hash(tokenizer)
    result = []
    for document in documents:
        path = None
        if folder is not None and identity is not None:
            form = _FORMAT if document.chat_template is None else f"{_FORMAT}-chat"
            path = folder / f"{sha256_text(f'{form} {document.sha256} {identity}')}.npy"
        ids = _load(path) if path is not None else None
        if ids is None:
            ids = _encode(document, tokenizer)
            if path is not None:
                _store(path, ids)
        ids.flags.writeable = False
        result.append(TokenizedDocument(document.name, document.sha256, ids, document.chat_template))
    return result


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text by itself, without BOS; a special token spelled out in it stays text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that begins with white space and continues another text.

    Llama-2-like tokenizers put a blank in front of every text: " 7" by itself would begin with two.
    """
    before, both = encode(tokenizer, _BEFORE), encode(tokenizer, _BEFORE + text)
    return both[len(before) :] if both[: len(before)] == before else encode(tokenizer, text)


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id where the tokenizer really puts BOS in front of a text, else None.

    Found by encoding a text, because `bos_token` says nothing about it: GPT-2 names one and adds none.
    """
    bos = tokenizer.bos_token_id
    if not isinstance(bos, int):
        return None
    with_special = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    without = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    added = with_special[:1] == [bos] and without[:1] != [bos]
    return bos if added else None


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens in front of every prompt: BOS where the tokenizer puts one, else none."""
    bos = bos_of(tokenizer)
    return [] if bos is None else [bos]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 over everything that decides the ids of a text; None where the tokenizer cannot be saved.

    For a fast tokenizer over the serialised backend, without truncation and padding, which earlier calls leave behind
    and `tokenize` does not use; for a slow one over the files that `save_pretrained` writes.
    """
    parts = [type(tokenizer).__name__, tokenizers.__version__]
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append(json.dumps(backend | {"truncation": None, "padding": None}, sort_keys=True))
        return sha256_text("\n".join(parts))
    digest = sha256("\n".join(parts).encode())
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except NotImplementedError:  # a custom class without save_vocabulary: nothing is cached
            return None
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(file.name.encode() + b"\0" + sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def default_cache_dir() -> Path | None:
    """~/.cache/longrope/tokens; None where the user has no home."""
    try:
        return Path.home() / ".cache" / "longrope" / "tokens"
    except RuntimeError:
        return None


def _encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> Ids:
    encoded = tokenizer(
        document.text,
        add_special_tokens=False,
        # "<s>" written in a book is four characters, not a second BOS; "<|im_start|>" of a chat template is a token.
        split_special_tokens=document.chat_template is None,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a document is meant to be longer than the model's window
    )
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    if ids.size == 0:
        raise LongRopeError(
            f"the tokenizer makes no tokens of {document.name}", code="not-text", hint="use the model's own tokenizer"
        )
    return ids


def _load(path: Path) -> Ids | None:
    """The ids cached at `path`; None where there is no file or it is damaged."""
    try:
        words = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(words, np.ndarray) or words.dtype != np.int32 or words.ndim != 1:
        return None
    ids: Ids = words[_DIGEST_WORDS:].copy()
    return ids if ids.size and np.array_equal(words[:_DIGEST_WORDS], _digest(ids)) else None


@cache
def _sweep_once(folder: Path) -> None:
    """Remove what killed processes left in the cache; an entry that another process writes now is computed again."""
    sweep(folder)


def _store(path: Path, ids: Ids) -> None:
    """Cache `ids` in full or not at all; where that fails, the next run tokenises again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        made = temporary(path)
        try:
            with made.open("xb") as file:
                np.save(file, np.concatenate([_digest(ids), ids]), allow_pickle=False)
            os.replace(made, path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise


def _digest(ids: Ids) -> Ids:
    return np.frombuffer(sha256(ids.astype("<i4").tobytes()).digest(), dtype="<i4").astype(np.int32)
