"""The tokenizer in a GGUF file: made by transformers, and set to split text as llama.cpp does.

transformers takes GPT-2's split for every byte-level BPE whose name it does not know (SmolLM's, which splits digits),
needs merges for whole words of Llama 3, adds no BOS where llama.cpp adds one without being told, and puts
SentencePiece's space before the first word, whatever the file says of it.
"""

from __future__ import annotations

from typing import Any

from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from longrope.errors import LongRopeError, one_line
from longrope.models.gguf.container import GgufFile, alone
from longrope.models.gguf.pre_tokenizers import NAMED

_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's, where the file does not say
_SPACE = "▁"  # as SentencePiece writes it
_GIVE = "give the model's own `tokenizer`"


def load_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer in `file`, with the BOS and EOS that llama.cpp adds.

    Raises LongRopeError (`another-tokenizer`) where llama.cpp's way to split text is not known, or transformers cannot
    make the tokenizer.
    """
    kind, pre = (file.value(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind not in (_BYTE_LEVEL, _SENTENCEPIECE):
        raise _unknown(file, f"{kind!r}, which is neither {_BYTE_LEVEL} nor {_SENTENCEPIECE}")
    rule = NAMED.get(pre)
    if kind == _BYTE_LEVEL and rule is None:
        raise _unknown(file, f"the pre-tokeniser {pre!r}, which is none of {', '.join(NAMED)}")
    try:
        with alone(file.path) as place:
            made: Any = PreTrainedTokenizerFast.from_pretrained(**place, local_files_only=True)
    except Exception as error:  # transformers raises many kinds of error
        raise LongRopeError(
            f"cannot load the tokenizer of {file.path}: {one_line(error)}", code="another-tokenizer", hint=_GIVE
        ) from error
    backend = made.backend_tokenizer
    if kind == _BYTE_LEVEL and rule is not None:
        backend.normalizer = None
        backend.pre_tokenizer = rule.build()
        backend.model.ignore_merges = rule.ignore_merges
    else:
        prefix = [normalizers.Prepend(_SPACE)] * bool(file.value("tokenizer.ggml.add_space_prefix", True))
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
        backend.pre_tokenizer = None
    ids = {
        name: _id(file, key, _SENTENCEPIECE_IDS.get(name) if kind == _SENTENCEPIECE else None)
        for name, key in _SPECIAL.items()
    }
    tokens = {name: backend.id_to_token(index) for name, index in ids.items() if index is not None}
    adds_bos = file.value("tokenizer.ggml.add_bos_token", kind == _SENTENCEPIECE or (rule is not None and rule.add_bos))
    around = [name for name, added in (("bos", adds_bos), ("eos", file.value("tokenizer.ggml.add_eos_token"))) if added]
    for name in around:
        if tokens.get(name) is None:
            raise _unknown(file, f"a {name.upper()} to add to texts and no token for it")
    used = {name: f"{tokens[name]}" for name in around}
    backend.post_processor = TemplateProcessing(
        single=[*([used["bos"]] if "bos" in used else []), "$A", *([used["eos"]] if "eos" in used else [])],
        special_tokens=[(token, ids[name]) for name, token in used.items()],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.value("tokenizer.chat_template"),
        name_or_path=str(file.path),
        **{f"{name}_token": token for name, token in tokens.items()},
    )


def _id(file: GgufFile, name: str, default: int | None) -> int | None:
    found = file.value(f"tokenizer.ggml.{name}_token_id", default)
    return found if isinstance(found, int) else None


def _unknown(file: GgufFile, found: str) -> LongRopeError:
    return LongRopeError(f"the tokenizer of {file.path} has {found}", code="another-tokenizer", hint=_GIVE)
