"""What a GGUF file says about its rotary embedding: the keys and factors that llama.cpp reads. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope.errors import LongRopeError
from longrope.export.gguf_file import F32, GgufFile, read_gguf
from longrope.rope.scaling import RopeScaling

LONG_FACTORS, SHORT_FACTORS, ROPE_FREQS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
SCALING_KEY = "longrope.scaling"  # our own: the scaling.json that was exported; llama.cpp passes over it
DEFAULT_BASE = 10_000.0  # llama.cpp's, where rope.freq_base is absent


@dataclass(frozen=True, slots=True)
class GgufRope:
    """The rotary embedding as the file states it; None where it says nothing."""

    path: Path
    architecture: str
    """`general.architecture`, the prefix of the keys below; it decides which of llama.cpp's graphs runs."""
    context_length: int | None
    """L': llama-server caps a slot's context here."""
    rotary_dim: int | None
    """`rope.dimension_count`, else the head's dimension, as llama.cpp takes it."""
    freq_base: float
    scaling_type: str | None
    original_context_length: int | None
    """The switch: contexts above it take the long factors. llama.cpp takes `context_length` where it is absent."""
    attention_factor: float | None
    """`rope.scaling.attn_factor`: multiplies cosines and sines in both regimes; 1 where absent."""
    factor: float | None
    """`rope.scaling.factor`, a linear scale of all positions on top of the factors; exports never write it."""
    short_factors: tuple[float, ...] | None
    long_factors: tuple[float, ...] | None
    rope_freqs: tuple[float, ...] | None
    """A single set of factors for all lengths (Llama 3); where present and loaded, the two sets above are not used."""
    scaling: RopeScaling | None
    """What was exported into this file, where longrope wrote it: what the numbers above should say."""


def read_gguf_rope(path: Path) -> GgufRope:
    """Read the rotary embedding of the GGUF file `path`.

    Raises LongRopeError when it is no GGUF file, is truncated or damaged, or states no architecture.
    """
    return rope_of(read_gguf(path))


def rope_of(file: GgufFile) -> GgufRope:
    """`read_gguf_rope` for a file that was opened before."""
    architecture = file.value("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise LongRopeError(f"{file.path} states no general.architecture; it is not the GGUF of a language model")

    def stated(name: str) -> Any:
        return file.value(f"{architecture}.{name}")

    attention_factor, factor, base = (
        stated(name) for name in ("rope.scaling.attn_factor", "rope.scaling.factor", "rope.freq_base")
    )
    exported = file.value(SCALING_KEY)
    return GgufRope(
        path=file.path,
        architecture=architecture,
        context_length=stated("context_length"),
        rotary_dim=_rotary_dim(stated),
        freq_base=DEFAULT_BASE if base is None else float(base),
        scaling_type=stated("rope.scaling.type"),
        original_context_length=stated("rope.scaling.original_context_length"),
        attention_factor=None if attention_factor is None else float(attention_factor),
        factor=None if factor is None else float(factor),
        short_factors=_factors(file, SHORT_FACTORS),
        long_factors=_factors(file, LONG_FACTORS),
        rope_freqs=_factors(file, ROPE_FREQS),
        scaling=None if exported is None else RopeScaling.from_json(str(exported), f"{SCALING_KEY} of {file.path}"),
    )


def _rotary_dim(stated: Any) -> int | None:
    for name in ("rope.dimension_count", "attention.key_length"):
        if isinstance(stated(name), int):
            return int(stated(name))
    width, heads = stated("embedding_length"), stated("attention.head_count")
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def _factors(file: GgufFile, name: str) -> tuple[float, ...] | None:
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type != F32:
        raise LongRopeError(f"expected {name} of {file.path} in float32, found ggml type {tensor.type}")
    with file.path.open("rb") as data:
        data.seek(tensor.start)
        return tuple(np.frombuffer(data.read(tensor.size), dtype="<f4").astype(float).tolist())
