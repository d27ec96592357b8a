"""Folding the attention factor: the same logits in transformers and where runtimes compute their own, or a refusal."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from longrope.export import weights as fold
from longrope.export.forms import express
from longrope.rope.hf_config import default_attention_factor
from longrope.rope.scaling import RopeScaling
from tests.export.sources import (
    SU,
    TARGET,
    WINDOW,
    export,
    plain_logits,
    refusal,
    save_model,
    scaled_logits,
    scaling_of,
    slow,
)

LENGTHS = (WINDOW, WINDOW + 1, TARGET)
# Biases and tied heads; a norm per head; 1 + w; 16 of 32 dimensions rotate, interleaved; q, k and v in one matrix.
FAMILIES = ("qwen2", "qwen3", "gemma3_text", "glm", "phi3")
# Plain; a norm of all heads; 16 of 32 in halves; interleaved; a layer without RoPE; sliding layers that are not scaled.
OTHERS = ("llama", "olmo2", "stablelm", "cohere", "smollm3", "olmo3")


def drop_attention_factor(folder):
    """Edit the config as a runtime reads it that knows no attention factor and computes it from the lengths."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("rope_scaling", "rope_parameters"):
        for entry in (config.get(name, {}), config.get(name, {}).get("full_attention", {})):
            for key in ("attention_factor", "factor", "short_mscale", "long_mscale"):
                entry.pop(key, None)
    path.write_text(json.dumps(config))


def assert_same(found, expected):
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("family", [*FAMILIES, *slow(*OTHERS)])
def test_every_runtime_gets_the_logits_of_the_scaling(family, tmp_path):
    source = save_model(tmp_path / "source", family)
    scaling = scaling_of(source)  # m = 1, where runtimes compute 1.15
    ours = scaled_logits(source, scaling, *LENGTHS)
    done = export(source, scaling, tmp_path / "out", fold_attention_factor=True)
    assert done.unsupported == []
    assert_same(plain_logits(done.path, *LENGTHS), ours)
    drop_attention_factor(done.path)
    assert_same(plain_logits(done.path, *LENGTHS), ours)
    config = json.loads((done.path / "config.json").read_text())
    assert config["longrope"]["query_scale"] == pytest.approx(0.75)


def test_without_folding_such_a_runtime_computes_something_else(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    scaling = scaling_of(source)
    done = export(source, scaling, tmp_path / "out")
    assert any("--fold-attention-factor" in note for note in done.notes)
    drop_attention_factor(done.path)
    ours, theirs = scaled_logits(source, scaling, TARGET)[0], plain_logits(done.path, TARGET)[0]
    assert float((ours - theirs).abs().max()) > 1e-2 * float(ours.abs().max())


def test_only_rotated_queries_change(tmp_path):
    source = save_model(tmp_path / "source", "stablelm", use_qkv_bias=True)
    export(source, scaling_of(source), tmp_path / "out", fold_attention_factor=True)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "q_proj" not in name:
            assert torch.equal(tensor, after[name]), name
            continue
        heads_before, heads_after = (one.view(2, 32, -1) for one in (tensor, after[name]))  # (heads, head_dim, …)
        torch.testing.assert_close(heads_after[:, :16], heads_before[:, :16] * 0.75)
        assert torch.equal(heads_after[:, 16:], heads_before[:, 16:])


def test_layers_that_are_not_scaled_keep_their_queries(tmp_path):
    for family, kept in {"smollm3": 1, "olmo3": 0}.items():
        source = save_model(tmp_path / family, family)
        out = tmp_path / f"{family}-out"
        export(source, scaling_of(source), out, fold_attention_factor=True)
        before, after = (load_file(path / "model.safetensors") for path in (source, out))
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert len(changed) == 1
        assert f"layers.{1 - kept}.self_attn.q_" in changed.pop()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_rounded_once(dtype, tmp_path):
    source = save_model(tmp_path / "source", "llama", dtype)
    scaling = scaling_of(source, attention_factor=0.9)
    done = export(source, scaling, tmp_path / "out", fold_attention_factor=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(path / "model.safetensors")[name] for path in (source, tmp_path / "out"))
    assert after.dtype == dtype
    assert torch.equal(after, (before.double() * 0.81 / SU**2).to(dtype))
    assert any("rounded to their dtype" in note for note in done.notes)


def test_the_forced_factor_is_that_of_the_lengths_in_the_config(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    expressed = express(scaling_of(source, 1.1), "hf", fold_attention_factor=True)
    assert default_attention_factor(expressed.stated) == pytest.approx(SU)
    assert expressed.stated.windows[0].attention_factor == expressed.stated.windows[1].attention_factor
    assert expressed.query_scale * expressed.stated.windows[1].attention_factor ** 2 == pytest.approx(1.1**2)


def test_where_runtimes_agree_nothing_is_folded(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    done = export(source, scaling_of(source, SU), tmp_path / "out", fold_attention_factor=True)
    assert (done.path / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert done.notes == []


@pytest.mark.parametrize(
    ("family", "attribute", "value"),
    [
        ("gemma3_text", "_FAMILIES", {"gemma3_text": ("q_norm", 0.0)}),
        ("qwen3", "_FAMILIES", {"qwen3": ("q_proj", 0.0)}),
        ("smollm3", "_scaled_layers", lambda config: [0, 1]),
        ("olmo3", "_scaled_layers", lambda config: [0, 1]),
        ("llama", "_scaled_layers", lambda config: [0]),
    ],
)
def test_a_wrong_fold_fails_the_proof(family, attribute, value, tmp_path, monkeypatch):
    monkeypatch.setattr(fold, attribute, value)
    monkeypatch.setattr(fold, "_NORMS", fold.re.compile("never"))
    source = save_model(tmp_path / "source", family)
    error = refusal(export, source, scaling_of(source), tmp_path / "out", fold_attention_factor=True)
    assert (error.code, "folding the attention factor" in str(error)) == ("differs", True)
    assert not (tmp_path / "out").exists()


def test_scaling_all_dimensions_of_a_partial_rotation_fails_the_proof(tmp_path, monkeypatch):
    real = fold.fold_changes

    def every_dimension(config, geometry, tensors, scale):
        geometry = type(geometry)(32, geometry.base, geometry.original_length)
        return real(config, geometry, tensors, scale)

    monkeypatch.setattr("longrope.export.hf.fold_changes", every_dimension)
    source = save_model(tmp_path / "source", "stablelm")
    error = refusal(export, source, scaling_of(source), tmp_path / "out", fold_attention_factor=True)
    assert (error.code, "folding the attention factor" in str(error)) == ("differs", True)


def test_what_cannot_be_folded_is_refused(tmp_path):
    for family, overrides, reason in (
        ("gpt_neox", {}, "its queries are known for"),
        ("cohere", {"use_qk_norm": True}, "normalised after the projection"),
    ):
        source = save_model(tmp_path / family, family, **overrides)
        error = refusal(export, source, scaling_of(source), tmp_path / "out", fold_attention_factor=True)
        assert (error.code, reason in str(error)) == ("unsupported-model", True)
        assert not (tmp_path / "out").exists()


def test_a_folded_export_is_no_source(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    scaling = scaling_of(source)
    export(source, scaling, tmp_path / "folded", fold_attention_factor=True)
    assert "folded into its weights" in str(refusal(export, tmp_path / "folded", scaling, tmp_path / "out"))
    error = refusal(export, tmp_path / "folded", None, tmp_path / "out.gguf", target="gguf")
    assert "folded into its weights" in str(error)
    assert RopeScaling.load(tmp_path / "folded" / "scaling.json") == scaling
