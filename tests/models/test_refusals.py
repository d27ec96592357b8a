"""Models and scalings that cannot be applied: one clear line, and the model stays as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncodecConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel, T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longrope.costs.plan import plan
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, geometry_of, remove_scaling, scaled
from longrope.models.cache_argument import cache_fault
from longrope.models.chunked import base_of
from longrope.models.generation.cache import prefill
from longrope.models.inspect import inspect_model
from longrope.models.loading import open_model
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from tests.models.every_family import small_config, small_model
from tests.models.families import logits, tiny_config, tiny_model, tokens

GEOMETRY = RopeGeometry(rotary_dim=16, base=10000.0, original_length=64)


def doubled(geometry: RopeGeometry = GEOMETRY) -> RopeScaling:
    return RopeScaling.single(geometry, 128, np.full(geometry.pairs, 2.0))


def assert_refused(model: PreTrainedModel, scaling: RopeScaling, match: str, code: str = "not-rope") -> None:
    """One line, the same modules and the same logits as before."""
    before = dict(model.named_modules())
    ids = tokens(20)
    then = logits(model, ids)
    with pytest.raises(LongRopeError, match=match) as refusal:
        apply_scaling(model, scaling)
    assert refusal.value.code == code
    assert "\n" not in str(refusal.value)
    assert dict(model.named_modules()) == before
    assert torch.equal(logits(model, ids), then)
    assert not model.training


@pytest.mark.parametrize("family", ["musicgen", "musicgen_melody"])
def test_two_models_of_text_in_one(family, tmp_path) -> None:
    parts = (T5Config(num_layers=1), EncodecConfig(), CONFIG_MAPPING[f"{family}_decoder"](num_hidden_layers=1))
    config = CONFIG_MAPPING[family](**dict(zip(("text_encoder", "audio_encoder", "decoder"), parts, strict=True)))
    config.save_pretrained(tmp_path)
    for job in (inspect_model, lambda folder: plan(folder, target_length=256)):
        with pytest.raises(LongRopeError, match=f"expected one text model in {family}, found several") as refusal:
            job(str(tmp_path))
        assert refusal.value.code == "not-rope"


@pytest.mark.parametrize("family", ["t5", "mistral3", "qwen2_vl"])
def test_no_causal_language_model(family, tmp_path) -> None:
    """Models of two sequences, and of images alone: one line that names the family, from every verb."""
    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    for job in (inspect_model, lambda folder: plan(folder, target_length="1M"), open_model):
        with pytest.raises(
            LongRopeError, match=f"found {family}, which AutoModelForCausalLM of transformers"
        ) as refusal:
            job(str(tmp_path))
        assert refusal.value.code == "unsupported-model"


@pytest.mark.parametrize("wrap", ["peft", "compile"])
def test_a_wrapped_model(wrap: str) -> None:
    """The wrapper's `generate` is that of the model inside, which would get no hooks."""
    model = tiny_model("llama")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapper: Any = peft.get_peft_model(model, lora) if wrap == "peft" else torch.compile(model)
    before = dict(model.named_modules())
    with pytest.raises(LongRopeError, match="expected a transformers model to scale, found ") as applied:
        apply_scaling(wrapper, doubled())
    assert "before it is wrapped, or " + ("`model.get_base_model()`" * (wrap == "peft")) in applied.value.hint
    with pytest.raises(LongRopeError, match="expected a transformers model"), scaled(wrapper, doubled()):
        pass
    apply_scaling(model, doubled())
    with pytest.raises(LongRopeError, match="expected a transformers model") as removed:
        remove_scaling(wrapper)
    assert {applied.value.code, removed.value.code} == {"unsupported-model"}
    assert "generate" in vars(model)
    remove_scaling(model)
    assert dict(model.named_modules()) == before


def with_rotary(rotary: nn.Module) -> PreTrainedModel:
    """A llama whose rotary module is `rotary`, called but with the model's own cosines used in its place."""
    model = tiny_model("llama")
    own = model.model.rotary_emb
    model.model.rotary_emb = rotary
    rotary.__dict__["own"] = own  # not a child: the model must have no other rotary module
    return model


class Ignored(nn.Module):
    """Answers like a rotary module; what it answers is not what the attention uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(8))

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return self.__dict__["own"](x, position_ids)


def test_a_rotary_module_that_is_not_called() -> None:
    """The released code's fault: `layer.self_attn.rotary_emb` is patched and nobody calls it."""
    model = tiny_model("llama")
    own = model.model.rotary_emb
    del model.model.rotary_emb
    model.model.__dict__["rotary_emb"] = own.forward  # what the model really uses
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = type(own)(model.config)
    assert_refused(model, doubled(), "LlamaForCausalLM ignores its rotary module")


def test_a_forward_that_ignores_its_cosines() -> None:
    model = tiny_model("llama")
    ones, zeros = torch.ones(1, 1, 16), torch.zeros(1, 1, 16)
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, forward=forward, **kwargs: forward(
            *args, **(kwargs | {"position_embeddings": (ones, zeros)})
        )
    assert_refused(model, doubled(), "ignores its rotary module")


def test_a_model_without_rope() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=128, n_positions=64)).eval()
    assert_refused(model, doubled(), "expected a model with rotary position embeddings .RoPE., found gpt2 without")
    with pytest.raises(LongRopeError, match="gpt2 without"):
        geometry_of(model)


@pytest.mark.parametrize(
    ("family", "overrides", "match"),
    [
        ("zamba2", {"use_mem_rope": False}, "has no rotary module to scale"),
        ("beam", {}, "none for layers that see the whole text"),
        ("gemma4_text", {}, "rope_type 'proportional'"),
        ("granite_swa", {"layer_rope_theta": [1e4, 5e5, 1e4, 5e5]}, "rotary modules of other bases"),
        ("minimax", {}, "cannot go on from a cached text: it wants a cache of its own, MiniMaxCache"),
        ("moshi", {}, "it attends to the whole text, but its cache keeps a sliding window of it"),
        ("phimoe", {}, "PhimoeRotaryEmbedding of this transformers does not compute a scaling beyond"),
        ("recurrent_gemma", {}, "the config of RecurrentGemmaForCausalLM cannot state a scaling"),
    ],
)
def test_inspect_and_plan_refuse_what_a_search_refuses(family, overrides, match, tmp_path):
    """From the config alone: no weights are there."""
    small_config(family, **overrides).save_pretrained(tmp_path)
    for job in (inspect_model, lambda model: plan(model, 256)):
        with pytest.raises(LongRopeError, match=match) as error:
            job(tmp_path)
        assert error.value.code in ("not-rope", "cannot-generate", "not-expressible")


@pytest.mark.parametrize(
    ("family", "more"), [("mistral", {"sliding_window": 24}), ("llama4_text", {}), ("gemma3_text", {})]
)
def test_a_cache_that_forgets_fits_masks_that_slide(family, more):
    model = small_model(small_config(family, **more))
    assert any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=model.config).layers)
    assert cache_fault(model, base_of(model)) == ""


def test_states_that_do_not_go_on_are_refused():
    """RecurrentGemma goes on from its states a token at a time only: a text read in parts would be wrong, silently."""
    model = small_model(small_config("recurrent_gemma"))
    geometry = geometry_of(model)
    scaled = apply_scaling(model, RopeScaling.extended(geometry, 256, np.full(geometry.pairs, 4.0)))
    ids = tokens(100) % 300
    with pytest.raises(LongRopeError, match="cannot go on from a cached text: its hidden states are off") as error:
        prefill(scaled, ids, chunk_size=32)
    assert error.value.code == "cannot-generate"


def test_a_config_that_promises_a_rotary_module_the_model_lacks() -> None:
    model = tiny_model("llama")
    own = model.model.rotary_emb
    del model.model.rotary_emb
    model.model.__dict__["rotary_emb"] = own.forward
    assert_refused(model, doubled(), "LlamaForCausalLM has no rotary module")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rotary_dim": 32}, "the scaling is for rotary_dim 32; this model has rotary_dim 16"),
        ({"base": 500000.0}, "the scaling is for base 500000; this model has base 10000"),
    ],
)
def test_a_scaling_for_another_model(change: dict[str, Any], match: str) -> None:
    values = {"rotary_dim": 16, "base": 10000.0, "original_length": 64} | change
    assert_refused(tiny_model("llama"), doubled(RopeGeometry(**values)), match, "wrong-geometry")


def test_a_refused_scaling_leaves_the_applied_one() -> None:
    model = tiny_model("llama")
    scaled = apply_scaling(model, doubled())
    ids = tokens(20)
    then = logits(model, ids)
    with pytest.raises(LongRopeError, match="rotary_dim 32"):
        apply_scaling(model, doubled(RopeGeometry(rotary_dim=32, base=10000.0, original_length=64)))
    assert model.model.rotary_emb is scaled.rotaries[0]
    assert torch.equal(logits(model, ids), then)


def test_the_original_length_is_the_scalings_to_choose() -> None:
    other = RopeGeometry(rotary_dim=16, base=10000.0, original_length=48)
    assert apply_scaling(tiny_model("llama"), doubled(other)).scaling.geometry == other
    assert geometry_of(tiny_model("llama"), 48) == other


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    own = model.model.rotary_emb

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    model.lm_head.forward = failing
    model.train()
    with pytest.raises(MemoryError):
        apply_scaling(model, doubled())
    assert model.model.rotary_emb is own
    assert all(module.training for module in model.modules())


# Rotary modules of other kinds.


class Columns(Ignored):
    """Cosines of a given number of columns, in any order."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        angle = position_ids[..., None].float() / torch.arange(1, self.columns + 1)
        return angle.cos(), angle.sin()


class Raising(Ignored):
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("rotary", "match"),
    [
        (Columns(12), r"cannot scale Columns: its config says 8 rotary pairs, but it gives 12 columns, not 16"),
        (Columns(16), r"cannot scale Columns: its cosines are laid out neither in halves nor interleaved"),
        (Raising(), r"cannot scale Raising: it does not map .* two lines"),
    ],
)
def test_unknown_rotary_modules(rotary: nn.Module, match: str) -> None:
    model = with_rotary(rotary)
    with pytest.raises(LongRopeError, match=match) as refusal:
        apply_scaling(model, doubled())
    assert refusal.value.code == "not-rope"
    assert "\n" not in str(refusal.value)
    assert model.model.rotary_emb is rotary


def test_rope_only_in_sliding_layers() -> None:
    config = tiny_config("gemma3_text")
    model = SimpleNamespace(config=config)
    config.rope_parameters = {"sliding_attention": config.rope_parameters["sliding_attention"]}
    with pytest.raises(
        LongRopeError, match="none for layers that see the whole text; only full-attention layers can be scaled"
    ):
        geometry_of(model)
