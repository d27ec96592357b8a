"""The tokenizer in a GGUF file, made to give the tokens that llama.cpp gives.

transformers can make one too, but takes GPT-2's split for every byte-level BPE whose name it does not know (SmolLM's,
which splits digits), needs merges for whole words of Llama 3, adds no BOS where llama.cpp adds one without being told,
puts SentencePiece's space before the first word whatever the file says of it, and differs between releases.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from longrope.errors import LongRopeError, one_line
from longrope.models.gguf.container import GgufFile, read_array
from longrope.models.gguf.pre_tokenizers import NAMED, PreTokenizer

_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's, where the file does not say
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types that are found in a text before it is split
_SPACE = "▁"  # as SentencePiece writes it
_GIVE = "give the model's own `tokenizer`"


def load_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer in `file`, with the BOS and EOS that llama.cpp adds.

    Raises LongRopeError (`another-tokenizer`) where llama.cpp's way to split text is not known, or `damaged-file` where
    the vocabulary makes no tokenizer.
    """
    kind, pre = (file.value(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind not in (_BYTE_LEVEL, _SENTENCEPIECE):
        raise _unknown(file, f"{kind!r}, which is neither {_BYTE_LEVEL} nor {_SENTENCEPIECE}")
    rule = NAMED.get(pre) if kind == _BYTE_LEVEL else None
    if kind == _BYTE_LEVEL and rule is None:
        raise _unknown(file, f"the pre-tokeniser {pre!r}, which is none of {', '.join(NAMED)}")
    defaults = {} if kind == _BYTE_LEVEL else _SENTENCEPIECE_IDS
    try:
        tokens = read_array(file, "tokenizer.ggml.tokens")
        ids = {name: _id(file, key, len(tokens), defaults.get(name)) for name, key in _SPECIAL.items()}
        special = {name: tokens[index] for name, index in ids.items() if index is not None}
        backend = _sentencepiece(file, tokens, special) if rule is None else _byte_level(file, tokens, rule)
        backend.add_special_tokens(_added(file, tokens, _CONTROL))
        backend.add_tokens(_added(file, tokens, _USER_DEFINED))
    except LongRopeError:
        raise
    except Exception as error:  # the tokenizers package raises plain exceptions
        raise LongRopeError(
            f"the vocabulary of {file.path} makes no tokenizer: {one_line(error)}", code="damaged-file", hint=_GIVE
        ) from error
    adds_bos = file.value("tokenizer.ggml.add_bos_token", rule is None or rule.add_bos)
    around = {"bos": adds_bos, "eos": file.value("tokenizer.ggml.add_eos_token", False)}
    for name, added in around.items():
        if added and name not in special:
            raise _unknown(file, f"a {name.upper()} to add to texts and no token for it")
    bos, eos = ([special[name]] if added else [] for name, added in around.items())
    backend.post_processor = TemplateProcessing(
        single=[*bos, "$A", *eos], special_tokens=[(token, backend.token_to_id(token)) for token in {*bos, *eos}]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.value("tokenizer.chat_template"),
        name_or_path=str(file.path),
        **{f"{name}_token": token for name, token in special.items()},
    )


def _byte_level(file: GgufFile, tokens: list[str], rule: PreTokenizer) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in read_array(file, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=rule.ignore_merges))
    backend.pre_tokenizer = rule.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GgufFile, tokens: list[str], special: dict[str, str]) -> Tokenizer:
    """BPE that joins the two pieces whose whole has the highest score, and takes bytes for text that is in no token."""
    scores = read_array(file, "tokenizer.ggml.scores")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    splits = [
        (score, token[:place], token[place:])
        for token, score in zip(tokens, scores, strict=True)
        for place in range(1, len(token))
        if token[:place] in vocabulary and token[place:] in vocabulary
    ]
    splits.sort(key=lambda split: -split[0])
    merges = [(left, right) for _, left, right in splits]
    backend = Tokenizer(BPE(vocabulary, merges, unk_token=special.get("unk"), fuse_unk=True, byte_fallback=True))
    prefixed = bool(file.value("tokenizer.ggml.add_space_prefix", True))
    prefix = [normalizers.Prepend(_SPACE)] * prefixed
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * prefixed)
    return backend


def _added(file: GgufFile, tokens: list[str], kind: int) -> list[AddedToken]:
    """The tokens of the type `kind`."""
    if "tokenizer.ggml.token_type" not in file.keys:
        return []
    types = read_array(file, "tokenizer.ggml.token_type")
    return [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, found in zip(tokens, types, strict=True)
        if found == kind and token
    ]


def _id(file: GgufFile, name: str, size: int, default: int | None) -> int | None:
    """A special token of a vocabulary of `size`; as in llama.cpp the default where the file has none or another id."""
    found = file.value(f"tokenizer.ggml.{name}_token_id")
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < size else default


def _unknown(file: GgufFile, found: str) -> LongRopeError:
    return LongRopeError(f"the tokenizer of {file.path} has {found}", code="another-tokenizer", hint=_GIVE)
