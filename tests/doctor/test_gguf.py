"""The doctor on GGUF files: those that we write, and those that lack what llama.cpp needs."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from longrope.doctor.diagnose import diagnose
from longrope.errors import LongRopeError
from longrope.export.export import export_checkpoint
from longrope.rope.closed_forms import su_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling

GEOMETRY = RopeGeometry(64, 10_000.0, 256)
LONG = np.geomspace(1.0, 4.6, 32)
SU = su_attention_factor(GEOMETRY, 1024)
SCALING = RopeScaling.extended(GEOMETRY, 1024, LONG, attention_factor=SU)

# A file as our export writes it, without weights: what the doctor reads, by llama.cpp's names.
KEYS = {
    "context_length": 1024,
    "rope.dimension_count": 64,
    "rope.freq_base": 10_000.0,
    "rope.scaling.type": "longrope",
    "rope.scaling.original_context_length": 256,
    "rope.scaling.attn_factor": SU,
}
TENSORS = {"rope_factors_long.weight": LONG, "rope_factors_short.weight": np.ones(32)}


def write(path: Path, keys: dict | None = None, tensors: dict | None = None, architecture: str = "llama") -> Path:
    """A GGUF file written by the gguf package; None among the changed keys or tensors leaves one out."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (KEYS | (keys or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}.get(type(value))
        if add is not None:
            add(f"{architecture}.{name}", value)
    for name, values in (TENSORS | (tensors or {})).items():
        if values is not None:
            writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    SCALING.save(path.parent / "scaling.json")
    return path


def verdicts(path: Path, **options) -> dict[str, str]:
    return {finding.runtime.name: finding.verdict for finding in diagnose(path, **options).findings}


def test_our_own_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    export_checkpoint("tiny", SCALING, path, target="gguf")
    found = diagnose(path)
    assert {one.runtime.name: one.verdict for one in found.findings} == dict.fromkeys(
        ("llama.cpp", "llama.cpp-short", "ollama"), "partly"
    )
    assert "that longrope wrote into" in found.expected.source
    assert found.lints == []
    assert found.failures() == []
    context, short = found.findings[0], found.findings[1]
    assert [at.window for at in context.by_length] == ["long"] * 5
    assert [at.window for at in short.by_length] == ["short"] * 3 + [None] * 2
    assert context.by_length[-1].as_expected
    assert context.max_factor_error == pytest.approx(3.6)  # the long factors on short texts


def test_one_window_is_exact(tmp_path):
    single = RopeScaling.single(GEOMETRY, 1024, LONG, attention_factor=SU)
    single.save(tmp_path / "one.json")
    path = write(tmp_path / "one.gguf", tensors={"rope_factors_short.weight": LONG})
    assert verdicts(path, expect=tmp_path / "one.json")["llama.cpp"] == "exact"


@pytest.mark.parametrize(
    ("changes", "verdict", "says"),
    [
        ({}, "partly", "long window at 64, 255 and 256"),
        ({"tensors": dict.fromkeys(TENSORS)}, "dropped", "has no rope_factors_short and rope_factors_long"),
        ({"keys": {"rope.scaling.type": None}}, "dropped", "the factor tensors are not loaded"),
        ({"keys": {"rope.scaling.attn_factor": None}}, "differs", "attention factor 1 instead of"),
        ({"keys": {"rope.scaling.factor": 4.0}}, "differs", "divides all frequencies"),
        ({"keys": {"rope.scaling.original_context_length": None}}, "dropped", "is the switch"),
        ({"keys": {"context_length": 256}}, "differs", "caps the length that llama-server serves"),
        ({"keys": {"rope.freq_base": 500_000.0}}, "differs", "base 500000 instead of 10000"),
        ({"tensors": {"rope_factors_long.weight": LONG[:16]}}, "refused", "16 numbers for 32 rotary pairs"),
        ({"architecture": "qwen2"}, "dropped", "the graph of qwen2 takes no factors"),
        ({"architecture": "phi3"}, "partly", "long window"),
    ],
    ids=str,
)
def test_what_llama_cpp_needs(changes, verdict, says, tmp_path):
    found = diagnose(write(tmp_path / "model.gguf", **changes), runtime=["llama.cpp"])
    (row,) = found.findings
    assert row.verdict == verdict, row.reasons
    assert any(says in reason for reason in row.reasons), row.reasons
    assert bool(found.failures()) == (verdict != "partly")


def test_a_single_set_serves_long_texts(tmp_path):
    """rope_freqs: one set for all lengths, the long factors; what a GGUF without LongRoPE keys can hold."""
    tensors = dict.fromkeys(TENSORS) | {"rope_freqs.weight": LONG}
    path = write(tmp_path / "model.gguf", keys={"rope.scaling.type": None}, tensors=tensors)
    RopeScaling.single(GEOMETRY, 1024, LONG, attention_factor=SU).save(tmp_path / "scaling.json")
    assert verdicts(path)["llama.cpp"] == "exact"


def test_contexts_are_rounded_up_to_256(tmp_path):
    """At L = 300 a context for 300 tokens is one of 512, above L: it takes the long factors."""
    scaling = RopeScaling.extended(RopeGeometry(64, 10_000.0, 300), 1024, LONG, attention_factor=SU)
    path = write(tmp_path / "model.gguf", keys={"rope.scaling.original_context_length": 300})
    scaling.save(tmp_path / "scaling.json")
    found = diagnose(path, runtime=["llama.cpp-short"])
    assert [at.window for at in found.findings[0].by_length] == ["long", "long", "long", None, None]
    assert "original-length-multiple" in {lint.name for lint in found.lints}


@pytest.mark.parametrize("original", [100, 128, 255, 256, 300, 4000, 4096])
def test_advice_for_short_texts_is_a_context_that_takes_the_short_factors(original, tmp_path):
    """Advice and lint agree for every L: contexts are multiples of 256, so that below L = 256 none is short."""
    target = 4 * original
    scaling = RopeScaling.extended(RopeGeometry(64, 10_000.0, original), target, LONG, attention_factor=SU)
    lengths = {"rope.scaling.original_context_length": original, "context_length": target}
    path = write(tmp_path / "model.gguf", keys=lengths)
    scaling.save(tmp_path / "scaling.json")
    found = diagnose(path, runtime="all")
    said = [lint.advice for lint in found.lints if lint.name == "original-length-multiple"]
    assert bool(said) == (original % 256 != 0)
    assert len(found.findings) == 3
    for finding in found.findings:
        assert finding.verdict == "partly"
        (advice,) = finding.advice
        contexts = [int(text) for text in re.findall(r"(?:-c|num_ctx|,) (\d+)", advice) if int(text) != target]
        if original < 256:
            assert contexts == []
            assert "serve short texts with the original model" in advice
            assert said == ["there the short factors never hold"]
            continue
        assert contexts == [original // 256 * 256]
        assert -(-contexts[0] // 256) * 256 <= original
        assert all(f"-c {contexts[0]}" in text for text in said)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": None, "rope.scaling.factor": 4.0},  # linear too
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 256},
    ],
    ids=str,
)
def test_scalings_without_factor_tensors(architecture, keys, tmp_path):
    """llama.cpp applies them in every graph; the tests of opened files compare the logits."""
    plain = {name: None for name in KEYS if "scaling" in name}
    path = write(tmp_path / "model.gguf", plain | keys, dict.fromkeys(TENSORS), architecture)
    (tmp_path / "scaling.json").unlink()
    found = diagnose(path, runtime=["llama.cpp"])
    assert found.findings[0].verdict == "exact", found.findings[0].reasons
    window = found.expected.scaling.windows[-1]
    assert window.factors[-1] == pytest.approx(1.0 if "none" in keys.values() else 4.0)
    assert (window.attention_factor > 1) == ("yarn" in keys.values())


def test_lints(tmp_path):
    path = write(
        tmp_path / "model.gguf",
        keys={
            "rope.scaling.attn_factor": 32.0,
            "rope.scaling.factor": 4.0,
            "context_length": 512,
            "rope.scaling.original_context_length": None,
        },
    )
    names = {lint.name for lint in diagnose(path).lints}
    assert names == {"attention-factor", "scaling-factor", "context-length", "original-length"}


def test_in_a_folder_with_its_checkpoint(tmp_path):
    write(tmp_path / "model.gguf")
    assert set(verdicts(tmp_path)) == {"llama.cpp", "llama.cpp-short", "ollama"}
    found = diagnose(tmp_path)
    assert all(one.label.endswith("model.gguf") for one in found.findings)
    upper = (tmp_path / "model.gguf").rename(tmp_path / "model.GGUF")
    assert verdicts(upper) == verdicts(tmp_path) == {one.runtime.name: one.verdict for one in found.findings}


def test_a_file_that_is_not_ours(tmp_path):
    """Without any scaling.json: what the file states, which it applies; or the name of a scaling and no factors."""
    path = write(tmp_path / "model.gguf")
    (tmp_path / "scaling.json").unlink()
    found = diagnose(path)
    assert found.expected.source == "the keys and tensors of model.gguf itself"
    assert {one.verdict for one in found.findings} == {"partly"}
    path = write(tmp_path / "model.gguf", tensors=dict.fromkeys(TENSORS))
    (tmp_path / "scaling.json").unlink()
    found = diagnose(path)
    assert found.expected is None
    assert [one.verdict for one in found.findings] == ["dropped"] * 3
    assert [one.runtime.name for one in found.failures()] == ["llama.cpp"]
    path = write(tmp_path / "model.gguf", {name: None for name in KEYS if "scaling" in name}, dict.fromkeys(TENSORS))
    (tmp_path / "scaling.json").unlink()
    assert set(verdicts(path).values()) == {"exact"}


def test_bad_files(tmp_path):
    path = write(tmp_path / "model.gguf")
    whole = path.read_bytes()
    for content in (whole[:40], b"not a model"):
        path.write_bytes(content)
        with pytest.raises(LongRopeError) as error:
            diagnose(path)
        assert error.value.code == "damaged-file"
    for keys in ({"rope.dimension_count": 2**31}, {"rope.dimension_count": None, "attention.key_length": 2**31}):
        with pytest.raises(LongRopeError, match=r"at most 65536 rotary dimensions by .*, found 2147483648") as error:
            diagnose(write(path, keys | {"rope.scaling.type": None}, dict.fromkeys(TENSORS)))
        assert error.value.code == "damaged-file"
    with pytest.raises(LongRopeError, match=r"rope\.scaling\.factor of at most 1e[+]09, found 1e[+]30") as error:
        diagnose(write(path, {"rope.scaling.factor": 1e30}))
    assert error.value.code == "damaged-file"
    path.write_bytes(whole)
    with pytest.raises(LongRopeError, match="rotary_dim 32") as error:
        diagnose(path, expect=RopeScaling.extended(RopeGeometry(32, 1e4, 64), 256, [2.0] * 16))
    assert error.value.code == "wrong-geometry"
