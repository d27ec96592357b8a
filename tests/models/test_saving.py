"""`save_pretrained` while a scaling is applied: plain transformers reloads the scaled model, or nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from longrope.errors import LongRopeError
from longrope.export.export import export_checkpoint
from longrope.models.apply import apply_scaling, geometry_of, remove_scaling, scaled
from longrope.models.loading import open_model
from longrope.models.saving import plain_saves
from longrope.rope.closed_forms import yarn
from longrope.rope.scaling import RopeScaling, Window
from tests.checkpoints import save_checkpoint, tokenizer
from tests.models.families import FAMILIES, WINDOW, logits, tiny_config, tiny_model, tokens

TARGET = 4 * WINDOW


def scaling_of(model: PreTrainedModel, **options: Any) -> RopeScaling:
    geometry = geometry_of(model)
    return RopeScaling.extended(geometry, TARGET, yarn(geometry, TARGET), **options)


def assert_reloads(folder: Path, model: PreTrainedModel, scaling: RopeScaling) -> None:
    """transformers alone computes from `folder` as `model` does under `scaling`, inside and beyond the window."""
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    for length in (WINDOW, TARGET - 5):
        ids = tokens(length)
        with scaled(model, scaling):
            expected = logits(model, ids)
        torch.testing.assert_close(logits(reloaded, ids), expected, rtol=0, atol=3e-4 * float(expected.std()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_scaled_one(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    scaling = scaling_of(model, attention_factor=1.2)
    before, attributes = model.config.to_dict(), set(vars(model.config))
    apply_scaling(model, scaling)
    model.save_pretrained(tmp_path)
    assert RopeScaling.load(tmp_path / "scaling.json") == scaling
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["longrope"]["form"] == "hf"
    assert set(vars(model.config)) == attributes
    own = ("dtype", "architectures")  # transformers sets them whenever it saves
    assert {**model.config.to_dict(), **{name: before.get(name) for name in own}} == before
    remove_scaling(model)
    assert_reloads(tmp_path, model, scaling)
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("config_class", ["LlamaConfig", "Gemma3TextConfig"])
def test_the_config_is_that_of_an_export(config_class: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "model", config_class)
    model = AutoModelForCausalLM.from_pretrained(source)
    scaling = scaling_of(model)
    export_checkpoint(str(source), scaling, tmp_path / "export")
    with scaled(model, scaling):
        model.save_pretrained(tmp_path / "saved")
    exported, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("export", "saved"))
    assert "as it is" in exported["longrope"].pop("proof")  # a save compares nothing
    assert saved == exported
    assert RopeScaling.load(tmp_path / "saved/scaling.json") == RopeScaling.load(tmp_path / "export/scaling.json")


def test_without_a_scaling_saves_are_plain(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "before")
    with scaled(model, scaling_of(model)), plain_saves(model):
        model.save_pretrained(tmp_path / "plain")
    with scaled(model, RopeScaling.original(geometry_of(model))):  # computes the same as the config
        model.save_pretrained(tmp_path / "original")
    model.save_pretrained(tmp_path / "after")
    configs = {(folder / "config.json").read_text("utf-8") for folder in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 4
    assert len(configs) == 1
    assert not list(tmp_path.glob("*/scaling.json"))


def start_tokens(scaling: RopeScaling) -> RopeScaling:
    short, long = scaling.windows
    return replace(scaling, windows=(short, replace(long, start_tokens=4)))


def three_windows(scaling: RopeScaling) -> RopeScaling:
    return scaling.with_window(Window(2 * WINDOW, scaling.windows[1].factors))


def two_attention_factors(scaling: RopeScaling) -> RopeScaling:
    short, long = scaling.windows
    return replace(scaling, windows=(short, replace(long, attention_factor=1.5)))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [(start_tokens, "start tokens"), (three_windows, "windows to 128"), (two_attention_factors, "attention factor 1")],
)
@pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
def test_a_scaling_that_no_config_expresses(change: Any, fragment: str, method: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    apply_scaling(model, change(scaling_of(model)))
    with pytest.raises(LongRopeError, match=fragment) as error:
        getattr(model, method)(str(tmp_path / "new"))
    assert error.value.code == "not-expressible"
    assert "remove_scaling" in error.value.hint
    assert not (tmp_path / "new").exists()


def test_a_family_that_ignores_its_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model("llama")
    plain = type(model.model.rotary_emb)(model.config)

    class Deaf(type(plain)):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(model.config)

    model.model.rotary_emb = Deaf(model.config)
    apply_scaling(model, scaling_of(model))
    with pytest.raises(LongRopeError, match="does not apply a scaling that its config states") as error:
        model.save_pretrained(tmp_path)
    assert error.value.code == "not-expressible"

    class Other(Deaf):
        def __init__(self, config: Any, more: int) -> None:
            super().__init__(config)

    model.model.rotary_emb.original.__class__ = Other
    with pytest.raises(LongRopeError, match="cannot be loaded with this scaling"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_push_to_hub_uploads_the_scaled_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model("llama")
    scaling = scaling_of(model)
    apply_scaling(model, scaling)
    uploaded: list[dict[str, Any]] = []
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", FakeHub)
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: FakeHub())

    def upload(folder: str, *_: Any, **__: Any) -> None:
        uploaded.append(json.loads((Path(folder) / "config.json").read_text("utf-8")))

    model._upload_modified_files = upload
    model.push_to_hub("owner/model")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="owner/model")
    assert [config["rope_parameters"]["long_factor"] for config in uploaded] == [list(scaling.windows[1].factors)] * 2


class FakeHub:
    repo_id = "owner/model"

    def create_repo(self, *_: Any, **__: Any) -> FakeHub:
        return self

    def save(self, *_: Any) -> None: ...


def test_a_checkpoint_that_carries_another_scaling(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": WINDOW}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=2 * WINDOW)
    scaling = scaling_of(model)
    apply_scaling(model, scaling)
    model.save_pretrained(tmp_path)
    remove_scaling(model)
    assert_reloads(tmp_path, model, scaling)


def test_a_merged_adapter_and_a_trainer(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(save_checkpoint(tmp_path / "model"))
    scaling = scaling_of(model)
    apply_scaling(model, scaling)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter/config.json").exists()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", state_dict=merged.state_dict(), max_shard_size="50KB")
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True)
    Trainer(merged, arguments, processing_class=tokenizer()).save_model(str(tmp_path / "trainer"))
    remove_scaling(merged)
    for name in ("merged", "trainer"):
        assert_reloads(tmp_path / name, merged, scaling)
        assert open_model(tmp_path / name, tokenizer()).context_length == TARGET


def test_a_model_of_images_and_text(tmp_path: Path) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(text_config=tiny_config("llama"), vision_config=vision, image_token_index=127)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    ids = tokens(2 * WINDOW) % 127
    with scaled(model, scaling_of(model)):
        expected = logits(model, ids)
        model.save_pretrained(tmp_path)
    reloaded = logits(LlavaForConditionalGeneration.from_pretrained(tmp_path), ids)
    assert (logits(model, ids) - expected).abs().max() > 0.1 * expected.std()
    torch.testing.assert_close(reloaded, expected, rtol=0, atol=1e-3 * float(expected.std()))
