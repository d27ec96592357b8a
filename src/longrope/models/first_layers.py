"""The first layers of a model as a model of its own, small enough to load twice where the whole is too large for it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig

from longrope.rope.geometry import text_config

_LEAST = 2


def first_layers(config: PreTrainedConfig) -> tuple[PreTrainedConfig, int]:
    """A copy of `config` with its first layers only, and their number.

    There are at least two, and as many as it takes to have one of every kind that the config tells apart by lists of a
    value for each layer (`layer_types`, `no_rope_layers`, …). A checkpoint loads into it; its other layers are passed
    over.
    """
    short = deepcopy(config)
    text: Any = text_config(short)
    layers = int(text.num_hidden_layers)
    by_layer = {
        name: list(value)
        for name, value in vars(text).items()
        if isinstance(value, list | tuple) and len(value) == layers and layers > 1
    }
    count = min(_LEAST, layers)
    for values in by_layer.values():
        firsts = [index for index, value in enumerate(values) if value not in values[:index]]
        if len(firsts) < layers:  # else every layer has a value of its own, which is no kind
            count = max(count, firsts[-1] + 1)
    text.num_hidden_layers = count
    for name, values in by_layer.items():
        setattr(text, name, values[:count])
    return short, count
