"""What llama.cpp reads of a scaling: the keys and the two tensors of factors that a GGUF file must hold.

The source of every rule is llama.cpp's `llama-model.cpp`, `llama-context.cpp` and the graphs in `src/models/`; the
tests run the build that xllamacpp 2026.10.11549 carries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from longrope.errors import LongRopeError
from longrope.export.gguf.container import LONG_FACTORS, SCALING_KEY, SHORT_FACTORS, STRING
from longrope.provenance import record
from longrope.rope.scaling import RopeScaling

UINT32, FLOAT32 = 4, 6  # GGUF's numbers of these value types

CONTEXT_STEP = 256
"""llama.cpp rounds the size of a context up to a multiple of this."""

GRAPHS = (
    "llama",
    "mistral3",
    "phi3",
    "phimoe",
    "minicpm",
    "minicpm3",
    "granite",
    "granitemoe",
    "deci",
    "apertus",
)
"""Architectures whose graph turns queries and keys by one of the two sets of factors, in all layers alike.

The tests run llama, mistral3, minicpm, granite, granitemoe and deci; the others' graphs were read."""

# Named here are those that one would expect in the list, because llama.cpp loads factors for them.
_WHY_NOT = {
    "refact": "it loads factors, but its graph has no RoPE",
    "pangu-embedded": "it loads factors, but its graph gives none to the RoPE",
    "step35": "its layers differ in rotary dimension, and those with a sliding window take no factors",
}


def check_architecture(architecture: str) -> None:
    """Raise LongRopeError when llama.cpp's graph of `architecture` does not apply the two sets of factors."""
    if architecture not in GRAPHS:
        reason = _WHY_NOT.get(architecture, "its graph gives its RoPE no factors, or not in every layer")
        raise LongRopeError(
            f"llama.cpp cannot apply LongRoPE to the architecture {architecture!r}: {reason}; it can to "
            f"{', '.join(GRAPHS)}. Export --to hf and serve with another runtime"
        )


def rope_keys(
    architecture: str, expressed: RopeScaling, given: RopeScaling, losses: Sequence[str]
) -> dict[str, tuple[int, int | float | str]]:
    """Key -> (GGUF value type, value) for a scaling of two windows, and how it came about.

    `rope.scaling.factor` must not be among them: llama.cpp would scale all positions by it on top of the factors.
    """
    short, long = expressed.windows
    keys: dict[str, tuple[int, int | float | str]] = {
        f"{architecture}.context_length": (UINT32, long.max_length),
        f"{architecture}.rope.scaling.type": (STRING, "longrope"),
        f"{architecture}.rope.scaling.original_context_length": (UINT32, short.max_length),
        f"{architecture}.rope.scaling.attn_factor": (FLOAT32, long.attention_factor),
        SCALING_KEY: (STRING, given.to_json()),
        "longrope.export": (STRING, json.dumps(record() | {"losses": list(losses)}, ensure_ascii=False)),
    }
    return keys


def rope_tensors(expressed: RopeScaling) -> dict[str, npt.NDArray[np.float32]]:
    """Name -> factors, float32 (D,). ggml divides the angles by them, as transformers does."""
    short, long = expressed.windows
    return {
        LONG_FACTORS: np.asarray(long.factors, dtype="<f4"),
        SHORT_FACTORS: np.asarray(short.factors, dtype="<f4"),
    }
