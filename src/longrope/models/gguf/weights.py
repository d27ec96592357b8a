"""The weights in a GGUF file, dequantised by transformers' own GGUF loading, and checked to be all of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from io import StringIO
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import is_progress_bar_enabled

from longrope.errors import LongRopeError, one_line
from longrope.models.gguf.container import GgufFile, alone, gguf_package
from longrope.models.gguf.rope import LONG_FACTORS, ROPE_FREQS, SHORT_FACTORS

_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""The ggml types that are no blocks -> the dtype of torch."""
_NO_WEIGHTS = (LONG_FACTORS, SHORT_FACTORS, ROPE_FREQS)


def stored_dtype(file: GgufFile) -> torch.dtype:
    """The dtype that holds the file's matrices without rounding: their own, or float32 where they are quantised."""
    kinds = {tensor.type for tensor in file.tensors.values() if len(tensor.dims) > 1}
    return _FLOATS.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def is_quantised(file: GgufFile) -> bool:
    """True if some of the file's tensors are blocks of rounded numbers."""
    return any(tensor.type not in _FLOATS for tensor in file.tensors.values())


def load_gguf_weights(
    file: GgufFile, config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """The model of `config` with the weights of `file`, dequantised once to `dtype`, on the CPU.

    It is a plain model: transformers' record of the file's quantisation is taken off, so it can be saved and trained.
    Raises LongRopeError before anything is allocated when a tensor is missing, unknown or of another shape.
    """
    check_tensors(file, config)
    try:
        with alone(file.path) as place, _as_quiet_as_transformers():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                **place,
                config=config,
                quantization_config=_dequantised(),
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
            )
    except Exception as error:  # transformers raises many kinds of error
        raise LongRopeError(
            f"cannot load the weights of {file.path}: {one_line(error)}", code="unsupported-gguf"
        ) from error
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    model.name_or_path = model.config.name_or_path = str(file.path)
    if file.value("general.architecture") == "llama" and "llama.attention.head_count_kv" not in file.keys:
        _undo_permutation(model)
    return model


def _dequantised() -> Any:
    """The setting by which transformers dequantises; None for releases that always do."""
    config = getattr(transformers, "GgufConfig", None)
    return None if config is None else config(dequantize=True)


def _as_quiet_as_transformers() -> AbstractContextManager[Any]:
    """Hides the progress bar of dequantising, which no setting turns off, where transformers shows none."""
    return nullcontext() if is_progress_bar_enabled() else redirect_stderr(StringIO())


def check_tensors(file: GgufFile, config: PreTrainedConfig) -> None:
    """Raise LongRopeError unless the tensors of `file` are those of the model of `config`, each of its shape.

    transformers passes over a tensor that it has no place for, such as a bias, and says nothing.
    """
    expected = {name: tuple(reversed(shape)) for name, shape in _expected(file, config).items()}
    for name, dims in expected.items():
        found = file.tensors.get(name)
        if found is None:
            raise LongRopeError(
                f"the GGUF file {file.path} lacks the tensor {name}", code="damaged-file", hint="give a complete one"
            )
        if found.dims != dims:
            raise LongRopeError(
                f"the GGUF file {file.path} is damaged: expected {name} of {dims} elements by its keys, found "
                f"{found.dims}",
                code="damaged-file",
            )
    for name in file.tensors:
        if name not in expected and name not in _NO_WEIGHTS and ".attn_rot_embd" not in name:
            raise LongRopeError(
                f"cannot open the GGUF file {file.path}: transformers' {config.model_type} has no place for its tensor "
                f"{name}",
                code="unsupported-model",
            )


def _expected(file: GgufFile, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the model by its name in GGUF; the model is built without its numbers."""
    gguf = gguf_package()
    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names: Any = gguf.get_tensor_name_map(architectures[file.value("general.architecture")], config.num_hidden_layers)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    shapes = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise LongRopeError(
                f"cannot open the GGUF file {file.path}: llama.cpp has no tensor for {name} of {config.model_type}",
                code="unsupported-model",
            )
        shapes[found] = tuple(weight.shape)
    return shapes


def _undo_permutation(model: PreTrainedModel) -> None:
    """Bring the rows of queries and keys into transformers' order.

    transformers does so itself, but for a Llama file that does not say how many heads have keys.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        if ".q_proj." in name or ".k_proj." in name:
            heads = config.num_attention_heads  # as many as have keys, where the file does not say
            pairs: Tensor = parameter.data.reshape(heads, -1, 2, *parameter.shape[1:])  # heads, pair, half, …
            parameter.data = pairs.transpose(1, 2).reshape(parameter.shape)
