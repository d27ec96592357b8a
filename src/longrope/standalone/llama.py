"""The standalone model in transformers' terms, under its original RoPE: a Llama, its checkpoint, a byte tokenizer."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longrope.errors import LongRopeError, one_line
from longrope.standalone.model import EPSILON, StandaloneModel
from longrope.standalone.sizes import VOCABULARY
from longrope.storage import new_output_folder
from longrope.written import move_up, temporary_folder


def llama_config(model: StandaloneModel) -> LlamaConfig:
    """The configuration of a Llama of the model's sizes with its original RoPE."""
    sizes = model.sizes
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=model.lm_head.weight.dtype,
        vocab_size=VOCABULARY,
        hidden_size=sizes.d_model,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.base_length,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_base},
        rms_norm_eps=EPSILON,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def llama_weights(model: StandaloneModel) -> dict[str, Tensor]:
    """The weights under the names that LlamaForCausalLM has for them; nothing is copied."""
    weights = model.state_dict()
    return {name if name.startswith("lm_head.") else f"model.{name}": weight for name, weight in weights.items()}


def as_llama(model: StandaloneModel) -> LlamaForCausalLM:
    """A LlamaForCausalLM in eval mode that shares the weights of `model`, under its original RoPE."""
    llama = LlamaForCausalLM(llama_config(model))
    llama.load_state_dict(llama_weights(model), assign=True)
    return llama.to(model.lm_head.weight.device).eval()  # the rotary's own buffers; the weights are there


def write_llama(model: StandaloneModel, folder: Path) -> None:
    """Write `as_llama` and the tokenizer to the new folder `folder`, the config last.

    Raises LongRopeError when the folder has anything in it or cannot be written.
    """
    new_output_folder(folder)
    try:
        with temporary_folder(folder / "checkpoint") as made:
            save_file(llama_weights(model), made / "model.safetensors", metadata={"format": "pt"})
            byte_tokenizer(model.sizes.base_length).save_pretrained(made)
            llama_config(model).to_json_file(made / "config.json")
            move_up(made, last="config.json")
    except (OSError, SafetensorError) as error:
        raise LongRopeError(
            f"cannot write the checkpoint to {folder}: {one_line(error)}", code="output-not-writable"
        ) from error


def byte_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the UTF-8 bytes of the text, id = byte; no BOS, no EOS, no merges."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=model_max_length, clean_up_tokenization_spaces=False
    )


def _byte_symbols() -> list[str]:
    """The character that byte-level tokenizers write for each byte: printable ones as they are, others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(VOCABULARY)]
