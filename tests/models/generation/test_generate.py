"""Cached generation across windows equals generation without a cache, token for token, in every family."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from longrope.data.books import read_book
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, geometry_of, remove_scaling
from longrope.models.generation.generate import generate, generation
from longrope.models.loading import load_model, load_tokenizer
from longrope.models.scaled import method_hooks
from longrope.rope.closed_forms import yarn, yarn_attention_factor
from longrope.rope.scaling import RopeScaling, Window
from tests.models.families import FAMILIES, VOCABULARY, WINDOW, tiny_model, tokens
from tests.models.generation.windows import LAST, SECOND, three_windows, uncached

NEVER = ()  # no token ends a text


def forwards(model: PreTrainedModel) -> list[int]:
    """Tokens in every forward below the head, filled by what is to come."""
    seen: list[int] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].shape[1])

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def with_logits(model: PreTrainedModel, ids: Tensor, count: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Stock greedy generation: ids (B, T + count), logits (B, count, V)."""
    options = {"eos_token_id": model.config.vocab_size, "pad_token_id": 0} | options
    found = model.generate(
        ids, max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return found.sequences, torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_generation_without_a_cache(family: str) -> None:
    """A batch of two crosses both limits; prompts are read and caches filled again in pieces."""
    model = tiny_model(family)
    ids, count = tokens(WINDOW - 2, batch=2), SECOND - WINDOW + 5
    with generation(model, three_windows(model), prefill_chunk=24) as scaled:
        expected, expected_logits = uncached(scaled, ids, count)
        found, logits = with_logits(model, ids, count)
        for hook in method_hooks(model):
            hook.take_off()
        _, wrong = with_logits(model, ids, count)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-3)
    assert (wrong - expected_logits)[:, 3:].abs().max() > 0.02  # without the hook


@pytest.mark.parametrize("limit", [WINDOW, SECOND])
@pytest.mark.parametrize("prompt", [-3, -1, 0, 1, 2])
def test_around_every_limit(limit: int, prompt: int) -> None:
    model = tiny_model("llama")
    ids = tokens(limit + prompt)
    with generation(model, three_windows(model)) as scaled:
        expected, expected_logits = uncached(scaled, ids, 4)
        found, logits = with_logits(model, ids, 4)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)


@lru_cache
def embedded() -> tuple[PreTrainedModel, RopeScaling, Tensor]:
    """The embedded model, its YaRN scaling at 8×, and the first tokens of a book that it has not seen."""
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    geometry = geometry_of(model)
    target = 8 * geometry.original_length
    scaling = RopeScaling.extended(
        geometry, target, yarn(geometry, target), attention_factor=yarn_attention_factor(geometry, target)
    )
    text = read_book("the-diary-of-samuel-pepys").text[20_000:24_000]
    return model, scaling, torch.tensor([tokenizer(text).input_ids])


@pytest.mark.parametrize("prompt", [-8, -1, 0, 1, 300])
def test_the_embedded_model_at_eight_times_its_window(prompt: int) -> None:
    model, scaling, text = embedded()
    ids = text[:, : scaling.geometry.original_length + prompt]
    found = generate(model, ids, scaling, max_new_tokens=12, eos_token_id=NEVER, prefill_chunk=100)
    scaled = apply_scaling(model, scaling)
    expected, _ = uncached(scaled, ids, 12)
    remove_scaling(model)
    assert torch.equal(found, expected)


# The tokens.


@pytest.mark.parametrize("family", ["llama", "phi3"])  # Phi-3's own way is to read it again, whole
def test_a_change_of_window_reads_the_text_once_in_pieces(family: str) -> None:
    model = tiny_model(family)
    with generation(model, three_windows(model), prefill_chunk=24):
        seen = forwards(model)
        with_logits(model, tokens(WINDOW - 2), 6)
    assert seen == [24, 14, 24, 1, 1, 24, 24, 16, 1, 1, 1]  # prompt of 62; 63, 64; at 65 the 64 before it again


def test_a_long_prompt_is_read_under_one_window() -> None:
    model = tiny_model("llama")
    ids = tokens(150)
    with generation(model, three_windows(model), prefill_chunk=50) as scaled:
        expected, _ = uncached(scaled, ids, 3)
        seen = forwards(model)
        found, _ = with_logits(model, ids, 3)
    assert torch.equal(found, expected)
    assert seen == [50, 50, 50, 1, 1]


def test_windows_with_the_same_keys_change_nothing() -> None:
    model = tiny_model("llama")
    geometry = geometry_of(model)
    with generation(model, RopeScaling.extended(geometry, LAST, (1.0,) * geometry.pairs)):
        seen = forwards(model)
        with_logits(model, tokens(WINDOW), 4)
    assert seen == [WINDOW, 1, 1, 1]


def test_windows_that_differ_in_their_attention_factor_only() -> None:
    model = tiny_model("llama")
    geometry = geometry_of(model)
    ones = (1.0,) * geometry.pairs
    scaling = RopeScaling(geometry, (Window(WINDOW, ones), Window(LAST, ones, attention_factor=1.3)))
    with generation(model, scaling) as scaled:
        _, expected = uncached(scaled, tokens(WINDOW), 4)
        _, found = with_logits(model, tokens(WINDOW), 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# Batches.


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Rows of `lengths` tokens, padded on the left: ids and mask (B, longest)."""
    longest = max(lengths)
    ids, mask = tokens(longest, batch=len(lengths)), torch.ones(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return ids, mask


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("lengths", [[30, 50], [75, 110]])
def test_padded_rows_in_one_window(family: str, lengths: list[int]) -> None:
    model = tiny_model(family)
    ids, mask = padded(lengths)
    scaling = three_windows(model)
    found = generate(model, ids, scaling, max_new_tokens=6, attention_mask=mask, eos_token_id=NEVER, prefill_chunk=16)
    alone = [
        generate(model, ids[row : row + 1, -length:], scaling, max_new_tokens=6, eos_token_id=NEVER)[0, length:]
        for row, length in enumerate(lengths)
    ]
    assert torch.equal(found[:, max(lengths) :], torch.stack(alone))


@pytest.mark.parametrize(
    ("lengths", "match"),
    [
        ([60, 70], "found rows of 60 and 70 tokens on both sides of 64"),
        ([30, 60], "found rows of 35 and 65 tokens on both sides of 64"),
        ([65, 66], "found rows of 72 and 73 tokens on both sides of 72"),
    ],
)
def test_rows_that_need_two_windows_are_refused_before_any_work(lengths: list[int], match: str) -> None:
    model = tiny_model("llama")
    ids, mask = padded(lengths)
    scaled = apply_scaling(model, three_windows(model))
    seen = forwards(model)
    with pytest.raises(LongRopeError, match=match):
        generate(scaled, ids, max_new_tokens=8, attention_mask=mask)
    assert seen == []
    with pytest.raises(LongRopeError, match="on both sides of"):  # stock generation finds out on its way
        model.generate(ids, attention_mask=mask, max_new_tokens=9, eos_token_id=VOCABULARY)
    with pytest.raises(LongRopeError, match="on both sides of"):
        model.generate(ids, attention_mask=mask, max_new_tokens=9, eos_token_id=VOCABULARY, use_cache=False)


def test_rows_that_stay_in_one_window_long_enough() -> None:
    model = tiny_model("llama")
    ids, mask = padded([50, 60])
    options = {"attention_mask": mask, "eos_token_id": NEVER}
    found = generate(model, ids, three_windows(model), max_new_tokens=5, **options)  # the last is never read
    for row, length in enumerate((50, 60)):
        expected, _ = uncached(apply_scaling(model, three_windows(model)), ids[row : row + 1, -length:], 5)
        assert torch.equal(found[row, 60:], expected[0, length:])
    with pytest.raises(LongRopeError) as error:
        generate(model, ids, three_windows(model), max_new_tokens=6, **options)
    assert error.value.code == "rows-of-two-windows"


# Options.


def test_sampling_is_that_of_its_seed() -> None:
    model = tiny_model("llama")
    ids, scaling = tokens(WINDOW - 2, batch=2), three_windows(model)
    state = torch.get_rng_state()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0, "eos_token_id": NEVER}
    first, again, other = (generate(model, ids, scaling, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    nucleus = generate(model, ids, scaling, seed=1, top_p=1e-6, **options)
    greedy = generate(model, ids, scaling, max_new_tokens=12, eos_token_id=NEVER)
    assert torch.equal(nucleus, greedy)


def test_a_text_ends() -> None:
    model = tiny_model("llama")
    ids, scaling = tokens(WINDOW - 2), three_windows(model)
    free = generate(model, ids, scaling, max_new_tokens=10, eos_token_id=NEVER)[0, ids.shape[1] :].tolist()
    assert len(free) == 10
    end = free.index(free[5]) + 1
    for eos in (free[5], [1, free[5]]):
        found = generate(model, ids, scaling, max_new_tokens=10, eos_token_id=eos)
        assert found[0, ids.shape[1] :].tolist() == free[:end]
    model.generation_config.eos_token_id = free[5]
    assert generate(model, ids, scaling, max_new_tokens=10).shape[1] == ids.shape[1] + end


def test_the_model_is_as_before() -> None:
    model = tiny_model("llama")
    ids = tokens(10)
    names = set(vars(model))
    plain = model(input_ids=ids).logits
    generate(model, ids, three_windows(model), max_new_tokens=2)
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert set(vars(model)) == names
    scaled = apply_scaling(model, three_windows(model))
    found = generate(scaled, ids, max_new_tokens=2)
    assert torch.equal(generate(model, ids, max_new_tokens=2), found)  # by the scaling that it has
    generate(model, ids, RopeScaling.original(scaled.scaling.geometry), max_new_tokens=2)
    assert scaled.rotaries[0] is model.model.rotary_emb


def test_the_pinned_window_stays_pinned() -> None:
    model = tiny_model("llama")
    scaled = apply_scaling(model, three_windows(model))
    ids = tokens(WINDOW - 2)
    with scaled.using(scaled.scaling.windows[2]):
        expected, _ = uncached(scaled, ids, 6)
        seen = forwards(model)
        found = generate(scaled, ids, max_new_tokens=6, eos_token_id=NEVER)
    assert torch.equal(found, expected)
    assert seen == [62, 1, 1, 1, 1, 1]


# Bad input.


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"input_ids": torch.ones(5, dtype=torch.long)}, "token ids of shape"),
        ({"input_ids": tokens(0)}, "token ids of shape"),
        ({"max_new_tokens": 0}, "at least 1 new token, found 0"),
        ({"max_new_tokens": LAST}, "10 and 512 new ones are too many"),
        ({"attention_mask": torch.ones(1, 9)}, "expected an attention_mask of input_ids' shape"),
        ({"attention_mask": torch.tensor([[1] * 9 + [0]])}, "padding on the left only"),
        ({"attention_mask": torch.tensor([[1, 0] + [1] * 8])}, "padding on the left only"),
        ({"do_sample": True, "temperature": 0.0}, "a temperature above 0"),
        ({"do_sample": True, "top_p": 1.5}, "a top_p in"),
        ({"temperature": 0.5}, "are for sampling"),
        ({"seed": 1}, "are for sampling"),
        ({"switch": "forget"}, "found 'forget'"),
        ({"prefill_chunk": 0}, "at least 1 token"),
        ({"scaling": None}, "expected a model with a scaling"),
    ],
)
def test_bad_input(options: dict[str, Any], fragment: str) -> None:
    model = tiny_model("llama")
    given = {"input_ids": tokens(10), "scaling": three_windows(model), "max_new_tokens": 4} | options
    seen = forwards(model)
    with pytest.raises(LongRopeError, match=fragment) as error:
        generate(model, **given)
    assert error.value.code in ("invalid-setting", "no-scaling", "beyond-the-scaling")
    assert [count for count in seen if count != 16] == []  # the forward that proves a scaling
    assert "generate" not in vars(model)


def test_the_last_token_is_predicted_and_not_read() -> None:
    model = tiny_model("llama")
    ids = tokens(LAST - 2)
    assert generate(model, ids, three_windows(model), max_new_tokens=3, eos_token_id=NEVER).shape[1] == LAST + 1


def test_a_handle_whose_scaling_was_replaced_or_removed() -> None:
    model = tiny_model("llama")
    first = apply_scaling(model, three_windows(model))
    apply_scaling(model, three_windows(model))
    for _ in range(2):
        with pytest.raises(LongRopeError, match="no longer applied") as error:
            generate(first, tokens(5), max_new_tokens=1)
        assert error.value.code == "not-applied"
        remove_scaling(model)


def test_a_scaling_for_another_model() -> None:
    with pytest.raises(LongRopeError, match="this model has"):
        generate(tiny_model("qwen3"), tokens(5), three_windows(tiny_model("llama")), max_new_tokens=1)
