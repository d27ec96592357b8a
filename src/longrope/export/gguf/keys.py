"""The keys and tensors by which a GGUF file states its rotary embedding, written for a scaling."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from longrope.models.gguf.container import STRING
from longrope.models.gguf.rope import LONG_FACTORS, SCALING_KEY, SHORT_FACTORS
from longrope.provenance import record
from longrope.rope.scaling import RopeScaling

UINT32, FLOAT32 = 4, 6  # GGUF's numbers of these value types

GgufKeys = Mapping[str, tuple[int, int | float | str]]
"""Key -> (GGUF value type, value)."""
GgufTensors = Mapping[str, npt.NDArray[np.float32]]
"""Tensor -> its values."""


def rope_keys(architecture: str, expressed: RopeScaling, given: RopeScaling, unsupported: Sequence[str]) -> GgufKeys:
    """The keys of a scaling of two windows, with the `given` one that it was made from and what it leaves out of it.

    `rope.scaling.factor` must not be among them: llama.cpp would scale all positions by it on top of the factors.
    """
    short, long = expressed.windows
    return {
        f"{architecture}.context_length": (UINT32, long.max_length),
        f"{architecture}.rope.scaling.type": (STRING, "longrope"),
        f"{architecture}.rope.scaling.original_context_length": (UINT32, short.max_length),
        f"{architecture}.rope.scaling.attn_factor": (FLOAT32, long.attention_factor),
        SCALING_KEY: (STRING, given.to_json()),
        "longrope.export": (STRING, json.dumps(record() | {"losses": list(unsupported)}, ensure_ascii=False)),
    }


def rope_tensors(expressed: RopeScaling) -> GgufTensors:
    """The long and the short factors, float32 (D,) each. ggml divides the angles by them, as transformers does."""
    short, long = expressed.windows
    return {LONG_FACTORS: np.asarray(long.factors, dtype="<f4"), SHORT_FACTORS: np.asarray(short.factors, dtype="<f4")}
