"""Export to GGUF refuses in one line what it cannot do right, and leaves nothing behind."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from longrope.errors import LongRopeError
from longrope.export.gguf import export as export_module
from longrope.models.gguf.container import read_gguf
from longrope.models.gguf.rope import read_gguf_rope
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from tests.checkpoints import save_checkpoint
from tests.export.gguf.gguf_files import SCALING, export, rewritten, save_converted, save_model
from tests.export.sources import refusal

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("gguf") / "model")


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    return save_converted(model, tmp_path_factory.mktemp("gguf") / "converted.gguf")


def assert_refused(code, named, tmp_path, model, scaling=SCALING, **more):
    before = sorted(tmp_path.iterdir())
    error = refusal(export, model, scaling, tmp_path / "out.gguf", **more)
    message = str(error)
    assert error.code == code, message
    assert named in message
    assert "\n" not in message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("qwen2", "no factors"), ("refact", "no RoPE"), ("pangu-embedded", "gives none"), ("step35", "rotary dimension")],
)
def test_graphs_that_take_no_factors(architecture, reason, model, tmp_path):
    path = tmp_path / "in.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_refused("unsupported-model", reason, tmp_path, model, gguf=path)


@pytest.mark.parametrize(
    ("key", "value", "kind", "named"),
    [
        ("llama.rope.freq_base", 500000.0, "FLOAT32", "rope base 500000, the model 10000"),
        ("llama.rope.dimension_count", 16, "UINT32", "rotary dimension 16, the model 32"),
        ("llama.block_count", 3, "UINT32", "layers 3, the model 2"),
        ("llama.embedding_length", 128, "UINT32", "hidden size 128, the model 64"),
    ],
)
def test_a_file_of_another_model(key, value, kind, named, model, converted, tmp_path):
    other = rewritten(converted, tmp_path / "in.gguf", extra=[(key, value, gguf.GGUFValueType[kind])])
    assert_refused("wrong-geometry", named, tmp_path, model, gguf=other)


def test_a_scaling_of_another_model(model, tmp_path):
    other = RopeScaling.extended(RopeGeometry(64, 10000.0, 512), 2048, [2.0] * 32)
    assert_refused("wrong-geometry", "this model has rotary_dim 32", tmp_path, model, other)


def test_an_output_that_exists(model, tmp_path):
    (tmp_path / "out.gguf").write_text("mine")
    assert_refused("output-exists", "out.gguf", tmp_path, model)
    assert (tmp_path / "out.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("config_class", "more", "named"),
    [
        ("CohereConfig", {}, "'cohere' is none of llama, mistral, qwen2"),
        ("MistralConfig", {"sliding_window": 512}, "looks back 512 tokens only"),
        ("LlamaConfig", {"hidden_act": "gelu"}, "activation"),
        ("LlamaConfig", {"mlp_bias": True}, "MLP has biases"),
    ],
)
def test_models_that_are_no_llama(config_class, more, named, tmp_path):
    folder = save_checkpoint(tmp_path / "model", config_class, max_position_embeddings=512, **more)
    geometry = RopeGeometry.from_config(export_module.load_config(str(folder)))
    scaling = RopeScaling.extended(geometry, 2048, [2.0] * geometry.pairs)
    assert_refused("unsupported-model", named, tmp_path, folder, scaling)


def test_a_full_disk_leaves_nothing(model, converted, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_patched", full)
    assert_refused("output-not-writable", "No space left on device", tmp_path, model, gguf=converted)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.2, 0.5, 0.9, 0.9999])
def test_a_truncated_file(share, model, converted, tmp_path):
    data = converted.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * share)])
    assert_refused("damaged-file", str(cut), tmp_path, model, gguf=cut)


def test_every_byte_of_the_header_may_be_the_last(converted, tmp_path):
    """A cut anywhere is one line, never a traceback or an endless loop."""
    file = read_gguf(converted)
    header = min(tensor.start for tensor in file.tensors.values())
    data = converted.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(0, header, 61):
        cut.write_bytes(data[:size])
        with pytest.raises(LongRopeError):
            read_gguf_rope(cut)


@pytest.mark.parametrize(
    ("data", "code", "named"),
    [
        (b"PK\x03\x04" + bytes(100), "damaged-file", "another kind of file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(99), "unsupported-gguf", "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(99), "unsupported-gguf", "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(99), "unsupported-gguf", "no general.architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(99), "damaged-file", "truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(99), "damaged-file", "truncated"),
    ],
)
def test_a_foreign_file(data, code, named, tmp_path):
    (tmp_path / "x.gguf").write_bytes(data)
    error = refusal(read_gguf_rope, tmp_path / "x.gguf")
    assert (error.code, named in str(error)) == (code, True)


def test_one_part_of_several(model, converted, tmp_path):
    part = rewritten(converted, tmp_path / "part.gguf", extra=[("split.count", 2, gguf.GGUFValueType.UINT16)])
    assert_refused("unsupported-gguf", "is one part of 2", tmp_path, model, gguf=part)


def test_a_missing_file(tmp_path):
    assert refusal(read_gguf_rope, tmp_path / "none.gguf").code == "missing-file"
