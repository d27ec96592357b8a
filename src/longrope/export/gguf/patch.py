"""An existing GGUF file, of any quantisation, with the keys and factors of a scaling added to it.

The bytes of every other tensor are copied in pieces, never decoded: a file of any size needs a few megabytes of memory,
and number types and quantisations that are newer than this code pass through.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from longrope.export.gguf.keys import GgufKeys, GgufTensors
from longrope.export.weights import pieces_of
from longrope.models.gguf.container import F32, MAGIC, SCALARS, STRING, GgufFile, padded
from longrope.models.gguf.rope import LONG_FACTORS, ROPE_FREQS, SHORT_FACTORS

# `finetuned` stays: Granite's graph takes it as the switch of its RoPE.
_KEPT_ROPE_KEYS = ("rope.scaling.finetuned",)


def write_patched(source: GgufFile, out: BinaryIO, architecture: str, keys: GgufKeys, tensors: GgufTensors) -> None:
    """Write `source` to `out` with `keys` and `tensors` in place of its own scaling of the rotary embedding.

    The keys under `rope.scaling.` and the source's own factors (Llama 3's `rope_freqs` too) are left out: llama.cpp
    refuses a file with a tensor that it does not use. Raises LongRopeError (`damaged-file`) when `source` shrinks.
    """
    kept_keys = {name: key for name, key in source.keys.items() if name not in keys and not _scales(name, architecture)}
    dropped = {LONG_FACTORS, SHORT_FACTORS, ROPE_FREQS, *tensors}
    kept = {name: tensor for name, tensor in source.tensors.items() if name not in dropped}

    out.write(MAGIC + struct.pack("<IQQ", source.version, len(kept) + len(tensors), len(kept_keys) + len(keys)))
    with source.path.open("rb") as data:
        for key in kept_keys.values():
            data.seek(key.start)
            out.writelines(pieces_of(data, key.end - key.start))
        for name, (kind, value) in keys.items():
            out.write(_string(name) + struct.pack("<I", kind) + _value(kind, value))
        offset = 0
        for name, tensor in kept.items():
            out.write(_tensor_info(name, tensor.dims, tensor.type, offset))
            offset += padded(tensor.size, source.alignment)
        for name, array in tensors.items():
            out.write(_tensor_info(name, array.shape, F32, offset))
            offset += padded(array.nbytes, source.alignment)
        _pad(out, source.alignment)
        for tensor in kept.values():
            data.seek(tensor.start)
            out.writelines(pieces_of(data, tensor.size))
            _pad(out, source.alignment)
    for array in tensors.values():
        out.write(array.astype("<f4").tobytes())
        _pad(out, source.alignment)


def _scales(key: str, architecture: str) -> bool:
    """True if `key` states a scaling of the RoPE."""
    name = key.removeprefix(f"{architecture}.")
    return name == "rope.scale_linear" or (name.startswith("rope.scaling.") and name not in _KEPT_ROPE_KEYS)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")  # as it was read
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: int | float | str) -> bytes:
    return _string(str(value)) if kind == STRING else struct.pack("<" + SCALARS[kind], value)


def _tensor_info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _pad(out: BinaryIO, alignment: int) -> None:
    at = out.tell()
    out.write(bytes(padded(at, alignment) - at))
