"""Low-rank training through `peft`: all linear layers get updates, embeddings and norms are trained in full."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.train.config import LoraConfig


def with_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> Any:
    """Wrap `model` in a `PeftModel` whose updates are drawn from `seed`.

    Raises LongRopeError where peft is not installed.
    """
    try:
        peft: Any = import_module("peft")
    except ImportError as error:
        raise LongRopeError(
            "LoRA needs peft, which is not installed", code="missing-dependency", hint='pip install "longrope[train]"'
        ) from error
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear",
        modules_to_save=trained_in_full(model),
        ensure_weight_tying=bool(model.config.get_text_config().tie_word_embeddings),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft (0.21.2, the newest) reads a property that transformers has renamed; its value is the same.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, config)


def require_low_rank(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Raise LongRopeError for a rank above that of every linear layer: its updates would be larger than the weights."""
    ranks = [min(part.in_features, part.out_features) for part in model.modules() if isinstance(part, nn.Linear)]
    if ranks and lora.rank > max(ranks):
        raise LongRopeError(
            f"expected a rank of `lora` of at most {max(ranks)}, that of the largest layer; found {lora.rank}",
            code="invalid-setting",
            hint="give a smaller one (8 to 64 are usual), or train all weights",
        )


def trained_in_full(model: PreTrainedModel) -> list[str]:
    """The last part of the name of the token embedding and of every norm."""
    embedding = model.get_input_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module is embedding or (type(module).__name__.endswith("Norm") and not isinstance(module, nn.ModuleList))
    }
    return sorted(names)
