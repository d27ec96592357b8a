"""Cached keys turned from one window to another: exact in layer 0 of every family, refused where it cannot be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling
from longrope.models.cache_argument import with_cache
from longrope.models.generation.cache import fill, new_cache
from longrope.models.generation.generate import generation
from longrope.models.generation.rerotate import Pairing, Rerotation, angle_difference
from longrope.models.scaled import ScaledModel
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from tests.models.families import FAMILIES, WINDOW, tiny_model, tokens
from tests.models.generation.windows import SECOND, three_windows, uncached

HALVES, INTERLEAVED = Pairing(0, False), Pairing(0, True)
PAIRINGS: dict[str, tuple[Pairing | None, Pairing | None]] = {
    "cohere": (INTERLEAVED, INTERLEAVED),
    "glm": (INTERLEAVED, INTERLEAVED),  # whose cosines are laid out in halves
    "smollm3": (HALVES, None),  # a layer without RoPE
    "gemma3_text": (None, HALVES),  # a sliding layer with a RoPE of its own
    "olmo3": (None, HALVES),
}


def cache_under(scaled: ScaledModel, ids: Tensor, window: Window) -> DynamicCache:
    cache = new_cache(scaled.model)
    fill(scaled, cache, ids, window)
    return cache


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_is_exact(family: str) -> None:
    """With attention factors and start tokens; a layer that is not scaled keeps its keys."""
    model = tiny_model(family)
    scaled = apply_scaling(model, three_windows(model))
    rerotation = Rerotation(scaled)
    assert rerotation.pairings == PAIRINGS.get(family, (HALVES, HALVES))
    ids = tokens(40, batch=2)
    windows = scaled.scaling.windows
    for old, new in ((0, 1), (1, 2), (2, 0)):
        cache, expected = (cache_under(scaled, ids, windows[index]) for index in (old, new))
        held = [layer.keys.clone() for layer in cache.layers]
        rerotation.turn(cache, torch.arange(40)[None], windows[old], windows[new])
        torch.testing.assert_close(cache.layers[0].keys, expected.layers[0].keys, rtol=0, atol=2e-5)
        for layer, before, pairing in zip(cache.layers, held, rerotation.pairings, strict=True):
            assert ((layer.keys - before).abs().max() > 0.1) == (pairing is not None)


def test_the_difference_of_angles_far_out() -> None:
    geometry = RopeGeometry(128, 500_000.0, 8192)
    old = Window(8192, np.linspace(1, 3, 64), attention_factor=1.1)
    new = Window(2**21, np.linspace(1, 300, 64), start_tokens=4, attention_factor=1.3)
    positions = torch.tensor([0, 1, 3, 4, 8191, 131_071, 2**21 - 1])
    cos, sin = angle_difference(geometry, old, new, positions)
    n = positions.double().numpy()[:, None]
    start = n < new.start_tokens
    angle = n * geometry.inv_freq * (np.where(start, 1, 1 / np.asarray(new.factors)) - 1 / np.asarray(old.factors))
    ratio = 1.3 / 1.1
    assert np.abs(cos.numpy() - ratio * np.cos(angle)).max() < 1e-5
    assert np.abs(sin.numpy() - ratio * np.sin(angle)).max() < 1e-5


@pytest.mark.parametrize(("interleaved", "pair"), [(False, (3, 5)), (True, (3, 4))])
def test_which_numbers_turn(interleaved: bool, pair: tuple[int, int]) -> None:
    keys = torch.zeros(1, 1, 1, 8)
    keys[..., pair[0]] = 1.0
    angles = torch.full((1, 1, 2), math.pi / 2)
    turned = Pairing(3, interleaved).turn(keys, angles.cos(), angles.sin())
    expected = torch.zeros(8)
    expected[pair[1]] = 1.0
    torch.testing.assert_close(turned[0, 0, 0], expected)


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox"])
def test_with_one_layer_nothing_is_lost(family: str) -> None:
    """Keys and values of layer 0 come from the embeddings: turning is computing again."""
    model = tiny_model(family, num_hidden_layers=1)
    ids, count = tokens(WINDOW - 2, batch=2), SECOND - WINDOW + 5
    with generation(model, three_windows(model), switch="rerotate", prefill_chunk=24) as scaled:
        expected, expected_logits = uncached(scaled, ids, count)
        options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": 128}
        found = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(found.sequences, expected)
    torch.testing.assert_close(torch.stack(found.logits, dim=1), expected_logits, rtol=0, atol=1e-4)


def test_a_sliding_layer_and_padded_rows() -> None:
    """A sliding layer holds the last keys only; a row's positions begin after its padding."""
    model = tiny_model("gemma2", num_hidden_layers=1, layer_types=["sliding_attention"])
    ids = tokens(WINDOW - 2, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    scaling = three_windows(model)
    longer = type(scaling)(scaling.geometry, (scaling.windows[2],))
    with generation(model, scaling, switch="rerotate") as scaled:
        rerotation = Rerotation(scaled)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        caches = []
        for window in (scaling.windows[1], longer.windows[0]):
            cache = new_cache(model)
            fill(scaled, cache, ids, window, position_ids=positions, attention_mask=mask)
            caches.append(cache)
        rerotation.turn(caches[0], positions, scaling.windows[1], longer.windows[0])
    turned, exact = (cache.layers[0].keys for cache in caches)
    assert turned.shape[-2] == 23  # the sliding window of 24 less the token to come
    torch.testing.assert_close(turned, exact, rtol=0, atol=2e-5)


def test_deeper_layers_are_nearer_than_before() -> None:
    model = tiny_model("llama")
    scaled = apply_scaling(model, three_windows(model))
    windows = scaled.scaling.windows
    ids = tokens(60)
    cache, expected = (cache_under(scaled, ids, windows[index]) for index in (0, 2))
    exact = expected.layers[1].keys
    before = (cache.layers[1].keys - exact).norm()
    Rerotation(scaled).turn(cache, torch.arange(60)[None], windows[0], windows[2])
    after = (cache.layers[1].keys - exact).norm()
    assert 0.01 * exact.norm() < after < 0.9 * before


def test_half_precision_is_turned_in_float32() -> None:
    model = tiny_model("llama").bfloat16()
    scaled = apply_scaling(model, three_windows(model))
    windows = scaled.scaling.windows
    ids = tokens(60)
    cache, expected = (cache_under(scaled, ids, windows[index]) for index in (0, 2))
    Rerotation(scaled).turn(cache, torch.arange(60)[None], windows[0], windows[2])
    turned, exact = cache.layers[0].keys, expected.layers[0].keys
    assert turned.dtype == torch.bfloat16
    assert (turned - exact).float().abs().max() <= 2**-6 * exact.float().abs().max()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_change_of_window_reads_one_token(family: str) -> None:
    model = tiny_model(family)
    seen: list[int] = []
    with generation(model, three_windows(model), switch="rerotate"):
        model.model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        model.generate(tokens(WINDOW), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=128)
    assert seen == [WINDOW, 1, 1]


# Refusals.


def test_a_model_whose_keys_do_not_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.apply_rotary_pos_emb

    def bent(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        turned_q, turned_k = own(q, k, cos, sin, *args, **kwargs)
        return turned_q, turned_k + cos[:, None]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", bent)
    model = tiny_model("llama")
    with (
        pytest.raises(LongRopeError, match=r"cannot turn the cached keys of layer 0 of LlamaForCausalLM.*recompute"),
        generation(model, three_windows(model), switch="rerotate"),
    ):
        pass
    assert "generate" not in vars(model)


def test_a_cache_of_an_unknown_window() -> None:
    model = tiny_model("llama")
    ids = tokens(WINDOW + 5)
    with generation(model, three_windows(model), switch="rerotate"):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[:, :WINDOW], **with_cache(model, cache))
        with pytest.raises(LongRopeError, match="whose window is not known"):
            model.generate(ids, **with_cache(model, cache), max_new_tokens=2, pad_token_id=0)
