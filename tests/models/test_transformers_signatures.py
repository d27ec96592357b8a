"""What longrope's hooks and stand-ins rely on in transformers: names of arguments, attributes and methods.

A release that renames one of them computes something else, often without an error. Each test names the file of ours
that relies on it; where it fails with a new release, that file has to follow before the release is a known one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from longrope.models.cache_argument import CACHE_NAMES, cache_argument, forward_argument
from longrope.train.config import FinetuneConfig
from longrope.train.trainer import RunCallback, WindowTrainer, training_arguments
from tests.models.families import CODE_PATHS, tiny_model, tokens


def names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def takes_more(function: Callable[..., Any]) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values())


# models/generation/hooks.py


def assert_cache_has_one_name(model: type[PreTrainedModel]) -> None:
    prepare = model.prepare_inputs_for_generation
    assert names(prepare)[:2] == ["self", "input_ids"], model
    assert "next_sequence_length" in names(prepare) or takes_more(prepare), model
    base = GenerationMixin.prepare_inputs_for_generation  # of a class that hands it all on
    assert cache_argument(prepare, base) == cache_argument(model.forward), model
    assert {"input_ids", "position_ids", "attention_mask"} <= set(names(model.forward)), model


@pytest.mark.parametrize("family", [*CODE_PATHS, "phi3"])
def test_generation_prepares_what_the_forward_takes(family: str) -> None:
    model = tiny_model(family)
    assert_cache_has_one_name(type(model))
    assert forward_argument(model) == forward_argument(model.base_model)


@pytest.mark.slow
def test_every_family_prepares_what_the_forward_takes() -> None:
    """All decoder-only causal language models with positions; importing them takes 20 s."""
    checked = 0
    for config in list(MODEL_FOR_CAUSAL_LM_MAPPING):
        for model in mapped if isinstance(mapped := MODEL_FOR_CAUSAL_LM_MAPPING[config], tuple) else (mapped,):
            taken = set(names(model.forward))  # an assistant takes no cache
            rotary = config.model_type != "xlm"  # without RoPE, and with a cache of its own
            if issubclass(model, GenerationMixin) and rotary and "position_ids" in taken and taken & set(CACHE_NAMES):
                assert_cache_has_one_name(model)
                checked += 1
    assert checked > 90


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_arguments_that_generate_passes(family: str) -> None:
    """One that is not known here may carry the cache, or move the positions by which windows are chosen."""
    model, seen = tiny_model(family), []
    own = model.prepare_inputs_for_generation

    def prepare(*args: Any, **kwargs: Any) -> Any:
        seen.append((len(args), kwargs))
        return own(*args, **kwargs)

    model.prepare_inputs_for_generation = prepare
    model.generate(tokens(5), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    known = {"next_sequence_length", "is_first_iteration", "attention_mask", "position_ids", "use_cache"}
    known |= {"logits_to_keep", "return_dict", *CACHE_NAMES}
    for place, (positional, given) in enumerate(seen):
        assert positional == 1
        assert given.keys() <= known
        assert isinstance(given[forward_argument(model)], DynamicCache)
        assert given["position_ids"].shape == (1, 5 + place)
        assert given["next_sequence_length"] == (5 if place == 0 else 1)
    assert len(seen) == 3


def test_generate_and_its_ways() -> None:
    assert names(GenerationMixin.generate)[:3] == ["self", "inputs", "generation_config"]
    assert "assistant_model" in names(GenerationMixin.generate)
    assert names(GenerationConfig.get_generation_mode) == ["self", "assistant_model"]
    assert callable(GenerationMixin.init_continuous_batching)
    config = GenerationConfig()
    assert {"guidance_scale", "prefill_chunk_size", "cache_implementation", "max_new_tokens"} <= vars(config).keys()
    ways = {"greedy_search", "sample", "beam_search", "beam_sample"}
    refused = {"contrastive_search", "assisted_generation", "dola_generation"}
    refused |= {"constrained_beam_search", "group_beam_search"}
    assert {str(mode.value) for mode in GenerationMode} == ways | refused


# models/generation/cache.py, rerotate.py


def test_a_dynamic_cache() -> None:
    cache = DynamicCache(config=tiny_model("gemma3_text").config)
    assert {"config", "offloading"} <= set(names(DynamicCache.__init__))
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, DynamicLayer]
    keys = torch.arange(40.0).view(1, 1, 5, 8)
    for place, layer in enumerate(cache.layers):
        assert not layer.is_initialized
        assert layer.is_sliding == (place == 0)
        cache.update(keys, keys + 1, place)
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, keys + 1)
    assert (cache.get_seq_length(), cache.offloading) == (5, False)
    cache.reset()
    assert cache.get_seq_length() == 0


# models/rotary.py, apply.py, saving.py


@pytest.mark.parametrize("family", CODE_PATHS)
def test_rotary_modules(family: str) -> None:
    model = tiny_model(family)
    found = [module for module in model.modules() if any(n.endswith("inv_freq") for n, _ in module.named_buffers())]
    rotary = next(module for module in found if not list(module.children()))
    expected = ["x", "position_ids", *(["layer_type"] if family == "gemma3_text" else [])]
    assert names(rotary.forward) == expected
    assert names(type(rotary).__init__)[:2] == ["self", "config"]
    assert names(type(rotary)(model.config).forward) == expected


def test_saving() -> None:
    """`save_pretrained` of a model writes its config by `to_json_file`, which stands on the instance for a moment."""
    assert names(PreTrainedModel.save_pretrained)[:2] == ["self", "save_directory"]
    assert names(PreTrainedConfig.to_json_file)[:2] == ["self", "json_file_path"]
    assert "self.to_json_file(" in inspect.getsource(PreTrainedConfig.save_pretrained)
    assert "self.save_pretrained(" in inspect.getsource(PreTrainedModel.push_to_hub)
    assert hasattr(tiny_model("llama").config, "_attn_implementation")


# models/scoring.py, chunked.py, train/loss.py


def test_models_below_their_heads() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        output = model.base_model(input_ids=tokens(5), position_ids=torch.arange(5)[None], use_cache=False)
    again = type(output)(last_hidden_state=output.last_hidden_state)
    assert isinstance(output, BaseModelOutputWithPast)
    assert again.last_hidden_state is output.last_hidden_state
    assert {"inputs_embeds", "use_cache"} <= set(names(type(model).forward))
    assert model.get_output_embeddings() is model.lm_head


# models/context_parallel.py


def test_attention_interfaces() -> None:
    arguments = ["module", "query", "key", "value", "attention_mask", "dropout", "scaling"]
    assert names(sdpa_attention_forward)[:7] == arguments
    assert {"mask_function", "local_size", "use_vmap"} <= set(names(sdpa_mask))
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert names(interface.register) == ["key", "value"]
    assert names(PreTrainedModel.set_attn_implementation)[:2] == ["self", "attn_implementation"]


# train/trainer.py


def test_the_trainer(tmp_path) -> None:
    for ours, theirs in ((WindowTrainer.compute_loss, Trainer.compute_loss),):
        assert names(ours) == names(theirs)
    assert Trainer.loss_is_scaled_for_ga is None
    for event in ("on_train_begin", "on_log", "on_save"):
        assert names(getattr(TrainerCallback, event))[:4] == ["self", "args", "state", "control"]
        assert names(getattr(RunCallback, event))[:4] == ["self", "args", "state", "control"]
    arguments = training_arguments(FinetuneConfig(length=64), tmp_path, cpu=True)
    known = {field.name for field in fields(TrainingArguments)}
    assert {"activation_checkpointing", "train_sampling_strategy", "gradient_accumulation_steps"} <= known
    assert arguments.gradient_accumulation_steps >= 1
