"""The rotary embedding that a GGUF file states in its keys and tensors.

The source of every rule is llama.cpp's `llama-model.cpp`, `llama-context.cpp` and the graphs in `src/models/`; the
tests run the build that xllamacpp 2026.10.11549 carries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope.checks import LARGEST_FACTOR
from longrope.errors import LongRopeError
from longrope.models.gguf.container import F32, GgufFile, read_gguf
from longrope.rope.geometry import LARGEST_DIM
from longrope.rope.scaling import RopeScaling

LONG_FACTORS, SHORT_FACTORS, ROPE_FREQS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
SCALING_KEY = "longrope.scaling"  # our own: the scaling.json that was exported; llama.cpp passes over it
_DEFAULT_BASE = 10_000.0  # llama.cpp's, where rope.freq_base is absent

CONTEXT_STEP = 256
"""llama.cpp rounds the size of a context up to a multiple of this."""

GRAPHS = ("llama", "mistral3", "phi3", "phimoe", "minicpm", "minicpm3", "granite", "granitemoe", "deci", "apertus")
"""Architectures whose graph turns queries and keys by one of the two sets of factors, in all layers alike.

The tests run llama, mistral3, minicpm, granite, granitemoe and deci; the others' graphs were read."""

# Architectures that one would expect in the list, because llama.cpp loads factors for them, and why they are not.
_WHY_NOT = {
    "refact": "it loads factors, but its graph has no RoPE",
    "pangu-embedded": "it loads factors, but its graph gives none to the RoPE",
    "step35": "its layers differ in rotary dimension, and those with a sliding window take no factors",
}


def short_context(original_length: int) -> int:
    """The largest context, in tokens, that takes the short factors of a file whose L is `original_length`; 0: none.

    llama.cpp rounds the size of a context up before it compares it with L.
    """
    return original_length // CONTEXT_STEP * CONTEXT_STEP


def check_architecture(architecture: str) -> None:
    """Raise LongRopeError (`unsupported-model`) when llama.cpp's graph of `architecture` does not apply the factors."""
    if architecture not in GRAPHS:
        reason = _WHY_NOT.get(architecture, "its graph gives its RoPE no factors, or not in every layer")
        raise LongRopeError(
            f"llama.cpp cannot apply LongRoPE to the architecture {architecture!r}: {reason}; it can to "
            f"{', '.join(GRAPHS)}",
            code="unsupported-model",
            hint="use `target=hf` and serve the folder with another runtime",
        )


@dataclass(frozen=True, slots=True)
class GgufRope:
    """The rotary embedding that a GGUF file states; a field is None where the file says nothing."""

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
    """`rope.scaling.factor`, in old files `rope.scale_linear`: a linear scale of all positions on top of the factors;
    exports never write it."""
    short_factors: tuple[float, ...] | None
    long_factors: tuple[float, ...] | None
    rope_freqs: tuple[float, ...] | None
    """A single set of factors for all lengths (Llama 3); where present and loaded, the two sets above are not used."""
    scaling: RopeScaling | None
    """The scaling that longrope exported into this file, which the numbers above should express."""


def read_gguf_rope(path: Path) -> GgufRope:
    """Read the rotary embedding of the GGUF file `path`.

    Raises LongRopeError when it is no GGUF file, is truncated or damaged, or states no architecture.
    """
    return rope_of(read_gguf(path))


def rope_of(file: GgufFile) -> GgufRope:
    """The rotary embedding of a file whose container was read; raises as `read_gguf_rope` does."""
    architecture = file.value("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise LongRopeError(
            f"{file.path} states no general.architecture; it is not the GGUF of a language model",
            code="unsupported-gguf",
        )

    def stated(name: str) -> Any:
        return file.value(f"{architecture}.{name}")

    attention_factor, factor, base, linear = (
        _number(file, f"{architecture}.rope.{name}")
        for name in ("scaling.attn_factor", "scaling.factor", "freq_base", "scale_linear")
    )
    for name, given in (("scaling.factor", factor), ("scale_linear", linear)):
        if given is not None and abs(given) > LARGEST_FACTOR:
            raise LongRopeError(
                f"{file.path}: expected {architecture}.rope.{name} of at most {LARGEST_FACTOR:g}, found {given:g}",
                code="damaged-file",
            )
    exported = file.value(SCALING_KEY)
    return GgufRope(
        path=file.path,
        architecture=architecture,
        context_length=_tokens(file, f"{architecture}.context_length"),
        rotary_dim=_rotary_dim(file, architecture),
        freq_base=_DEFAULT_BASE if base is None else base,
        scaling_type=stated("rope.scaling.type"),
        original_context_length=_tokens(file, f"{architecture}.rope.scaling.original_context_length"),
        attention_factor=attention_factor,
        factor=linear if factor is None else factor,
        short_factors=_factors(file, SHORT_FACTORS),
        long_factors=_factors(file, LONG_FACTORS),
        rope_freqs=_factors(file, ROPE_FREQS),
        scaling=None if exported is None else RopeScaling.from_json(str(exported), f"{SCALING_KEY} of {file.path}"),
    )


def _number(file: GgufFile, name: str) -> float | None:
    """A number, None where the file lacks it. Raises LongRopeError (`damaged-file`) where it is something else."""
    value = file.value(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LongRopeError(f"{file.path}: expected a number as {name}, found {value!r}", code="damaged-file")
    return float(value)


def _tokens(file: GgufFile, name: str) -> int | None:
    """A length, None where the file lacks it. Raises LongRopeError (`damaged-file`) where it is something else."""
    value = file.value(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise LongRopeError(f"{file.path}: expected tokens as {name}, found {value!r}", code="damaged-file")
    return value


def _rotary_dim(file: GgufFile, architecture: str) -> int | None:
    """`rope.dimension_count`, else the head's dimension; None where neither is stated.

    Raises LongRopeError (`damaged-file`) where it is larger than any model's.
    """
    names = ("rope.dimension_count", "attention.key_length", "embedding_length", "attention.head_count")
    stated = {name: file.value(f"{architecture}.{name}") for name in names}
    size: int | None = next((stated[name] for name in names[:2] if isinstance(stated[name], int)), None)
    if size is None:
        width, heads = (stated[name] for name in names[2:])
        size = width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
    if size is not None and size > LARGEST_DIM:
        raise LongRopeError(
            f"{file.path}: expected at most {LARGEST_DIM} rotary dimensions by {architecture}.rope.dimension_count or "
            f"{architecture}.attention.key_length, found {size}",
            code="damaged-file",
        )
    return size


def _factors(file: GgufFile, name: str) -> tuple[float, ...] | None:
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type != F32:
        raise LongRopeError(
            f"expected {name} of {file.path} in float32, found ggml type {tensor.type}", code="unsupported-gguf"
        )
    with file.path.open("rb") as data:
        data.seek(tensor.start)
        return tuple(np.frombuffer(data.read(tensor.size), dtype="<f4").astype(float).tolist())
