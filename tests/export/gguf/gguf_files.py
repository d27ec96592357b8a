"""GGUF files for tests: a small converted model, and one rewritten by the `gguf` package alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope.export.config import ExportConfig
from longrope.export.export import ExportResult, export_checkpoint
from longrope.export.gguf.convert import write_llama
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from tests.checkpoints import save_checkpoint

gguf = pytest.importorskip("gguf")

GEOMETRY = RopeGeometry(32, 10000.0, 512)
FACTORS = tuple(np.linspace(1.0, 4.5, 16).tolist())
SCALING = RopeScaling.extended(GEOMETRY, 2048, FACTORS, attention_factor=1.125)


def save_model(folder: Path) -> Path:
    """A random Llama with a window of 512 tokens, the model of `GEOMETRY`."""
    return save_checkpoint(folder, max_position_embeddings=512, num_key_value_heads=1)


def export(model: Path | str, scaling: RopeScaling, output: Path, **settings: Any) -> ExportResult:
    """`export_checkpoint` for llama.cpp, with `settings` of its config."""
    return export_checkpoint(model, scaling, output, config=ExportConfig(target="gguf", **settings))


def save_converted(model: Path, path: Path) -> Path:
    """The file of a converter: the model without our scaling, here with Llama 3's factors and YaRN's keys."""
    keys: dict[str, tuple[int, int | float | str]] = {
        "llama.context_length": (4, 512),
        "llama.rope.scaling.type": (8, "yarn"),
        "llama.rope.scaling.factor": (6, 4.0),
        "llama.rope.scaling.finetuned": (7, True),
    }
    write_llama(path, str(model), keys, {"rope_freqs.weight": np.ones(16, np.float32)})
    return path


def rewritten(
    source: Path, out: Path, *, quantise: Any = None, extra: Sequence[Any] = (), alignment: int | None = None
) -> Path:
    """The GGUF `source` with matrices in the type `quantise` and more keys, by the `gguf` package alone."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], items)
    for name, value, kind, *items in extra:
        writer.add_key_value(name, value, kind, *items)
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if quantise is not None and data.ndim == 2:
            writer.add_tensor(tensor.name, gguf.quants.quantize(data, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
