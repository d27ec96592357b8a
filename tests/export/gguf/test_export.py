"""Export to GGUF: what is written, what stays byte for byte, what is refused; read back with the `gguf` package."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from longrope.models.gguf.rope import read_gguf_rope
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from tests.checkpoints import save_checkpoint
from tests.export.gguf.gguf_files import FACTORS, GEOMETRY, SCALING, export, rewritten, save_converted, save_model
from tests.export.sources import refusal

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("gguf") / "model")


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    return save_converted(model, tmp_path_factory.mktemp("gguf") / "converted.gguf")


def value_types():
    """One key of every type that GGUF has."""
    kinds = gguf.GGUFValueType
    numbers = {
        kinds.UINT8: 200,
        kinds.INT8: -5,
        kinds.UINT16: 60000,
        kinds.INT16: -3000,
        kinds.UINT32: 2**32 - 1,
        kinds.INT32: -7,
        kinds.UINT64: 2**63 + 1,
        kinds.INT64: -(2**62),
        kinds.FLOAT32: 0.1,
        kinds.FLOAT64: 0.1,
        kinds.BOOL: True,
        kinds.STRING: "ünï\n\0code",
    }
    singles = [(f"test.{kind.name}", value, kind) for kind, value in numbers.items()]
    lists = [(f"test.{kind.name}s", [value] * 3, kinds.ARRAY, kind) for kind, value in numbers.items()]
    return singles + lists


# Into an existing file.


@pytest.mark.parametrize("quantise", [None, "Q8_0", "Q4_0"])
def test_other_tensors_and_keys_stay_byte_for_byte(quantise, model, converted, tmp_path):
    kind = quantise and gguf.GGMLQuantizationType[quantise]
    before = rewritten(converted, tmp_path / "before.gguf", quantise=kind, extra=value_types())
    original = before.read_bytes()
    export(model, SCALING, tmp_path / "after.gguf", gguf=before)
    assert before.read_bytes() == original
    old, new = gguf.GGUFReader(before), gguf.GGUFReader(tmp_path / "after.gguf")
    tensors = {tensor.name: tensor for tensor in new.tensors}
    kept = [tensor for tensor in old.tensors if tensor.name != "rope_freqs.weight"]
    assert list(tensors) == [tensor.name for tensor in kept] + ["rope_factors_long.weight", "rope_factors_short.weight"]
    for tensor in kept:
        found = tensors[tensor.name]
        assert (found.tensor_type, found.shape.tolist()) == (tensor.tensor_type, tensor.shape.tolist())
        assert found.data.tobytes() == tensor.data.tobytes()
        assert found.data_offset % 32 == 0
    # Exactly these keys change; all others, of every type, are the same bytes.
    replaced = {"llama.context_length", "llama.rope.scaling.type"}
    gone = {"llama.rope.scaling.factor"}
    added = {
        "llama.rope.scaling.original_context_length",
        "llama.rope.scaling.attn_factor",
        "longrope.scaling",
        "longrope.export",
    }
    names = [{name for name in reader.fields if not name.startswith("GGUF.")} for reader in (old, new)]
    assert names[0] - names[1] == gone
    assert names[1] - names[0] == added
    for name in names[0] - gone - replaced:
        assert raw_bytes(old.fields[name]) == raw_bytes(new.fields[name])


def raw_bytes(field):
    return b"".join(part.tobytes() for part in field.parts)


def test_an_alignment_of_its_own_is_kept(model, converted, tmp_path):
    before = rewritten(converted, tmp_path / "before.gguf", alignment=128)
    export(model, SCALING, tmp_path / "after.gguf", gguf=before)
    old, new = gguf.GGUFReader(before), gguf.GGUFReader(tmp_path / "after.gguf")
    assert new.alignment == 128
    assert all(tensor.data_offset % 128 == 0 for tensor in new.tensors)
    assert old.tensors[0].data.tobytes() == new.tensors[0].data.tobytes()


def test_a_second_export_replaces_the_first(model, converted, tmp_path):
    other = RopeScaling.extended(GEOMETRY, 4096, [8.0] * 16)
    export(model, other, tmp_path / "first.gguf", gguf=converted)
    export(model, SCALING, tmp_path / "second.gguf", gguf=tmp_path / "first.gguf")
    export(model, SCALING, tmp_path / "straight.gguf", gguf=converted)
    second, straight = (read_gguf_rope(tmp_path / f"{name}.gguf") for name in ("second", "straight"))
    for field in second.__dataclass_fields__:
        assert field == "path" or getattr(second, field) == getattr(straight, field)


# The content of the file.


@pytest.mark.parametrize("existing", [False, True])
def test_llama_cpp_s_keys_and_factors(existing, model, converted, tmp_path):
    export(model, SCALING, tmp_path / "out.gguf", gguf=converted if existing else None)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.rope.scaling.type"] == "longrope"
    assert fields["llama.rope.scaling.original_context_length"] == 512
    assert fields["llama.rope.scaling.attn_factor"] == 1.125
    assert fields["llama.context_length"] == 2048
    assert "llama.rope.scaling.factor" not in fields
    assert fields["llama.rope.dimension_count"] == 32
    assert fields["llama.rope.freq_base"] == 10000.0
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "rope_freqs.weight" not in tensors
    assert tensors["rope_factors_long.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    np.testing.assert_array_equal(tensors["rope_factors_long.weight"].data, np.float32(FACTORS))
    np.testing.assert_array_equal(tensors["rope_factors_short.weight"].data, np.ones(16, np.float32))
    assert json.loads(fields["longrope.export"])["losses"] == []
    assert RopeScaling.from_json(fields["longrope.scaling"]) == SCALING


def test_the_weights_are_the_checkpoint_s(model, tmp_path):
    export(model, SCALING, tmp_path / "out.gguf")
    weights = load_file(model / "model.safetensors")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        np.testing.assert_array_equal(tensors[theirs], weights[ours])
    # Rows 0, 16, 1, 17, … of every head of 32.
    order = [row for pair in range(16) for row in (pair, pair + 16)]
    query, key = (weights[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"], query[[*order, *(32 + row for row in order)]])
    np.testing.assert_array_equal(tensors["blk.0.attn_k.weight"], key[order])


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_the_dtype_is_the_checkpoint_s(dtype, kind, tmp_path):
    folder = save_checkpoint(tmp_path / "model", dtype=dtype, max_position_embeddings=512)
    export(folder, SCALING, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2} == {kind}
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 1} == {"F32"}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    raw = load_file(folder / "model.safetensors")["lm_head.weight"].view(torch.uint8).numpy().tobytes()
    assert tensors["output.weight"].data.tobytes() == raw


def test_reading(model, converted, tmp_path):
    export(model, SCALING, tmp_path / "out.gguf")
    rope = read_gguf_rope(tmp_path / "out.gguf")
    assert (rope.architecture, rope.scaling_type, rope.freq_base, rope.rotary_dim) == ("llama", "longrope", 10000.0, 32)
    assert (rope.original_context_length, rope.context_length, rope.attention_factor) == (512, 2048, 1.125)
    assert (rope.factor, rope.rope_freqs, rope.scaling) == (None, None, SCALING)
    assert rope.short_factors == (1.0,) * 16
    assert rope.long_factors == pytest.approx(FACTORS, rel=1e-7)
    plain = read_gguf_rope(converted)
    assert (plain.scaling_type, plain.factor, plain.attention_factor) == ("yarn", 4.0, None)
    assert plain.rope_freqs == (1.0,) * 16
    assert (plain.long_factors, plain.short_factors, plain.scaling) == (None, None, None)


# The windows, and the notes about them.


def windows(*lengths, attention_factors=None, start_tokens=0):
    values = attention_factors or [1.0] * len(lengths)
    return RopeScaling(
        GEOMETRY,
        tuple(
            Window(length, (length / 512,) * 16, start_tokens if length > 512 else 0, m)
            for length, m in zip(lengths, values, strict=True)
        ),
    )


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        (windows(512, 2048, start_tokens=4), "start tokens 4"),
        (windows(512, 1024, 2048), "windows to 1024"),
        (windows(512, 2048, attention_factors=[1.0, 1.2]), "attention factor 1 of the short"),
    ],
)
def test_nothing_is_lost_in_silence(scaling, named, model, tmp_path):
    out = tmp_path / "out.gguf"
    error = refusal(export, model, scaling, out)
    assert (error.code, named in str(error)) == ("not-expressible", True)
    assert list(tmp_path.iterdir()) == []
    done = export(model, scaling, out, allow_lossy=True)
    assert named in done.unsupported[0]
    assert json.loads(gguf.GGUFReader(out).fields["longrope.export"].contents())["losses"] == done.unsupported
    assert read_gguf_rope(out).scaling == scaling


def notes(scaling, tmp_path, **config):
    folder = save_checkpoint(tmp_path / "model", **{"max_position_embeddings": 512} | config)
    return "\n".join(export(folder, scaling, tmp_path / "out.gguf").notes)


def test_the_notes_say_which_factors_hold_when(tmp_path):
    found = notes(SCALING, tmp_path)
    assert f"llama-server -m {tmp_path / 'out.gguf'} -c 2048" in found
    assert "-c up to 512 the short factors, above it the long ones" in found
    assert "a text inside 512 tokens gets the long factors too" in found
    assert f"a second server: llama-server -m {tmp_path / 'out.gguf'} -c 512" in found
    assert "the attention factor 1.125 holds at every -c" in found


def test_the_notes_on_windows_that_llama_cpp_rounds(tmp_path):
    geometry = RopeGeometry(32, 10000.0, 700)
    found = notes(RopeScaling.extended(geometry, 2048, FACTORS), tmp_path, max_position_embeddings=700)
    assert "-c up to 512 the short factors" in found
    assert "700 is no multiple of 256: -c 513 to 700 takes the long factors" in found
    assert "attention factor" not in found


def test_the_notes_on_a_window_below_the_smallest_context(tmp_path):
    geometry = RopeGeometry(32, 10000.0, 64)
    found = notes(RopeScaling.extended(geometry, 2048, FACTORS), tmp_path, max_position_embeddings=64)
    assert "always the long one, because 256 is above the first window of 64 tokens" in found


def test_the_notes_on_one_set_of_factors(tmp_path):
    assert "the same factors hold at every -c" in notes(RopeScaling.single(GEOMETRY, 2048, FACTORS), tmp_path)
