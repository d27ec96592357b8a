"""Safetensors files rewritten tensor by tensor: renamed, stacked or changed, everything else as bytes.

A stacked matrix is the bytes of its parts one after the other, so fusing projections needs no arithmetic and no
memory; only a tensor that is changed is ever held, one at a time. Format: https://huggingface.co/docs/safetensors

Fold an attention factor into the weights: the rows of the query projection, or of the query norm, that rotate.

The attention factor m multiplies cosines and sines of queries and keys, so logits of the rotated dimensions scale with
m². Multiplying only the queries by a number does the same for every runtime, whatever it makes of the config. What is
not rotated, dimensions beyond the rotary ones and layers without RoPE or with one that is not scaled, is not touched.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from longrope.errors import LongRopeError
from longrope.models.checkpoint_files import INDEX, SINGLE, weight_files
from longrope.rope.geometry import FULL_ATTENTION, RopeGeometry, rope_layer_types
from longrope.storage import read_json, write_json_atomic

Change = Callable[[Tensor], Tensor]
"""What happens to one tensor, in float64 and with its shape kept; the result is rounded to the stored dtype once."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 2**24  # bytes copied at once


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the bytes of one tensor lie: `start` to `end` in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rewrite:
    """New tensors: each is its parts stacked on the first axis; `changes` are by the name of the part."""

    parts: Mapping[str, Sequence[str]]
    changes: Mapping[str, Change]


def stored_tensors(source: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, in the order of its files.

    Raises LongRopeError when a file is damaged or cut off, or two hold the same tensor.
    """
    found: dict[str, Stored] = {}
    for name in weight_files(source):
        for tensor, stored in _header(source / name).items():
            if tensor in found:
                raise LongRopeError(f"{source} holds {tensor} twice, in {found[tensor].file.name} and {name}")
            found[tensor] = stored
    return found


def rewrite(source: Path, folder: Path, plan: Rewrite) -> None:
    """Write the tensors of `plan` to `folder`, in as many files as `source` has, dtypes unchanged.

    A stacked tensor goes where its first part was. Raises LongRopeError when parts do not fit each other, or a tensor
    to be changed is not stored as floating point numbers.
    """
    tensors = stored_tensors(source)
    places: dict[Path, list[str]] = {}
    for name, parts in plan.parts.items():
        places.setdefault(tensors[parts[0]].file, []).append(name)
    for file, names in places.items():
        names.sort(key=lambda name: tensors[plan.parts[name][0]].start)
        _write(folder / file.name, [(name, [tensors[part] for part in plan.parts[name]]) for name in names], plan)
    if (source / INDEX).is_file():
        used = {part for parts in plan.parts.values() for part in parts}
        size = sum(tensors[part].end - tensors[part].start for part in used)
        metadata = read_json(source / INDEX).get("metadata")
        index = {
            "metadata": (metadata if isinstance(metadata, dict) else {}) | {"total_size": size},
            "weight_map": {name: file.name for file, names in places.items() for name in names},
        }
        write_json_atomic(folder / INDEX, index)
    elif list(places) != [source / SINGLE]:
        raise LongRopeError(f"expected the weights of {source} in {SINGLE}; found {sorted(map(str, places))}")


def _write(path: Path, entries: Sequence[tuple[str, Sequence[Stored]]], plan: Rewrite) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, parts in entries:
        size = sum(part.end - part.start for part in parts)
        header[name] = {
            "dtype": parts[0].dtype,
            "shape": _stacked(name, parts),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, parts in entries:
            for part_name, part in zip(plan.parts[name], parts, strict=True):
                out.writelines(_content(part_name, part, plan.changes.get(part_name)))


def _stacked(name: str, parts: Sequence[Stored]) -> list[int]:
    first = parts[0]
    if any(part.dtype != first.dtype or part.shape[1:] != first.shape[1:] for part in parts):
        found = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
        raise LongRopeError(f"expected parts of one dtype and width to stack into {name}; found {found}")
    if len(parts) == 1:
        return list(first.shape)
    return [sum(part.shape[0] for part in parts), *first.shape[1:]]


def _content(name: str, part: Stored, change: Change | None) -> Iterable[bytes]:
    with part.file.open("rb") as file:
        file.seek(part.start)
        if change is None:
            yield from _pieces(file, part.end - part.start)
            return
        if part.dtype not in _DTYPES:
            raise LongRopeError(f"expected floating point numbers in {name}, found {part.dtype}; it cannot be changed")
        data = bytearray(file.read(part.end - part.start))
    tensor = torch.frombuffer(data, dtype=_DTYPES[part.dtype]).reshape(part.shape)
    changed = change(tensor.double()).to(tensor.dtype).contiguous()
    yield changed.reshape(-1).view(torch.uint8).numpy().tobytes()


def _pieces(file: BinaryIO, size: int) -> Iterable[bytes]:
    while size:
        piece = file.read(min(size, _PIECE))
        if not piece:
            raise LongRopeError(f"{file.name} ends too early; give a complete file")
        size -= len(piece)
        yield piece


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Offsets in it count from the end of the header."""
    size = path.stat().st_size
    found = {}
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            if not 8 + length <= start <= end <= size:
                raise ValueError(f"{name} lies outside the file, which is cut off")
            found[name] = Stored(path, str(entry["dtype"]), tuple(map(int, entry["shape"])), start, end)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise LongRopeError(f"{path} is no complete safetensors file: {' '.join(str(error).split())}") from error
    return dict(sorted(found.items(), key=lambda item: item[1].start))


# The query's rows are the first num_heads·head_dim of the named tensor; a norm weight is one head, or all of them. The
# number is what the family's norm adds to its weight before multiplying.
_FAMILIES: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma", "gemma2"), ("q_proj", 0.0)),
    **dict.fromkeys(("granite", "granitemoe", "starcoder2", "cohere", "stablelm", "glm"), ("q_proj", 0.0)),
    **dict.fromkeys(("smollm3", "phi"), ("q_proj", 0.0)),
    "phi3": ("qkv_proj", 0.0),
    **dict.fromkeys(("qwen3", "qwen3_moe", "olmo2", "olmo3"), ("q_norm", 0.0)),
    "gemma3_text": ("q_norm", 1.0),
}
_NORMS = re.compile(r"\.self_attn\.(q_norm|q_layernorm|query_layernorm)\.")


def fold_changes(
    config: Any, geometry: RopeGeometry, tensors: Mapping[str, Stored], query_scale: float
) -> dict[str, Change]:
    """By tensor name, what multiplies the rotated queries of every scaled layer by `query_scale`.

    Raises LongRopeError for a family whose queries are elsewhere, and for tensors that are not where they should be.
    """
    family = getattr(config, "model_type", None)
    if family not in _FAMILIES:
        raise LongRopeError(
            f"cannot fold the attention factor into {family or type(config).__name__}: its queries are known for "
            f"{', '.join(sorted(_FAMILIES))}; leave out --fold-attention-factor"
        )
    module, offset = _FAMILIES[family]
    normed = [name for name in tensors if _NORMS.search(name)]
    if module != "q_norm" and normed:  # the norm would undo what is done before it
        raise LongRopeError(
            f"cannot fold the attention factor into this {family}: its queries are normalised after the projection "
            f"({normed[0]}); leave out --fold-attention-factor"
        )
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)

    def change(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        rows = out[: heads * head_dim].view(-1, head_dim, *out.shape[1:])  # (heads or 1, head_dim, …), a view of out
        rotated = rows[:, : geometry.rotary_dim]
        rotated.copy_((rotated + offset) * query_scale - offset)
        return out

    changes: dict[str, Change] = {}
    for layer in _scaled_layers(config):
        names = [f"model.layers.{layer}.self_attn.{module}.{kind}" for kind in ("weight", "bias")]
        if names[0] not in tensors:
            raise LongRopeError(f"cannot fold the attention factor: expected {names[0]} in the checkpoint, found none")
        changes |= {name: change for name in names if name in tensors}
    return changes


def _scaled_layers(config: Any) -> list[int]:
    """The layers whose RoPE is rescaled: not those of another layer type, nor those without RoPE."""
    layers = range(int(config.num_hidden_layers))
    if rope_layer_types(config):
        return [layer for layer in layers if config.layer_types[layer] == FULL_ATTENTION]
    rotates = getattr(config, "no_rope_layers", None) or [1] * len(layers)  # smollm3: 1 where a layer has RoPE
    return [layer for layer in layers if rotates[layer]]
