"""The vocabulary in a GGUF file: llama.cpp splits text as the tokenizer does, and what it cannot do is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longrope.export.gguf import convert as gguf_tokenizer
from longrope.export.gguf.convert import CONTROL, NORMAL, UNUSED, USER_DEFINED, vocabulary, write_llama
from longrope.models.checkpoint_files import embedded_model_path
from longrope.models.gguf.pre_tokenizers import REST, WORDS
from tests.checkpoints import save_checkpoint, words
from tests.export.sources import refusal

pytest.importorskip("gguf")

TEXTS = [
    "The quick brown fox, aged 27, jumped over 1234567 dogs; it wasn't THEY'LL or we’d.",
    "  leading, trailing  and   inner spaces \n\n\tTabs\r\nand\u00a0more   ",
    "naïve café — Ελληνικά, русский, 中文字符, 日本語, العربية, हिन्दी 👩‍👩‍👧 ½ ² Ⅷ ٣٤",
    "x=3.14*y**2;if(a[0]!=NULL){return -1;} // 100%\n    indented\n\n\n",
    "",
    " ",
    "</s> a special token within <s>text",
]
SIZE = 1000  # tokens
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


PRE_TOKENIZERS = {
    "gpt-2": (GPT2, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False),
    "llama-bpe": (split(WORDS + r"\p{N}{1,3}" + REST), True),
    "qwen2": (split(WORDS + r"\p{N}" + REST), False),
    "smaug-bpe": (split(WORDS + r"\p{N}{1,3}" + REST), False),
}


def backend(pre: pre_tokenizers.PreTokenizer, ignore_merges: bool = False, size: int = SIZE) -> Tokenizer:
    """Byte-level BPE behind `pre`. It is trained without: merges across all borders, so that each border shows."""
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer = BYTES
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=4,
        show_progress=False,
    )
    bpe.train_from_iterator([*TEXTS, *random_texts(400, seed=1)], trainer)
    bpe.pre_tokenizer = pre
    return bpe


def saved(folder: Path, bpe: Tokenizer, **more: object) -> Path:
    """A random checkpoint in `folder` with the tokenizer `bpe`."""
    save_checkpoint(folder, vocab_size=SIZE)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", **more).save_pretrained(folder)
    return folder


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings of characters of every kind that a pre-tokeniser treats differently."""
    generator = random.Random(seed)
    alphabet = "aZé中я0729²Ⅷ '’\"\n\r\t.,!-_/\u00a0\u3000sStTlLdDmMvVrReE"
    return ["".join(generator.choices(alphabet, k=60)) for _ in range(count)]


def differing_texts(folder: Path, gguf: Path) -> list[str]:
    """Texts that llama.cpp, with the vocabulary that is written for `folder`, splits otherwise than its tokenizer."""
    llama_cpp = pytest.importorskip("tests.export.gguf.llama_cpp")
    write_llama(gguf, str(folder), {"llama.context_length": (4, 256)}, {})
    server = llama_cpp.serve(gguf, 256)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        text for text in [*TEXTS, *random_texts(100)] if llama_cpp.tokenize(server, text) != tokenizer(text).input_ids
    ]


def with_bos(name: str) -> Tokenizer:
    bpe = backend(*PRE_TOKENIZERS[name])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return bpe


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_splits_as_the_tokenizer_does(name, tmp_path):
    folder = saved(tmp_path / "model", with_bos(name))
    assert vocabulary(str(folder), SIZE).pre == name
    assert differing_texts(folder, tmp_path / "model.gguf") == []


@pytest.mark.parametrize(("name", "wrong"), [("gpt-2", "smollm"), ("smollm", "gpt-2"), ("qwen2", "llama-bpe")])
def test_a_wrong_name_shows(name, wrong, tmp_path, monkeypatch):
    names = {key: wrong if value == name else value for key, value in gguf_tokenizer._NAMES.items()}
    monkeypatch.setattr(gguf_tokenizer, "_NAMES", names)
    assert differing_texts(saved(tmp_path / "model", with_bos(name)), tmp_path / "model.gguf")


def test_the_embedded_model_s_tokens(tmp_path):
    assert differing_texts(embedded_model_path(), tmp_path / "tiny.gguf") == []


def test_types_padding_and_special_tokens(tmp_path):
    bpe = backend(GPT2, size=980)
    bpe.add_special_tokens(["<|user|>"])
    bpe.add_tokens([AddedToken("<think>", normalized=False)])
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = saved(tmp_path / "model", bpe, chat_template="{{ messages }}")
    found = vocabulary(str(folder), SIZE)
    assert found.tokens[:2] == ["<s>", "</s>"]
    assert found.tokens[980:] == ["<|user|>", "<think>", *(f"[PAD{index}]" for index in range(982, SIZE))]
    assert found.types[:2] == [CONTROL] * 2
    assert set(found.types[2:980]) == {NORMAL}
    assert found.types[980:] == [CONTROL, USER_DEFINED, *[UNUSED] * 18]
    assert found.special == {"bos": 0, "eos": 1}
    assert (found.add_bos, found.add_eos) == (False, True)
    assert found.chat_template == "{{ messages }}"
    assert found.merges[0].count(" ") == 1


def test_the_end_of_text_is_the_config_s_where_the_tokenizer_names_none(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=backend(GPT2)).save_pretrained(folder)
    assert vocabulary(str(folder), SIZE, eos=7).special == {"eos": 7}


def test_nfc_is_told(tmp_path):
    bpe = backend(*PRE_TOKENIZERS["qwen2"])
    bpe.normalizer = normalizers.NFC()
    notes = write_llama(tmp_path / "x.gguf", str(saved(tmp_path / "model", bpe)), {"llama.context_length": (4, 64)}, {})
    assert [note for note in notes if "NFC" in note]


def spm() -> Tokenizer:
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.train_from_iterator([words(50)], trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False))
    return bpe


def lower() -> Tokenizer:
    bpe = backend(GPT2)
    bpe.normalizer = normalizers.Lowercase()
    return bpe


def greedy_token() -> Tokenizer:
    bpe = backend(GPT2, size=980)
    bpe.add_tokens([AddedToken("<mask>", lstrip=True)])
    return bpe


def doubled_bos() -> Tokenizer:
    bpe = backend(GPT2)
    bpe.post_processor = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 0)])
    return bpe


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (spm, "SentencePiece"),
        (lower, "Lowercase"),
        (lambda: backend(pre_tokenizers.ByteLevel(add_prefix_space=True)), "pre-tokeniser (ByteLevel)"),
        (
            lambda: backend(pre_tokenizers.Sequence([pre_tokenizers.Digits(), GPT2])),
            "pre-tokeniser (Digits + ByteLevel",
        ),
        (lambda: backend(split(r"\w+|\W+")), "pre-tokeniser (Split + ByteLevel)"),
        (lambda: backend(GPT2, ignore_merges=True), "pre-tokeniser (ByteLevel)"),
        (lambda: backend(PRE_TOKENIZERS["qwen2"][0], ignore_merges=True), "pre-tokeniser (Split"),
        (greedy_token, "'<mask>'"),
        (doubled_bos, "other tokens than BOS and EOS"),
        (lambda: backend(GPT2, size=1010), "at most 1000 tokens"),
    ],
)
def test_what_llama_cpp_would_split_otherwise_is_refused(make, named, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    PreTrainedTokenizerFast(tokenizer_object=make(), bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    error = refusal(vocabulary, str(folder), SIZE)
    message = str(error)
    assert (error.code, named in message) == ("unsupported-model", True)
    assert "\n" not in message
    if "at most" not in message:
        assert "as `gguf`" in message
