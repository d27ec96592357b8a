"""The hook on stock `model.generate`: every way of generating it allows is right, every other is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaForSequenceClassification, PreTrainedModel, StaticCache

from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, geometry_of, remove_scaling
from longrope.models.cache_argument import CACHE_NAMES, forward_argument
from longrope.models.generation.generate import generation
from longrope.models.generation.hooks import CacheHook
from longrope.rope.scaling import RopeScaling
from tests.models.families import VOCABULARY, WINDOW, tiny_config, tiny_model, tokens
from tests.models.generation.windows import LAST, SECOND, three_windows, uncached

IDS = tokens(WINDOW - 2)
COUNT = SECOND - WINDOW + 4  # across both limits
QUIET: dict[str, Any] = {"eos_token_id": VOCABULARY, "pad_token_id": 0, "do_sample": False}


def scaled_model(family: str = "llama") -> PreTrainedModel:
    model = tiny_model(family)
    apply_scaling(model, three_windows(model))
    return model


def run(model: PreTrainedModel, ids: Tensor = IDS, **options: Any) -> Any:
    return model.generate(ids, **QUIET | {"max_new_tokens": COUNT} | options)


@pytest.mark.parametrize("family", ["phi3", "gemma2"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_beams": 2},
        {"num_return_sequences": 3, "do_sample": True},
        {"repetition_penalty": 1.3},
    ],
)
def test_every_way_of_choosing_tokens(family: str, options: dict[str, Any]) -> None:
    model = scaled_model(family)
    found = []
    for use_cache in (False, True):
        torch.manual_seed(3)
        found.append(run(model, tokens(WINDOW - 2, batch=2), use_cache=use_cache, **options))
    assert torch.equal(*found)


def test_a_configuration_object() -> None:
    model = scaled_model()
    expected = run(model)
    config = GenerationConfig(max_new_tokens=COUNT, eos_token_id=VOCABULARY, pad_token_id=0, do_sample=False)
    assert torch.equal(model.generate(IDS, config), expected)
    assert torch.equal(model.generate(inputs=IDS, generation_config=config), expected)
    assert torch.equal(model.generate(input_ids=IDS, generation_config=config), expected)


# A cache that outlives one call.


def test_a_conversation_goes_on_in_its_cache() -> None:
    model = scaled_model()
    cache = DynamicCache(config=model.config)
    text = IDS[:, :40]
    for question in (tokens(10, seed=1), tokens(20, seed=2), tokens(3, seed=3)):
        text = torch.cat([text, question], dim=1)
        expected = run(model, text, max_new_tokens=4)
        found = run(model, text, max_new_tokens=4, **{forward_argument(model): cache})
        assert torch.equal(found, expected)
        text = found
    assert text.shape[1] > SECOND


def marked(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    """A cache of all but the last of `ids` and one more token, as generate leaves it."""
    cache = DynamicCache(config=model.config)
    run(model, ids, max_new_tokens=1, **{forward_argument(model): cache})
    return cache


def test_a_cut_cache_keeps_the_window_of_its_keys() -> None:
    model = scaled_model()
    cache = marked(model, tokens(WINDOW + 6))
    cache.crop(-36)
    again = copy.deepcopy(cache)
    ids = tokens(WINDOW + 6)[:, : WINDOW - 20]
    expected, _ = uncached(apply_scaling(model, three_windows(model)), ids, 5)
    for one in (cache, again):
        assert torch.equal(run(model, ids, max_new_tokens=5, **{forward_argument(model): one}), expected)


def test_a_cache_from_elsewhere_is_filled_again() -> None:
    model = scaled_model()
    ids = tokens(WINDOW + 10)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in ids[:, :-1].split(30, dim=1):  # under two windows: no good
            model(input_ids=piece, **{forward_argument(model): cache})
    assert torch.equal(
        run(model, ids, max_new_tokens=4, **{forward_argument(model): cache}), run(model, ids, max_new_tokens=4)
    )


def test_new_tokens_only() -> None:
    """A cache may be continued with new tokens alone while the window stays; a change of window needs the text."""
    model = scaled_model()
    new = tokens(5, seed=1)
    for length, right in ((30, True), (62, False)):
        cache = marked(model, tokens(length))
        whole = torch.cat([tokens(length), new], dim=1)
        given = {forward_argument(model): cache, "attention_mask": torch.ones_like(whole), "max_new_tokens": 3}
        if right:
            expected = run(model, whole, max_new_tokens=3)[:, length:]
            assert torch.equal(run(model, new, **given), expected)
        else:
            with pytest.raises(LongRopeError, match="has to be filled again") as error:
                run(model, new, **given)
            assert error.value.code == "whole-text-needed"


def test_nothing_new() -> None:
    model = scaled_model()
    with pytest.raises(LongRopeError, match="expected new tokens after the 30 that the cache holds"):
        run(model, tokens(30), **{forward_argument(model): marked(model, tokens(30))})


# A cache that does not come, or comes under another name.


def renamed(model: PreTrainedModel, name: str | None) -> None:
    """Make `generate` pass `model` its cache under another name, as a later transformers may; None: not at all."""
    hook = model.prepare_inputs_for_generation

    def prepare(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.pop(forward_argument(model))
        return hook(*args, **kwargs | ({} if name is None else {name: cache}))

    model.prepare_inputs_for_generation = prepare


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize("name", [*CACHE_NAMES, "kv_store"])
def test_the_cache_is_found_under_every_name(family: str, name: str) -> None:
    """transformers 5.24 calls it `cache`, 5.23 `past_key_values`."""
    model = tiny_model(family)
    scaled = apply_scaling(model, three_windows(model))
    expected, _ = uncached(scaled, IDS, COUNT)
    renamed(model, name)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_cache_that_does_not_arrive_is_an_error(family: str) -> None:
    """A hook that does not see the cache would leave stale keys in it: wrong text, and no error."""
    model = tiny_model(family)
    apply_scaling(model, three_windows(model))
    renamed(model, None)
    with pytest.raises(LongRopeError, match=r"expected .* to get a cache from generate, found none") as error:
        run(model)
    assert error.value.code == "no-cache"


def test_a_cache_of_an_unknown_kind_is_an_error() -> None:
    """It is not recognised under a name that is not known, and the forward is not of the whole text."""
    model = scaled_model()
    positions = torch.arange(WINDOW + 1)[None]
    with pytest.raises(LongRopeError, match=f"none in a forward of 1 of {WINDOW + 1} tokens"):
        model.prepare_inputs_for_generation(
            tokens(WINDOW + 1), next_sequence_length=1, position_ids=positions, kv_store=object()
        )


def test_two_caches_are_an_error() -> None:
    model = scaled_model()
    given = {name: DynamicCache(config=model.config) for name in CACHE_NAMES}
    with pytest.raises(LongRopeError, match="expected one cache, found cache and past_key_values"):
        model.prepare_inputs_for_generation(IDS, position_ids=torch.arange(IDS.shape[1])[None], **given)


# Refusals before any forward.


def _assistant(model: PreTrainedModel) -> dict[str, Any]:
    return {"assistant_model": tiny_model("llama")}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (lambda _: {"cache_implementation": "static"}, "cache_implementation 'static'"),
        (lambda _: {"cache_implementation": "offloaded"}, "cache_implementation 'offloaded'"),
        (lambda _: {"generation_config": GenerationConfig(cache_implementation="static")}, "'static'"),
        (
            lambda model: {forward_argument(model): StaticCache(model.config, max_cache_len=256)},
            "StaticCache of StaticLayer",
        ),
        (
            lambda model: {forward_argument(model): DynamicCache(config=model.config, offloading=True)},
            "DynamicCache of DynamicLayer, offloaded",
        ),
        (_assistant, "assisted generation is not right across windows"),
        (lambda _: {"prompt_lookup_num_tokens": 3}, "assisted generation is not right across windows"),
        (lambda _: {"prefill_chunk_size": 16}, "expected no prefill_chunk_size"),
        (lambda _: {"guidance_scale": 1.5}, "guidance .* is not right across windows"),
        (lambda _: {"penalty_alpha": 0.6, "top_k": 4}, "contrastive search is not right"),
    ],
)
def test_refused_across_windows(options: Callable[[PreTrainedModel], dict[str, Any]], match: str) -> None:
    model = scaled_model()
    given = options(model)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(LongRopeError, match=match) as error:
        run(model, **given)
    assert error.value.code in ("not-across-windows", "cannot-generate")


def test_embeddings_and_batching_are_refused() -> None:
    model = scaled_model()
    embeds = model.get_input_embeddings()(IDS)
    with pytest.raises(LongRopeError, match="expected input_ids, found inputs_embeds"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
    with pytest.raises(LongRopeError, match="continuous batching is not right"):
        model.generate_batch([[1, 2, 3]])


def test_what_is_no_text_is_refused_where_it_would_be_lost() -> None:
    model = scaled_model()
    hook = model.prepare_inputs_for_generation
    positions = torch.arange(WINDOW + 1)[None]
    given = {forward_argument(model): marked(model, tokens(WINDOW - 1))}
    with pytest.raises(LongRopeError, match="expected text only, found pixel_values"):
        hook(
            tokens(WINDOW + 1),
            next_sequence_length=1,
            position_ids=positions,
            pixel_values=torch.ones(1),
            **given,
        )
    with pytest.raises(LongRopeError, match="expected position_ids of shape"):
        hook(tokens(5), position_ids=torch.zeros(3, 1, 5), **given)


def test_with_one_window_nothing_is_refused() -> None:
    model = tiny_model("llama")
    geometry = geometry_of(model)
    scaled = apply_scaling(model, RopeScaling.single(geometry, LAST, (2.0,) * geometry.pairs))
    ways = ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 16})
    expected, _ = uncached(scaled, IDS, 6)
    for way in ways:
        assert torch.equal(run(model, max_new_tokens=6, **way), expected)
    embeds = model.get_input_embeddings()(IDS)
    found = model.generate(inputs_embeds=embeds, **QUIET | {"max_new_tokens": 6})
    assert torch.equal(found, expected[:, IDS.shape[1] :])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS[:, :-1], **{forward_argument(model): cache})
    assert torch.equal(run(model, IDS, max_new_tokens=6, **{forward_argument(model): cache}), expected)


def test_numbers_of_the_caller() -> None:
    """Tensors in the place of a window's numbers: stock generation, its prompt in one piece."""
    model = tiny_model("llama")
    scaled = apply_scaling(model, three_windows(model))
    factors = torch.linspace(1, 3, scaled.scaling.geometry.pairs, dtype=torch.float64)
    with generation(scaled, prefill_chunk=16), scaled.using(scaled.scaling.windows[2], factors):
        expected, _ = uncached(scaled, IDS, 5)
        assert torch.equal(run(model, max_new_tokens=5), expected)


# The hook and the model.


def test_the_hook_comes_and_goes_with_the_scaling() -> None:
    model = tiny_model("llama")
    names = set(vars(model))
    expected = run(model)
    apply_scaling(model, three_windows(model))
    apply_scaling(model, three_windows(model))
    hook = model.prepare_inputs_for_generation
    assert isinstance(hook, CacheHook)
    assert not isinstance(hook.own, CacheHook)
    assert not torch.equal(run(model), expected)
    remove_scaling(model)
    remove_scaling(model)
    assert set(vars(model)) == names
    assert torch.equal(run(model), expected)


def test_a_method_of_the_instance_comes_back() -> None:
    model = tiny_model("llama")
    calls: list[int] = []
    own = model.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.generate = counting
    apply_scaling(model, three_windows(model))
    run(model, max_new_tokens=1)
    remove_scaling(model)
    assert model.generate is counting
    assert calls == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_generates_with_its_own_weights(copied: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    model = scaled_model()
    expected = run(model)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(other), expected)
    remove_scaling(other)
    assert "generate" not in vars(other)


def test_a_model_without_generation() -> None:
    model = LlamaForSequenceClassification(tiny_config("llama")).eval()
    geometry = geometry_of(model)
    scaling = RopeScaling.extended(geometry, LAST, (2.0,) * geometry.pairs)
    assert "generate" not in vars(apply_scaling(model, scaling).model)
    remove_scaling(model)
    with pytest.raises(LongRopeError, match="expected a model that generates text"), generation(model, scaling):
        pass
    assert model.model.rotary_emb.__class__.__name__ == "LlamaRotaryEmbedding"
