"""Applying and removing a scaling, on a tiny random model of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from longrope.models.apply import applied_scaling, apply_scaling, geometry_of, remove_scaling, scaled
from longrope.models.generation.hooks import cache_hook
from longrope.models.rotary import LongRopeRotary
from longrope.rope.closed_forms import ntk_aware
from longrope.rope.scaling import RopeScaling, Window
from tests.models.families import FAMILIES, ONE_ROPE_PER_LAYER_TYPE, WINDOW, logits, tiny_model, tokens

TARGET = 4 * WINDOW
LENGTHS = (5, WINDOW, WINDOW + 1, 2 * WINDOW)


def rotaries(model: PreTrainedModel) -> list[nn.Module]:
    """The rotary modules of a model: LongRopeRotary keeps the one it replaced as a child."""
    return [module for name, module in model.named_modules() if name.endswith("rotary_emb")]


def identity(model: PreTrainedModel) -> RopeScaling:
    geometry = geometry_of(model)
    return RopeScaling.single(geometry, TARGET, np.ones(geometry.pairs))


def scaling_of(model: PreTrainedModel) -> RopeScaling:
    """Factors 1 up to the window, NTK beyond."""
    geometry = geometry_of(model)
    return RopeScaling.extended(geometry, TARGET, ntk_aware(geometry, TARGET))


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_and_remove(family: str) -> None:
    model = tiny_model(family)
    inputs = [tokens(length, batch=2) for length in LENGTHS]
    before = [logits(model, ids) for ids in inputs]
    modules = rotaries(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    apply_scaling(model, identity(model))  # bit-identical inside and beyond the window
    assert [type(module) for module in rotaries(model)] == [LongRopeRotary] * len(modules)
    assert all(torch.equal(logits(model, ids), then) for ids, then in zip(inputs, before, strict=True))

    apply_scaling(model, scaling_of(model))  # replaces the first; moves what lies beyond the window and nothing inside
    for ids, then in zip(inputs, before, strict=True):
        now = logits(model, ids)
        if ids.shape[1] <= WINDOW:
            assert torch.equal(now, then)
        else:
            assert (now - then).abs().max() > 0.1 * then.std()

    remove_scaling(model)
    assert all(now is then for now, then in zip(rotaries(model), modules, strict=True))
    assert all(torch.equal(logits(model, ids), then) for ids, then in zip(inputs, before, strict=True))
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], value) for name, value in state.items())
    remove_scaling(model)  # again: nothing happens
    assert all(now is then for now, then in zip(rotaries(model), modules, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_bit_identical_too(family: str) -> None:
    model = tiny_model(family)
    for parameter in model.parameters():  # not model.to(): that would round transformers' own frequencies
        parameter.data = parameter.data.bfloat16()
    for _, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and "inv_freq" not in name:
                setattr(module, name, buffer.bfloat16())
    ids = tokens(WINDOW)
    before = logits(model, ids)
    assert before.dtype == torch.bfloat16
    apply_scaling(model, identity(model))
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", ONE_ROPE_PER_LAYER_TYPE)
def test_only_full_attention_layers_are_scaled(family: str) -> None:
    model = tiny_model(family)
    seen: list[torch.Tensor] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["position_embeddings"][0].clone()), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    ids = tokens(2 * WINDOW)
    logits(model, ids)
    apply_scaling(model, scaling_of(model))
    seen_before, seen[:] = seen[:2], []
    logits(model, ids)
    for handle in handles:
        handle.remove()
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert torch.equal(seen[0], seen_before[0])
    assert not torch.equal(seen[1], seen_before[1])


# The choice of the window.


def three_windows(model: PreTrainedModel) -> RopeScaling:
    geometry = geometry_of(model)
    ones = np.ones(geometry.pairs)
    windows = (Window(16, ones), Window(32, 2 * ones, attention_factor=1.1), Window(128, 4 * ones))
    return RopeScaling(geometry, windows)


def only(model: PreTrainedModel, index: int) -> RopeScaling:
    """The window `index` of `three_windows`, for every length."""
    window = three_windows(model).windows[index]
    return RopeScaling(geometry_of(model), (Window(128, window.factors, 0, window.attention_factor),))


@pytest.mark.parametrize(("length", "index"), [(1, 0), (16, 0), (17, 1), (32, 1), (33, 2), (128, 2)])
def test_the_longest_position_chooses_the_window(length: int, index: int) -> None:
    model = tiny_model("llama")
    ids = tokens(length)
    apply_scaling(model, only(model, index))
    expected = logits(model, ids)
    apply_scaling(model, three_windows(model))
    assert torch.equal(logits(model, ids), expected)


def test_positions_count_and_not_tokens() -> None:
    model = tiny_model("llama")
    ids = tokens(8, batch=2)
    positions = torch.stack((torch.arange(8), torch.arange(20, 28)))  # one row in the first window, one in the second
    apply_scaling(model, only(model, 1))
    expected = logits(model, ids, position_ids=positions)
    apply_scaling(model, three_windows(model))
    assert torch.equal(logits(model, ids, position_ids=positions), expected)


def test_a_sequence_beyond_the_last_window_is_refused() -> None:
    model = tiny_model("llama")
    apply_scaling(model, three_windows(model))
    with pytest.raises(Exception, match="reaches 128 tokens; a sequence of 129"):
        logits(model, tokens(129))


def test_the_caller_pins_the_window() -> None:
    model = tiny_model("llama")
    ids = tokens(8)
    by_window = []
    for index in range(3):
        apply_scaling(model, only(model, index))
        by_window.append(logits(model, ids))
    scaled = apply_scaling(model, three_windows(model))
    windows = scaled.scaling.windows
    assert torch.equal(logits(model, ids), by_window[0])
    scaled.pin_window(windows[2])
    assert torch.equal(logits(model, ids), by_window[2])
    with scaled.using(windows[1]) as used:
        assert used is model
        assert torch.equal(logits(model, ids), by_window[1])
    assert torch.equal(logits(model, ids), by_window[2])
    with pytest.raises(ZeroDivisionError), scaled.using(windows[0]):
        _ = 1 / 0
    assert torch.equal(logits(model, ids), by_window[2])
    scaled.pin_window(None)
    assert torch.equal(logits(model, ids), by_window[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_factors_and_attention_factor(family: str) -> None:
    model = tiny_model(family).requires_grad_(False)
    scaled = apply_scaling(model, scaling_of(model))
    window = scaled.scaling.windows[-1]
    ids = tokens(2 * WINDOW)
    with scaled.using(window):
        expected = logits(model, ids)
    factors = torch.tensor(window.factors, requires_grad=True)
    attention_factor = torch.tensor(window.attention_factor, requires_grad=True)
    with scaled.using(window, factors, attention_factor):
        output = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(output.detach(), expected, rtol=0, atol=2e-4 * float(expected.std()))
    output.logsumexp(-1).sum().backward()
    assert factors.grad is not None
    assert bool((factors.grad != 0).all())
    assert attention_factor.grad is not None
    assert attention_factor.grad != 0


# The rest of the model stays as it is.


def test_modes_of_the_parts_are_kept() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    apply_scaling(model, scaling_of(model))
    remove_scaling(model)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_the_new_rotary_module_adds_nothing_to_a_checkpoint() -> None:
    model = tiny_model("llama")
    names = set(model.state_dict())
    apply_scaling(model, scaling_of(model))
    assert set(model.state_dict()) == names


def test_one_rotary_module_under_many_names() -> None:
    """As remote code has it: every attention layer holds the same module and calls it itself."""
    model = tiny_model("llama")
    shared = model.model.rotary_emb
    ids = tokens(2 * WINDOW)
    apply_scaling(model, scaling_of(model))
    expected = logits(model, ids)
    remove_scaling(model)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = shared

        def own(*args: Any, attention: nn.Module = layer.self_attn, call: Any = layer.self_attn.forward, **kwargs: Any):
            hidden = kwargs["hidden_states"]
            positions = torch.arange(hidden.shape[1])[None]
            kwargs["position_embeddings"] = attention.rotary_emb(hidden, positions)
            return call(*args, **kwargs)

        layer.self_attn.forward = own
    scaled = apply_scaling(model, scaling_of(model))
    assert len(scaled.rotaries) == 1
    assert torch.equal(logits(model, ids), expected)
    remove_scaling(model)
    assert all(layer.self_attn.rotary_emb is shared for layer in model.model.layers)
    assert model.model.rotary_emb is shared


# A scaling for a while.


def test_a_block_puts_back_what_was_applied(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = tokens(2 * WINDOW)
    plain = logits(model, ids)
    with scaled(model, scaling_of(model)) as inner:
        assert applied_scaling(model) == inner.scaling
        inside = logits(model, ids)
    assert torch.equal(logits(model, ids), plain)
    assert applied_scaling(model) is None

    outer = apply_scaling(model, three_windows(model))
    outer.pin_window(outer.scaling.windows[2])
    cache_hook(outer).prefill_chunk = 7
    pinned = logits(model, ids)
    scaling_of(model).save(tmp_path / "scaling.json")
    with scaled(model, tmp_path / "scaling.json"):
        assert torch.equal(logits(model, ids), inside)
    with pytest.raises(ZeroDivisionError), scaled(model, scaling_of(model)):
        _ = 1 / 0
    assert model.model.rotary_emb is outer.rotaries[0]
    assert torch.equal(logits(model, ids), pinned)
    assert cache_hook(outer).prefill_chunk == 7
    remove_scaling(model)
    assert torch.equal(logits(model, ids), plain)
    assert not {"generate", "prepare_inputs_for_generation"} & vars(model).keys()


def test_a_path_of_a_scaling(tmp_path: Path) -> None:
    model = tiny_model("llama")
    scaling_of(model).save(tmp_path / "scaling.json")
    assert apply_scaling(model, str(tmp_path / "scaling.json")).scaling == scaling_of(model)
