"""The container of a GGUF file: where its keys and tensors lie, found without loading any of them.

Not a reader of weights. The `gguf` package's own reader builds an object for every string of the vocabulary: 9 s and
0.7 GB for one of 128,000 tokens; here only byte ranges are kept, so a file can be copied with a few keys changed and
every other byte as it was. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

What a GGUF file says about its rotary embedding: the keys and factors that llama.cpp reads. Nothing is written.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope.errors import LongRopeError, one_line
from longrope.rope.scaling import RopeScaling

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types of fixed size -> their code in `struct`."""
F32 = 0
_READABLE = (2, 3)  # version 1 had 32-bit counts; llama.cpp reads 2 and 3
_MOST_DIMS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True, slots=True)
class Key:
    """One key with its value: a number, a bool or a string; None for an array, whose items are not read."""

    type: int
    value: Any
    start: int
    end: int
    """Byte range of the whole record: name, type and value."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: dims as GGUF counts them (the fastest first), its ggml type, and the byte range of its data."""

    dims: tuple[int, ...]
    type: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Keys and tensors of one file, in its order."""

    path: Path
    version: int
    keys: dict[str, Key]
    tensors: dict[str, TensorInfo]
    alignment: int

    def value(self, name: str, default: Any = None) -> Any:
        """The value of a key that is no array, or `default` where the file lacks it."""
        return self.keys[name].value if name in self.keys else default


def read_gguf(path: Path) -> GgufFile:
    """The container of `path`.

    Raises LongRopeError when it is no GGUF file, is truncated, big-endian, of version 1, or one part of several.
    """
    sizes = _type_sizes()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != MAGIC:
                raise LongRopeError(f"expected a GGUF file, found another kind of file at {path}")
            found = _parse(path, data, sizes)
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        raise LongRopeError(f"cannot read the GGUF file {path}: {one_line(error)}") from error
    except struct.error as error:
        raise LongRopeError(f"the GGUF file {path} is truncated: it ends inside its header; fetch it again") from error
    if int(found.value("split.count", 1)) > 1:
        raise LongRopeError(f"{path} is one part of several; join them with llama.cpp's llama-gguf-split --merge first")
    return found


class _Cursor:
    """A place in the bytes that moves as values are read. Past the end, `struct.error` is raised."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def skip(self, size: int) -> int:
        """Move by `size` bytes; the place before."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise struct.error("past the end")
        return start

    def string(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        return self.data[start : start + size].decode("utf-8", "surrogateescape")


def _parse(path: Path, data: mmap.mmap, sizes: dict[int, tuple[int, int]]) -> GgufFile:
    cursor = _Cursor(data)
    cursor.skip(len(MAGIC))
    version = cursor.number("I")
    if version not in _READABLE:
        found = "a big-endian file" if version and version & 0xFFFF == 0 else f"version {version}"
        raise LongRopeError(f"expected little-endian GGUF of version 2 or 3, found {found} in {path}; convert it again")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    keys: dict[str, Key] = {}
    for _ in range(key_count):
        start = cursor.at
        name, kind = cursor.string(), cursor.number("I")
        keys[name] = Key(kind, _value(path, cursor, kind), start, cursor.at)
    infos = []
    for _ in range(tensor_count):
        name, rank = cursor.string(), cursor.number("I")
        if rank > _MOST_DIMS:
            raise LongRopeError(f"the GGUF file {path} is damaged: a tensor with {rank} dimensions; fetch it again")
        dims = tuple(cursor.number("Q") for _ in range(rank))
        infos.append((name, dims, cursor.number("I"), cursor.number("Q")))
    alignment = keys[ALIGNMENT_KEY].value if ALIGNMENT_KEY in keys else ALIGNMENT
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise LongRopeError(f"the GGUF file {path} is damaged: {ALIGNMENT_KEY} {alignment!r}; fetch it again")
    base = padded(cursor.at, alignment)
    tensors: dict[str, TensorInfo] = {}
    for name, dims, kind, offset in infos:
        if kind not in sizes:
            raise LongRopeError(f"{path}: tensor {name!r} has ggml type {kind}; a newer gguf package may know it")
        block, size = sizes[kind]
        tensors[name] = TensorInfo(dims, kind, base + offset, math.prod(dims) // block * size)
    end = max((tensor.start + tensor.size for tensor in tensors.values()), default=cursor.at)
    if end > len(data):
        raise LongRopeError(
            f"the GGUF file {path} is truncated: its tensors need {end} bytes, it has {len(data)}; fetch it again"
        )
    if len(keys) != key_count or len(tensors) != tensor_count:
        raise LongRopeError(f"the GGUF file {path} is damaged: it has a name twice; fetch it again")
    return GgufFile(path, version, keys, tensors, alignment)


def _value(path: Path, cursor: _Cursor, kind: int) -> Any:
    """Read a value of type `kind`, or step over it when it is an array."""
    if kind in SCALARS:
        return cursor.number(SCALARS[kind])
    if kind == STRING:
        return cursor.string()
    if kind != ARRAY:
        raise LongRopeError(f"the GGUF file {path} is damaged: a value of type {kind}; fetch it again")
    item, count = cursor.number("I"), cursor.number("Q")
    if item in SCALARS:
        cursor.skip(count * struct.calcsize("<" + SCALARS[item]))
    elif item == STRING:
        for _ in range(count):
            cursor.skip(cursor.number("Q"))
    else:
        raise LongRopeError(f"the GGUF file {path} is damaged: an array of type {item}; fetch it again")
    return None


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def _type_sizes() -> dict[int, tuple[int, int]]:
    """ggml type -> elements and bytes of one block."""
    return {int(kind): size for kind, size in gguf_package().GGML_QUANT_SIZES.items()}


def gguf_package() -> Any:
    """The optional `gguf` package. Raises LongRopeError when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise LongRopeError(
            'GGUF files need the gguf package; install it with: pip install "longrope[gguf]"'
        ) from error
    return gguf


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
