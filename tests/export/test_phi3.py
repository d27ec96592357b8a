"""Relabelling as Phi-3: the same logits, bit for bit, in a class whose generation passes the switch; or the reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from longrope.export import verify
from longrope.export.phi3 import require_eligible
from longrope.models.apply import apply_scaling
from longrope.rope.geometry import RopeGeometry
from tests.checkpoints import save_checkpoint
from tests.export.sources import (
    SU,
    TARGET,
    WINDOW,
    export,
    ids,
    plain_logits,
    refusal,
    save_model,
    scaled_logits,
    scaling_of,
)

LENGTHS = (7, WINDOW, WINDOW + 1, TARGET)
CASES = {
    "grouped": ("llama", {}, torch.float32),
    "tied": ("llama", {"tie_word_embeddings": True}, torch.float32),
    "bfloat16": ("llama", {"eos_token_id": [2, 3]}, torch.bfloat16),
    "sliding": ("mistral", {"sliding_window": 24, "head_dim": 16}, torch.float32),
    "not sliding": ("mistral", {"sliding_window": None, "head_dim": 16}, torch.float16),
}


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    """Source, scaling, Phi-3 export."""
    folder = tmp_path_factory.mktemp("phi3")
    family, overrides, dtype = CASES[request.param]
    source = save_model(folder / "source", family, dtype, **overrides)
    scaling = scaling_of(source, SU)
    return source, scaling, export(source, scaling, folder / "out", target="phi3").path


def test_logits_are_the_sources_bit_for_bit(case, tmp_path):
    source, scaling, out = case
    plain = export(source, scaling, tmp_path / "hf").path
    ours, theirs = plain_logits(out, *LENGTHS), plain_logits(plain, *LENGTHS)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    # And with our rotary module in both.
    ours, theirs = (scaled_logits(folder, scaling, *LENGTHS) for folder in (out, source))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_weights_are_stacked_and_nothing_else(case):
    source, _, out = case
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        qkv = [before.pop(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]
        gate_up = [before.pop(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up")]
        assert torch.equal(after.pop(f"{prefix}self_attn.qkv_proj.weight"), torch.cat(qkv))
        assert torch.equal(after.pop(f"{prefix}mlp.gate_up_proj.weight"), torch.cat(gate_up))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_config_says_what_phi3_would_default(case):
    source, scaling, out = case
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "rms_norm_eps", "dtype"):
        assert after[key] == before[key], key
    assert after["sliding_window"] == before.get("sliding_window")
    assert after["architectures"] == ["Phi3ForCausalLM"]
    assert after["original_max_position_embeddings"] == WINDOW
    # transformers 4 allows three keys only.
    assert after["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert after["rope_theta"] == scaling.geometry.base
    assert after["rope_parameters"]["attention_factor"] == pytest.approx(SU)


def test_generation_passes_the_switch(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    scaling = scaling_of(source, SU)
    texts = {}
    for form in ("phi3", "hf"):
        model = AutoModelForCausalLM.from_pretrained(export(source, scaling, tmp_path / form, target=form).path)
        for cache in (True, False):
            options = {"max_new_tokens": 20, "do_sample": False, "use_cache": cache, "eos_token_id": None}
            prompt = ids(WINDOW - 6)
            texts[form, cache] = model.generate(
                prompt, attention_mask=prompt.new_ones(prompt.shape), **options
            ).tolist()
    assert texts["phi3", True] == texts["phi3", False] == texts["hf", False]
    assert texts["hf", True] != texts["hf", False]  # what the relabelling is for


def test_sharded_checkpoints_stay_sharded(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    scaling = scaling_of(source, SU)
    one, many = (
        export(folder, scaling, tmp_path / f"{folder.name}-out", target="phi3").path
        for folder in (source, tmp_path / "shards")
    )
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in load_file(one / "model.safetensors").values()
    )
    stored = {name: tensor for path in many.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert stored.keys() == index["weight_map"].keys()
    assert torch.equal(plain_logits(one, TARGET)[0], plain_logits(many, TARGET)[0])


def test_folded_too(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    scaling = scaling_of(source)
    done = export(source, scaling, tmp_path / "out", target="phi3", fold_attention_factor=True)
    assert json.loads((done.path / "config.json").read_text())["rope_scaling"].keys() == {
        "type",
        "short_factor",
        "long_factor",
    }
    for ours, theirs in zip(scaled_logits(source, scaling, *LENGTHS), plain_logits(done.path, *LENGTHS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(ours.abs().max()))


def test_an_attention_factor_of_its_own_is_for_transformers_5(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    scaling = scaling_of(source)
    done = export(source, scaling, tmp_path / "out", target="phi3")
    assert any("transformers 4 refuses" in note for serving in done.servings for note in serving.notes)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    apply_scaling(model, scaling)
    with torch.inference_mode():
        assert torch.equal(plain_logits(done.path, WINDOW)[0], model(ids(WINDOW), use_cache=False).logits)


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("qwen2", {}, "its architecture is qwen2"),
        ("granite", {}, "its architecture is granite"),
        ("gemma3_text", {}, "its architecture is gemma3_text"),
        ("phi3", {}, "Phi-3 already"),
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"mlp_bias": True}, "biases"),
        ("llama", {"head_dim": 32}, "head_dim 32 is not"),
    ],
)
def test_the_reason_of_a_refusal(family, overrides, reason, tmp_path):
    source = save_model(tmp_path / "source", family, **overrides)
    error = refusal(export, source, scaling_of(source, SU), tmp_path / "out", target="phi3")
    assert (error.code, reason in str(error)) == ("unsupported-model", True)
    assert not (tmp_path / "out").exists()


def test_a_share_of_the_head_that_llama_does_not_know_is_refused_for_every_target(tmp_path):
    """Its config says that half of the head rotates, its class rotates all of it: `inspect` says the same."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    source = save_model(tmp_path / "source", "llama", rope_parameters=rope)
    for target in ("phi3", "hf"):
        error = refusal(export, source, scaling_of(source, SU), tmp_path / "out", target=target)
        assert (error.code, "its config says 4 rotary pairs" in str(error)) == ("not-rope", True)
        assert not (tmp_path / "out").exists()


def test_tensors_without_a_place_are_refused(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # computed, not a weight
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    export(source, scaling_of(source, SU), tmp_path / "out", target="phi3")
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    error = refusal(export, source, scaling_of(source, SU), tmp_path / "again", target="phi3")
    assert error.code == "unsupported-model"
    assert "no place for model.layers.0.self_attn.q_norm.weight" in str(error)


def test_quantised_weights_are_refused():
    config = LlamaConfig(quantization_config={"quant_method": "fp8"})
    assert "quantised" in str(refusal(require_eligible, config, RopeGeometry.from_config(config)))


def test_the_tokenizer_stays_the_sources(tmp_path, monkeypatch):
    source = save_checkpoint(tmp_path / "source", num_attention_heads=4, head_dim=16)
    scaling = scaling_of(source, SU)
    out = export(source, scaling, tmp_path / "out", target="phi3").path
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert before("some words 123").input_ids == after("some words 123").input_ids
    tokenizers = iter((before, lambda text: before(text[1:])))
    monkeypatch.setattr(verify, "load_tokenizer", lambda *_, **__: next(tokenizers))
    error = refusal(export, source, scaling, tmp_path / "again", target="phi3")
    assert (error.code, "tokenizer" in str(error)) == ("differs", True)
    assert not (tmp_path / "again").exists()
