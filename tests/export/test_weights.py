"""Safetensors rewritten tensor by tensor: what is not changed stays byte for byte, what is damaged is named."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longrope.export.weights import WeightPlan, rewrite, stored_tensors
from tests.export.sources import refusal

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(8, dtype=torch.float32).reshape(2, 4) / 7,
    "half": torch.linspace(-1, 1, 5, dtype=torch.bfloat16),
    "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "flag": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def folder(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    save_file(TENSORS, source / "model.safetensors", {"format": "pt"})
    return source, out


def same(names):
    return {name: (name,) for name in names}


def test_nothing_changed_is_the_same_file(folder):
    source, out = folder
    rewrite(source, out, WeightPlan(same(TENSORS), {}))
    loaded = load_file(out / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_parts_are_stacked_in_their_order(folder):
    source, out = folder
    rewrite(source, out, WeightPlan({"fused": ("b", "a", "b"), "half": ("half",)}, {"b": lambda b: b * 3}))
    loaded = load_file(out / "model.safetensors")
    changed = (TENSORS["b"].double() * 3).float()
    assert torch.equal(loaded["fused"], torch.cat((changed, TENSORS["a"], changed)))
    assert torch.equal(loaded["half"], TENSORS["half"])


def test_a_change_is_rounded_once(folder):
    source, out = folder
    rewrite(source, out, WeightPlan(same(TENSORS), {"half": lambda tensor: tensor / 3}))
    assert torch.equal(load_file(out / "model.safetensors")["half"], (TENSORS["half"].double() / 3).bfloat16())


def test_what_does_not_fit_is_refused(folder):
    source, out = folder
    mixed, integers = WeightPlan({"fused": ("a", "half")}, {}), WeightPlan(same(TENSORS), {"bytes": lambda x: x * 2})
    for plan, found in ((mixed, "found F32"), (integers, "found U8")):
        error = refusal(rewrite, source, out, plan)
        assert (error.code, found in str(error)) == ("unsupported-model", True)


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:20],
        lambda whole: whole[:3],
        lambda whole: b"",
        lambda whole: header(b"[]"),
        lambda whole: header(b'{"a": {"dtype": "F32", "shape": [1]}}'),
        lambda whole: header(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'),
        lambda whole: header(b'{"a": 7}'),
        lambda whole: b"\xff" * 64,
    ],
)
def test_damaged_files_are_named(damage, folder):
    path = folder[0] / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    error = refusal(stored_tensors, folder[0])
    assert error.code == "damaged-file"
    assert "model.safetensors is no complete safetensors file: " in str(error)


def test_shards(folder):
    source, out = folder
    save_file({name: TENSORS[name] for name in ("a", "half")}, source / "model-1.safetensors")
    save_file({"b": TENSORS["b"]}, source / "model-2.safetensors")
    shards = {"a": "model-1.safetensors", "half": "model-1.safetensors", "b": "model-2.safetensors"}
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0, "more": 1}, "weight_map": shards}))
    rewrite(source, out, WeightPlan({"fused": ("b", "a"), "half": ("half",)}, {}))
    written = json.loads((out / index.name).read_text())
    assert written["weight_map"] == {"fused": "model-2.safetensors", "half": "model-1.safetensors"}
    assert written["metadata"] == {"total_size": 20 * 4 + 5 * 2, "more": 1}
    assert torch.equal(load_file(out / "model-2.safetensors")["fused"], torch.cat((TENSORS["b"], TENSORS["a"])))
    save_file(dict(TENSORS), source / "model-2.safetensors")
    assert "holds a twice" in str(refusal(stored_tensors, source))
    (source / "model-2.safetensors").unlink()
    assert "model-2.safetensors" in str(refusal(stored_tensors, source))
