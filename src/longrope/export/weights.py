"""The tensors of an export: safetensors files rewritten tensor by tensor, and the fold of an attention factor.

A stacked matrix is the bytes of its parts one after the other, so fusing projections needs neither arithmetic nor
memory; only a tensor that changes is held, one at a time. Format: https://huggingface.co/docs/safetensors

The attention factor m multiplies cosines and sines of queries and keys, so logits of the rotated dimensions scale with
m². Multiplying the queries' weights alone has the same effect in every runtime, whatever the runtime makes of the
config. Dimensions that do not rotate, and layers whose RoPE is not scaled, keep their weights.
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
from longrope.models.checkpoint_files import INDEX, SINGLE, place_file, weight_files
from longrope.rope.geometry import RopeGeometry, head_dim_of, scaled_layer_type
from longrope.storage import read_json, write_json_atomic

Change = Callable[[Tensor], Tensor]
"""A function of one tensor in float64 that keeps its shape; the result is rounded to the stored dtype once."""

REWRITTEN = "rewritten"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 2**24  # bytes copied at once


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of one tensor's bytes: `start` to `end` in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """The tensors of a new checkpoint, made from those of a stored one."""

    parts: Mapping[str, Sequence[str]]
    """New tensor -> the stored tensors that are stacked into it on the first axis."""
    changes: Mapping[str, Change]
    """Stored tensor -> the change of its values before it is stacked."""


def stored_tensors(source: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in the folder `source`, in the order of its files.

    Raises LongRopeError (`damaged-file`) when a file is damaged or cut off, or two hold the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    for name in weight_files(source):
        for tensor, stored in _header(source / name).items():
            if tensor in found:
                raise LongRopeError(
                    f"{source} holds {tensor} twice, in {found[tensor].file.name} and {name}", code="damaged-file"
                )
            found[tensor] = stored
    return found


def rewrite(source: Path, folder: Path, plan: WeightPlan, *, copy: bool = False) -> str:
    """Write the tensors of `plan` to `folder`, in as many files as the checkpoint `source` has, dtypes unchanged.

    A stacked tensor goes to the file of its first part. A file in which nothing changes is placed as `place_weights`
    does. Returns how the files came there: REWRITTEN, and the answers of `place_weights`.

    Raises LongRopeError (`unsupported-model`) when parts do not fit each other, or a tensor to be changed does not hold
    floating point numbers.
    """
    tensors = stored_tensors(source)
    places: dict[Path, list[str]] = {}
    for name, parts in plan.parts.items():
        places.setdefault(tensors[parts[0]].file, []).append(name)
    stored: dict[Path, set[str]] = {}
    for name, tensor in tensors.items():
        stored.setdefault(tensor.file, set()).add(name)
    how = set()
    for file, names in places.items():
        if set(names) == stored[file] and all(plan.parts[n] == (n,) and n not in plan.changes for n in names):
            how.add(place_file(file, folder, copy=copy))
            continue
        how.add(REWRITTEN)
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
        raise LongRopeError(
            f"expected the weights of {source} in {SINGLE}; found {sorted(map(str, places))}", code="damaged-file"
        )
    return " and ".join(sorted(how))


def _write(path: Path, entries: Sequence[tuple[str, Sequence[StoredTensor]]], plan: WeightPlan) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, parts in entries:
        size = sum(part.end - part.start for part in parts)
        header[name] = {
            "dtype": parts[0].dtype,
            "shape": _stacked_shape(name, parts),
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


def _stacked_shape(name: str, parts: Sequence[StoredTensor]) -> list[int]:
    first = parts[0]
    if any(part.dtype != first.dtype or part.shape[1:] != first.shape[1:] for part in parts):
        found = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
        raise LongRopeError(
            f"expected parts of one dtype and width to stack into {name}; found {found}", code="unsupported-model"
        )
    if len(parts) == 1:
        return list(first.shape)
    return [sum(part.shape[0] for part in parts), *first.shape[1:]]


def _content(name: str, part: StoredTensor, change: Change | None) -> Iterable[bytes]:
    with part.file.open("rb") as file:
        file.seek(part.start)
        if change is None:
            yield from pieces_of(file, part.end - part.start)
            return
        if part.dtype not in _DTYPES:
            raise LongRopeError(
                f"expected floating point numbers in {name}, found {part.dtype}; it cannot be changed",
                code="unsupported-model",
            )
        data = bytearray(file.read(part.end - part.start))
    tensor = torch.frombuffer(data, dtype=_DTYPES[part.dtype]).reshape(part.shape)
    changed = change(tensor.double()).to(tensor.dtype).contiguous()
    yield changed.reshape(-1).view(torch.uint8).numpy().tobytes()


def pieces_of(file: BinaryIO, size: int) -> Iterable[bytes]:
    """Read the next `size` bytes of `file` in pieces. Raises LongRopeError (`damaged-file`) where it ends before."""
    while size:
        piece = file.read(min(size, _PIECE))
        if not piece:
            raise LongRopeError(f"{file.name} ends too early", code="damaged-file", hint="give a complete file")
        size -= len(piece)
        yield piece


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; the offsets in it count from the end of the header."""
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
            found[name] = StoredTensor(path, str(entry["dtype"]), tuple(map(int, entry["shape"])), start, end)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        reason = " ".join(str(error).split())
        raise LongRopeError(f"{path} is no complete safetensors file: {reason}", code="damaged-file") from error
    return dict(sorted(found.items(), key=lambda item: item[1].start))


# Family -> the tensor whose first num_heads·head_dim rows make the queries, and the number that the family's norm adds
# to its weight before multiplying. A norm's weight holds one head, or all of them.
_FAMILIES: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma", "gemma2"), ("q_proj", 0.0)),
    **dict.fromkeys(("granite", "granitemoe", "starcoder2", "cohere", "stablelm", "glm"), ("q_proj", 0.0)),
    **dict.fromkeys(("smollm3", "phi"), ("q_proj", 0.0)),
    "phi3": ("qkv_proj", 0.0),
    **dict.fromkeys(("qwen3", "qwen3_moe", "olmo2", "olmo3"), ("q_norm", 0.0)),
    "gemma3_text": ("q_norm", 1.0),
}
_NO_FOLD = "leave out `fold_attention_factor`"
_NORMS = re.compile(r"\.self_attn\.(q_norm|q_layernorm|query_layernorm)\.")


def fold_changes(
    config: Any, geometry: RopeGeometry, tensors: Mapping[str, StoredTensor], query_scale: float
) -> dict[str, Change]:
    """Tensor name -> the change that multiplies the rotated queries of every scaled layer by `query_scale`.

    Raises LongRopeError (`unsupported-model`) for a family whose queries are not known, or a tensor that is missing.
    """
    family = getattr(config, "model_type", None)
    if family not in _FAMILIES:
        raise LongRopeError(
            f"cannot fold the attention factor into {family or type(config).__name__}: its queries are known for "
            f"{', '.join(sorted(_FAMILIES))}",
            code="unsupported-model",
            hint=_NO_FOLD,
        )
    module, offset = _FAMILIES[family]
    normed = [name for name in tensors if _NORMS.search(name)]
    if module != "q_norm" and normed:  # the norm would undo what is done before it
        raise LongRopeError(
            f"cannot fold the attention factor into this {family}: its queries are normalised after the projection "
            f"({normed[0]})",
            code="unsupported-model",
            hint=_NO_FOLD,
        )
    heads = int(config.num_attention_heads)
    head_dim = head_dim_of(config)

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
            raise LongRopeError(
                f"cannot fold the attention factor: expected {names[0]} in the checkpoint, found none",
                code="unsupported-model",
                hint=_NO_FOLD,
            )
        changes |= {name: change for name in names if name in tensors}
    return changes


def _scaled_layers(config: Any) -> list[int]:
    """The layers whose RoPE is rescaled: neither those of another layer type, nor those without RoPE."""
    layers = range(int(config.num_hidden_layers))
    if (scaled := scaled_layer_type(config)) is not None:
        return [layer for layer in layers if config.layer_types[layer] == scaled]
    rotates = getattr(config, "no_rope_layers", None) or [1] * len(layers)  # smollm3: 1 where a layer has RoPE
    return [layer for layer in layers if rotates[layer]]
