"""Where the weights of a fine-tuning lie: in main memory, from where the Trainer takes them, or over several GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed import is_torchelastic_launched
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.models.devices import AUTO, is_offloaded, is_spread, too_large
from longrope.models.loading import load_config
from longrope.train.config import FinetuneConfig


def load_options(model: Any, options: LoadOptions, config: FinetuneConfig, kind: str) -> LoadOptions:
    """The options to load `model` with: in main memory, from where the Trainer moves it to its device, a `kind`.

    With the device auto, one process and LoRA, a model that is too large for the device in float32 is loaded there in
    its own dtype, or spread over all GPUs: most of its weights are not trained.
    """
    in_memory = options.replace(device="cpu")
    alone = not is_torchelastic_launched()  # not by torchrun
    if not isinstance(model, str | Path) or options.device != AUTO or config.lora is None or kind == "cpu" or not alone:
        return in_memory
    stated = load_config(str(model), trust_remote_code=options.trust_remote_code)
    dtype = None if options.dtype == "checkpoint" else getattr(torch, options.dtype, torch.float32)
    large = too_large(stated, dtype, torch.device(kind), trust_remote_code=options.trust_remote_code)
    return options if large else in_memory


def require_places(model: PreTrainedModel) -> None:
    """Raise LongRopeError for a model that cannot be trained where a device map has put its weights."""
    if is_offloaded(model):
        raise LongRopeError(
            "training needs every weight on a device; a device map has left some in main memory or on disk",
            code="out-of-memory",
            hint="give `dtype` bfloat16, a quantised model, or use more GPUs",
        )
    if is_spread(model) and is_torchelastic_launched():
        raise LongRopeError(
            "a model that is spread over several devices is trained in one process",
            code="wrong-processes",
            hint="start it without torchrun",
        )
