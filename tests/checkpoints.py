"""Tiny checkpoints on disk for tests of whole verbs: random weights, a real tokenizer, a window of 64 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WINDOW = 64
VOCABULARY = 300

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_MORE: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"head_dim": 32},
    "MixtralConfig": {"num_local_experts": 2},
    "Gemma3TextConfig": {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
    "Olmo3Config": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
}


def words(count: int, seed: int = 0) -> str:
    """`count` pseudo-words of text, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (count, 5), generator=generator).tolist()
    return " ".join("".join(map(chr, word)) for word in letters)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a BOS in front of every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([words(500)], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=WINDOW)


def save_checkpoint(
    folder: Path, config_class: str = "LlamaConfig", dtype: torch.dtype = torch.float32, **more: Any
) -> Path:
    """A random checkpoint of `config_class` with a tokenizer, weights large enough that positions matter."""
    config = getattr(transformers, config_class)(**_SHARED | _MORE.get(config_class, {}) | more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "query_key_value" in name:
                parameter.mul_(6.0)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
