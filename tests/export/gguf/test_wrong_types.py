"""Keys of a GGUF file with values of a wrong type or out of range: one line from each verb, never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from tests.conftest import Ran

KINDS = {
    "text": lambda writer, key: writer.add_string(key, "many"),
    "nan": lambda writer, key: writer.add_float32(key, float("nan")),
    "infinity": lambda writer, key: writer.add_float32(key, float("inf")),
    "minus": lambda writer, key: writer.add_int32(key, -7),
    "zero": lambda writer, key: writer.add_uint32(key, 0),
    "largest": lambda writer, key: writer.add_uint64(key, 2**64 - 1),
    "bool": lambda writer, key: writer.add_bool(key, True),
    "list": lambda writer, key: writer.add_array(key, [1, 2, 3]),
    "texts": lambda writer, key: writer.add_array(key, ["a", "b"]),
}
KEYS = (
    "split.count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.block_count",
    "llama.attention.head_count",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.attn_factor",
    "longrope.scaling",
)
SIZES = {"context_length": 512, "embedding_length": 64, "block_count": 2, "attention.head_count": 2}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_another_type(key: str, cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path) -> None:
    geometry = RopeGeometry(rotary_dim=32, base=10000.0, original_length=64)
    RopeScaling.extended(geometry, 128, [1.0] * 8 + [2.0] * 8).save(tmp_path / "scaling.json")
    wrong = []
    for kind, add in KINDS.items():
        path = tmp_path / f"{kind}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for name, value in SIZES.items():
            if f"llama.{name}" != key:
                writer.add_uint32(f"llama.{name}", value)
        add(writer, key)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        export = ("export", checkpoint, "--to", "gguf", "--gguf", path, "-o", tmp_path / "out.gguf")
        for verb in (("doctor", path), ("inspect", path), (*export, "--scaling", tmp_path / "scaling.json")):
            ran = cli(*verb)
            one_line = ran.err.startswith("longrope: error: ") and ran.err.count("\n") == 1
            if ran.code not in (0, 1, 2) or (ran.code == 2 and not one_line) or "unexpected error" in ran.err:
                wrong.append((kind, verb[0], ran.code, ran.err[:300]))
    assert not wrong
