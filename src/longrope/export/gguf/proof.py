"""The proof of a GGUF file: read back, it states the scaling, and its other tensors are those it was made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longrope.errors import LongRopeError
from longrope.export.weights import pieces_of
from longrope.models.gguf.container import GgufFile, read_gguf
from longrope.models.gguf.rope import LONG_FACTORS, ROPE_FREQS, SHORT_FACTORS, rope_of
from longrope.rope.scaling import RopeScaling

_TOLERANCE = 1e-6  # relative; float32 factors are off by up to 6e-8
_OF_THE_ROPE = frozenset({LONG_FACTORS, SHORT_FACTORS, ROPE_FREQS})


def prove(path: Path, expressed: RopeScaling, source: GgufFile | None) -> str:
    """Read the file at `path` and compare it with the scaling of two windows, and with `source` where it was copied.

    Returns the proof in words. Raises LongRopeError (`differs`) where a factor, a length, the attention factor or the
    bytes of a copied tensor differ.
    """
    file = read_gguf(path)
    rope, (short, long) = rope_of(file), expressed.windows
    stated = {
        "original context length": (rope.original_context_length, short.max_length),
        "context length": (rope.context_length, long.max_length),
        "attention factor": (rope.attention_factor or 1.0, long.attention_factor),
        "number of short factors": (len(rope.short_factors or ()), len(short.factors)),
        "number of long factors": (len(rope.long_factors or ()), len(long.factors)),
    }
    for name, (found, wanted) in stated.items():
        if found is None or abs(found / wanted - 1.0) > _TOLERANCE:
            raise LongRopeError(f"the file reads back with {name} {found} instead of {wanted}", code="differs")
    pairs = ((rope.short_factors, short.factors), (rope.long_factors, long.factors))
    error = max(float(np.abs(np.divide(found or (), wanted) - 1.0).max()) for found, wanted in pairs)
    if error > _TOLERANCE:
        raise LongRopeError(f"the factors read back differ by {error:.1e} from the scaling's", code="differs")
    says = f"read back, factors equal to {error:.1e}, windows to {short.max_length} and {long.max_length} tokens"
    if source is None:
        return f"{says}, {len(file.tensors)} tensors complete"
    copied = [name for name in source.tensors if name not in _OF_THE_ROPE]
    for name in copied:
        if name not in file.tensors or not _same_bytes(source, file, name):
            raise LongRopeError(f"the tensor {name} reads back with other bytes than in {source.path}", code="differs")
    return f"{says}, {len(copied)} tensors equal byte for byte to those of {source.path.name}"


def _same_bytes(first: GgufFile, second: GgufFile, name: str) -> bool:
    one, other = first.tensors[name], second.tensors[name]
    if (one.dims, one.type, one.size) != (other.dims, other.type, other.size):
        return False
    with first.path.open("rb") as mine, second.path.open("rb") as theirs:
        mine.seek(one.start)
        theirs.seek(other.start)
        return all(a == b for a, b in zip(pieces_of(mine, one.size), pieces_of(theirs, other.size), strict=True))
