"""GGUF files that cannot be opened: one line each, soon, and without the memory that a wrong header asks for."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest

from longrope.doctor.diagnose import diagnose
from longrope.errors import LongRopeError
from longrope.models import checkpoint_files
from longrope.models.loading import load_config, load_model
from tests.export.sources import refusal
from tests.models.gguf_models import HIDDEN, save_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def refused(call, path: Path, code: str, named: str) -> None:
    start = time.perf_counter()
    error = refusal(call, str(path))
    assert time.perf_counter() - start < 5
    message = str(error)
    assert error.code == code, message
    assert named in message
    assert "\n" not in message


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("call", [load_config, load_model])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated(share, call, whole, tmp_path):
    refused(call, written(tmp_path, whole[: int(len(whole) * share)]), "damaged-file", "model.gguf")


def at(offset: int, code: str, value: int, whole: bytes) -> bytes:
    """`whole` with a number of its header in another value."""
    data = bytearray(whole)
    struct.pack_into("<" + code, data, offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("offset", "code", "value", "fault", "named"),
    [
        (0, "I", 0x46554746, "damaged-file", "another kind of file"),
        (4, "I", 1, "unsupported-gguf", "version 1"),
        (4, "I", 3 << 24, "unsupported-gguf", "big-endian"),
        (4, "I", 4, "unsupported-gguf", "version 4"),
        (8, "Q", 2**60, "damaged-file", "1152921504606846976 tensors"),
        (16, "Q", 2**60, "damaged-file", "1152921504606846976 keys"),
        (8, "Q", 2000, "damaged-file", "model.gguf"),
        (24, "Q", 2**60, "damaged-file", "truncated"),  # the length of the first key's name
    ],
)
def test_headers(offset, code, value, fault, named, whole, tmp_path):
    refused(load_config, written(tmp_path, at(offset, code, value, whole)), fault, named)


def test_many_zeros_are_refused_soon(whole, tmp_path):
    """A sparse file whose header promises as many keys as it has room for."""
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 10**9))
        file.truncate(20 * 10**9)
    refused(load_config, path, "damaged-file", "the key '' twice")


def test_an_array_of_too_many_strings(whole, tmp_path):
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a")
        file.write(struct.pack("<IIQ", 9, 8, 2 * 10**9))
        file.truncate(20 * 10**9)
    refused(load_config, path, "damaged-file", "an array of 2000000000 strings")


@pytest.mark.parametrize(
    ("keys", "code", "named"),
    [
        ({"block_count": 10**9}, "damaged-file", "block_count is 1000000000"),
        ({"block_count": 1}, "damaged-file", "block_count is 1"),
        ({"block_count": 0}, "damaged-file", "1 or more"),
        ({"block_count": None}, "damaged-file", "block_count"),
        ({"block_count": "two"}, "damaged-file", "block_count"),
        ({"embedding_length": 2**30}, "damaged-file", "token_embd.weight with rows of 1073741824"),
        ({"feed_forward_length": 2**31}, "damaged-file", "ffn_gate.weight"),
        ({"attention.head_count": 2**31}, "damaged-file", "number of attention heads"),
        ({"attention.head_count": [4, 4]}, "unsupported-model", "per layer"),
        ({"attention.head_count_kv": 1}, "damaged-file", "attn_k.weight"),
        ({"attention.key_length": 2**31, "rope.dimension_count": 2**31}, "damaged-file", "rope.dimension_count"),
        ({"attention.key_length": 2**31, "rope.dimension_count": None}, "damaged-file", "rope.dimension_count"),
        ({"attention.key_length": 2**31}, "damaged-file", "heads of at most 65536 dimensions"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "damaged-file", "epsilon"),
        ({"context_length": None}, "damaged-file", "context_length"),
        ({"rope.freq_base": float("inf")}, "damaged-file", "freq_base"),
        ({"rope.dimension_count": 16}, "unsupported-model", "16 of 32 dimensions"),
        ({"expert_count": 8}, "unsupported-model", "mixture of 8 experts"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be(keys, code, named, tmp_path):
    refused(load_model, save_gguf(tmp_path / "model.gguf", keys=keys), code, named)


@pytest.mark.parametrize(
    ("tensors", "code", "named"),
    [
        ({"blk.1.ffn_up.weight": None}, "damaged-file", "lacks the tensor blk.1.ffn_up.weight"),
        ({"token_embd.weight": None}, "damaged-file", "token_embd.weight"),
        ({"blk.1.attn_q_norm.weight": np.ones(32)}, "unsupported-model", "blk.1.attn_q_norm.weight"),
        ({"blk.0.ffn_up.weight": np.ones((8, HIDDEN))}, "damaged-file", "blk.0.ffn_up.weight"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(tensors, code, named, tmp_path):
    refused(load_model, save_gguf(tmp_path / "model.gguf", tensors=tensors), code, named)


def empty(path: Path, architecture: str, parts: int = 1) -> Path:
    """A file without a model: a vocabulary, or the projector of a multimodal model."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint16("split.count", parts)
    writer.add_tensor("x", np.zeros(32, np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


def test_an_unknown_architecture(tmp_path):
    path = empty(tmp_path / "model.gguf", "mamba")
    refused(load_config, path, "unsupported-model", "'mamba' is none of llama, qwen2")


def test_no_model_at_all(tmp_path):
    refused(load_config, empty(tmp_path / "model.gguf", "llama"), "damaged-file", "attention.head_count")


@pytest.mark.parametrize(
    ("others", "code", "named"),
    [([], "missing-file", "00002-of-00002.gguf is missing"), ([2], "unsupported-gguf", "join")],
)
def test_one_part_of_a_split_file(others, code, named, tmp_path):
    part = empty(tmp_path / "model-00001-of-00002.gguf", "llama", parts=2)
    for index in others:
        (tmp_path / f"model-0000{index}-of-00002.gguf").write_bytes(part.read_bytes())
    refused(load_config, part, code, named)


def test_names_of_files(tmp_path):
    refused(load_config, tmp_path / "none.gguf", "no-such-model", "there is no GGUF file at")
    (tmp_path / "text.gguf").write_text("not a model")
    refused(load_config, tmp_path / "text.gguf", "damaged-file", "another kind of file")
    (tmp_path / "model.bin").write_text("not a model")
    refused(load_config, tmp_path / "model.bin", "no-such-model", "a .gguf file")


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_one_line(seed, whole, tmp_path):
    """Random bytes in the header: whatever they make of it, the answer is a model or one line."""
    random = np.random.default_rng(seed)
    data = bytearray(whole)
    for place in random.integers(4, 3000, 4):
        data[place] = random.integers(256)
    path = written(tmp_path, bytes(data))
    faults = []
    try:
        load_model(str(path))
    except LongRopeError as error:
        faults.append(str(error))
    assert not any("\n" in fault for fault in faults)


HUB = "owner/model:model-Q8_0.gguf"


def test_a_file_on_the_hub(tmp_path, monkeypatch):
    path = save_gguf(tmp_path / "model-Q8_0.gguf")
    asked = []

    def download(*given, **options):
        asked.append((given, options))
        return str(path)

    monkeypatch.setattr(checkpoint_files, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(checkpoint_files, "hf_hub_download", download)
    assert load_config(HUB).hidden_size == HIDDEN
    assert asked == [(("owner/model", "model-Q8_0.gguf"), {"local_files_only": False})]
    assert diagnose(HUB).path == path


def test_a_hub_that_does_not_answer(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    def nothing(*_, **options):
        assert options["local_files_only"]
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(checkpoint_files, "model_info", unreachable)
    monkeypatch.setattr(checkpoint_files, "hf_hub_download", nothing)
    error = refusal(load_config, HUB)
    assert error.code == "no-such-model"
    assert "the hub cannot be reached: ConnectionError: no route" in str(error)


@pytest.mark.parametrize("name", ["model:x.gguf", "./owner/model:x.gguf", "owner/model:", "a/b/c.gguf"])
def test_names_that_are_no_file_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "model_info", lambda *_, **__: pytest.fail("refused before any network"))
    assert refusal(load_config, name).code == "no-such-model"
