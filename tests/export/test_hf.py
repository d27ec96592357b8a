"""The Hugging Face export: weights byte for byte, a config that transformers applies, and a proof that can fail."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrope.errors import LongRopeError
from longrope.export import hf
from longrope.models.apply import apply_scaling, geometry_of
from longrope.rope.hf_config import superset_config
from longrope.rope.scaling import RopeScaling, Window
from tests.checkpoints import WINDOW, save_checkpoint
from tests.export.sources import SU, export, refusal, slow

# head_dim in the config; left None; another name for the base; interleaved; one RoPE per layer type; then the others.
CLASSES = ["LlamaConfig", "MixtralConfig", "GPTNeoXConfig", "CohereConfig", "Gemma3TextConfig"]
OTHERS = ["MistralConfig", "Qwen2Config", "Phi3Config", "StableLmConfig", "Olmo3Config"]


def scaling_for(folder, *, start_tokens=0, attention_factor=1.0, windows=None):
    geometry = geometry_of(AutoModelForCausalLM.from_pretrained(folder), 64)
    factors = torch.linspace(1.0, 4.5, geometry.pairs, dtype=torch.float64)
    if windows is not None:
        return RopeScaling(geometry, windows(geometry.pairs))
    return RopeScaling.extended(geometry, 256, factors, start_tokens, attention_factor)


@pytest.mark.parametrize("config_class", [*CLASSES, *slow(*OTHERS)])
def test_every_family_is_applied_on_both_sides_of_the_window(config_class, tmp_path):
    source = save_checkpoint(tmp_path / "source", config_class)
    scaling = scaling_for(source)
    done = export(source, scaling, tmp_path / "out")
    assert done.unsupported == []
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    # An independent look, without the exporter's own check.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = AutoModelForCausalLM.from_pretrained(source).eval()
    apply_scaling(ours, scaling)
    for length in (64, 65, 256):
        ids = torch.arange(length)[None] % 300
        with torch.inference_mode():
            torch.testing.assert_close(plain(ids).logits, ours(ids).logits, atol=2e-3, rtol=1e-3)
    assert plain.config.max_position_embeddings == 256
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 256


def test_short_texts_are_exactly_the_original_model(tmp_path):
    source = save_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    export(source, scaling_for(source), tmp_path / "out")
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, tmp_path / "out"))
    ids = torch.arange(64)[None]
    with torch.inference_mode():
        assert torch.equal(before(ids).logits, after(ids).logits)


def test_config_says_everything_everywhere(tmp_path):
    source = save_checkpoint(tmp_path / "source")
    scaling = scaling_for(source, attention_factor=1.125)
    export(source, scaling, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 256
    assert config["original_max_position_embeddings"] == 64
    assert (config["rope_theta"], config["head_dim"]) == (10000.0, 32)
    entry = config["rope_parameters"]
    # transformers 4 would warn of the base there; it stands at the top level, where everything finds it.
    assert config["rope_scaling"] == {key: value for key, value in entry.items() if key != "rope_theta"}
    assert (entry["type"], entry["rope_type"], entry["factor"]) == ("longrope", "longrope", 4.0)
    assert entry["original_max_position_embeddings"] == 64
    assert entry["attention_factor"] == entry["short_mscale"] == entry["long_mscale"] == 1.125
    assert entry["short_factor"] == [1.0] * 16
    assert entry["long_factor"] == list(scaling.windows[1].factors)
    assert RopeScaling.load(tmp_path / "out" / "scaling.json") == scaling


def test_card_tells_how_and_what_was_lost(tmp_path):
    source = save_checkpoint(tmp_path / "source")
    export(source, scaling_for(source, start_tokens=4), tmp_path / "out", allow_lossy=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "start tokens 4 (window to 256)" in card
    assert "--max-model-len 256" in card


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"start_tokens": 4}, "start tokens"),
        ({"windows": lambda d: (Window(64, (1.0,) * d), Window(256, (4.0,) * d, 0, 1.2))}, "attention factor"),
        ({"windows": lambda d: tuple(Window(n, (n / 64,) * d) for n in (64, 128, 256))}, "windows to 128"),
    ],
)
def test_nothing_is_lost_in_silence(changes, named, tmp_path):
    source = save_checkpoint(tmp_path / "source")
    scaling = scaling_for(source, **changes)
    error = refusal(export, source, scaling, tmp_path / "out")
    assert (error.code, named in str(error)) == ("not-expressible", True)
    assert not (tmp_path / "out").exists()
    done = export(source, scaling, tmp_path / "out", allow_lossy=True)
    assert any(named in loss for loss in done.unsupported)


@pytest.mark.parametrize(
    "damage",
    [
        lambda config: config.update(
            rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
        ),
        lambda config: [config[key].update(long_factor=[1.0] * 16) for key in ("rope_scaling", "rope_parameters")],
        lambda config: [config[key].update(attention_factor=1.5) for key in ("rope_scaling", "rope_parameters")],
        lambda config: config.update(original_max_position_embeddings=128),
        lambda config: [config[key].update(rope_theta=5e5) for key in ("rope_scaling", "rope_parameters")],
    ],
    ids=["dropped", "no-op factors", "attention factor", "switch", "base"],
)
def test_a_wrong_config_fails_the_proof(damage, tmp_path, monkeypatch):
    def damaged(*arguments):
        config = superset_config(*arguments)
        damage(config)
        return config

    monkeypatch.setattr(hf, "superset_config", damaged)
    source = save_checkpoint(tmp_path / "source")
    assert refusal(export, source, scaling_for(source), tmp_path / "out").code == "differs"
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_runtime_switches_where_the_first_window_ends(tmp_path):
    source = save_checkpoint(tmp_path / "source")
    scaling = scaling_for(source, windows=lambda d: (Window(100, (1.5,) * d), Window(256, (4.0,) * d)))
    assert export(source, scaling, tmp_path / "out").unsupported == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["original_max_position_embeddings"] == 100
    assert config["rope_parameters"]["factor"] == 2.56


def test_a_scaling_that_goes_nowhere_is_refused(tmp_path):
    source = save_checkpoint(tmp_path / "source")
    with pytest.raises(LongRopeError, match="reaches beyond the original window of 64 tokens"):
        export(source, scaling_for(source, windows=lambda d: (Window(32, (1.0,) * d),)), tmp_path / "out")


def test_an_incomplete_source_is_refused(tmp_path):
    source = save_checkpoint(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(LongRopeError, match="lacks 1 weights"):
        export(source, scaling_for(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_sources_are_one_line(tmp_path):
    source = save_checkpoint(tmp_path / "source")
    scaling = scaling_for(source)
    settings = source / "tokenizer_config.json"
    for damage in ("{", "[]"):
        settings.write_text(damage)
        with pytest.raises(LongRopeError, match=r"tokenizer_config\.json"):
            export(source, scaling, tmp_path / "out")
    settings.write_text("{}")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LongRopeError, match="cannot load the model"):
        export(source, scaling, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_the_weights_of_the_index_travel(tmp_path):
    source = save_checkpoint(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    for path in source.glob("tokenizer*"):
        (tmp_path / "sharded" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "sharded" / "consolidated.safetensors").write_bytes(b"another copy of everything")
    (tmp_path / "sharded" / "pytorch_model.bin").write_bytes(b"a pickle")
    export(tmp_path / "sharded", scaling_for(source), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert sum(name.startswith("model-") for name in names) > 1
    assert "model.safetensors.index.json" in names
    assert not names & {"consolidated.safetensors", "pytorch_model.bin"}


def test_into_a_link_to_an_empty_folder(tmp_path):
    source = save_checkpoint(tmp_path / "source")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(source, scaling_for(source), tmp_path / "link")
    assert (tmp_path / "real" / "config.json").is_file()
    assert not list((tmp_path / "real").glob(".partial*"))


def test_a_checkpoint_that_carries_a_scaling_is_replaced(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "original_max_position_embeddings": WINDOW}
    rope |= {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    source = save_checkpoint(tmp_path / "source", rope_parameters=rope, max_position_embeddings=128)
    export(source, scaling_for(source), tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert entry["rope_type"] == "longrope"
    assert "low_freq_factor" not in entry


@pytest.mark.parametrize("config_class", [*CLASSES, "MistralConfig", "Phi3Config"])
def test_an_export_does_not_read_as_broken(tmp_path, config_class, caplog):
    """transformers warns of unrecognized keys at each load. With the attention factor that everything computes by
    default there are none; with another one, two, which other runtimes need, and the card says why."""
    source = save_checkpoint(tmp_path / "source", config_class)
    for m, keys in ((SU, set()), (1.125, {"long_mscale", "short_mscale"})):
        done = export(source, scaling_for(source, attention_factor=m), tmp_path / f"out-{m}")
        caplog.clear()
        AutoModelForCausalLM.from_pretrained(done.path)
        warned = " ".join(record.getMessage() for record in caplog.records if "Unrecognized" in record.getMessage())
        assert set(re.findall(r"'(\w+_mscale|rope_theta|type|factor)'", warned)) == keys
        assert bool(warned) == bool(keys)
        assert ("Unrecognized keys" in (done.path / "README.md").read_text()) == bool(keys)
