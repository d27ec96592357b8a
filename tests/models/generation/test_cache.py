"""A prefix that many continuations share: equal to the whole text in one forward, and untouched by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from longrope.errors import LongRopeError
from longrope.models import chunked
from longrope.models.apply import apply_scaling, geometry_of, remove_scaling
from longrope.models.apply import scaled as scaled_block
from longrope.models.cache_argument import forward_argument
from longrope.models.generation import cache as module
from longrope.models.generation.cache import fill, new_cache, prefill
from longrope.models.scaled import ScaledModel
from longrope.rope.scaling import RopeScaling, Window
from tests.models.families import FAMILIES, VOCABULARY, tiny_model, tokens

TEXT = tokens(90)
QUESTIONS = [tokens(length, seed=seed) for seed, length in enumerate((1, 40), start=1)]


def scaled_and_window(family: str) -> tuple[ScaledModel, Window]:
    model = tiny_model(family)
    geometry = geometry_of(model)
    window = Window(256, np.linspace(1, 4, geometry.pairs), attention_factor=1.1)
    return apply_scaling(model, RopeScaling.original(geometry)), window


def whole(scaled: ScaledModel, ids: Tensor, window: Window) -> Tensor:
    """Logits (T, V) of one forward without a cache."""
    with scaled.using(window) as model, torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0]


def whole_nll(scaled: ScaledModel, question: Tensor, window: Window) -> Tensor:
    logits = whole(scaled, torch.cat([TEXT, question], dim=1), window)
    return F.cross_entropy(logits[TEXT.shape[1] - 1 : -1], question[0], reduction="none")


def whole_greedy(scaled: ScaledModel, question: Tensor, window: Window, count: int) -> list[int]:
    ids = torch.cat([TEXT, question], dim=1)
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, whole(scaled, ids, window)[-1:].argmax(-1)[None]], dim=1)
    return ids[0, start:].tolist()


def held(cache: DynamicCache) -> list[Tensor]:
    return [states.clone() for layer in cache.layers for states in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk_size", [16, None])
def test_every_continuation_is_that_of_the_whole_text(family: str, chunk_size: int | None) -> None:
    scaled, window = scaled_and_window(family)
    prefix = prefill(scaled, TEXT, window, chunk_size=chunk_size)
    before = held(prefix.cache)
    for question in QUESTIONS:
        expected = whole_nll(scaled, question, window)
        torch.testing.assert_close(prefix.score(question), expected, rtol=0, atol=2e-4)
        assert prefix.greedy(question, 3) == whole_greedy(scaled, question, window, 3)
        assert prefix.length == TEXT.shape[1]
        assert all(torch.equal(now, then) for now, then in zip(held(prefix.cache), before, strict=True))
    assert scaled.rotaries[0].pinned is None


@pytest.mark.parametrize("chunk_size", [1, 2, 88, 89, 90, 1000])
def test_every_border(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", VOCABULARY * 8)
    scaled, window = scaled_and_window("llama")
    question = QUESTIONS[-1]
    score = prefill(scaled, TEXT, window, chunk_size=chunk_size).score(question)
    torch.testing.assert_close(score, whole_nll(scaled, question, window), rtol=0, atol=2e-4)


def test_the_window_counts() -> None:
    scaled, window = scaled_and_window("llama")
    other = Window(256, (2.0,) * len(window.factors))
    scores = [prefill(scaled, TEXT, one).score(QUESTIONS[1]) for one in (window, other)]
    assert (scores[0] - scores[1]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_text_of_one_token(family: str) -> None:
    scaled, window = scaled_and_window(family)
    prefix = prefill(scaled, TEXT[:, :1], window)
    logits = whole(scaled, TEXT, window)
    expected = F.cross_entropy(logits[:-1], TEXT[0, 1:], reduction="none")
    for _ in range(2):
        torch.testing.assert_close(prefix.score(TEXT[:, 1:]), expected, rtol=0, atol=2e-4)
    assert prefix.length == 1


def test_the_model_and_the_window_of_its_scaling() -> None:
    scaled, window = scaled_and_window("llama")
    text = TEXT[:, :20]
    assert prefill(scaled.model, text).window == scaled.scaling.window_for(20)
    with scaled.using(window):
        assert prefill(scaled.model, text).window == window
    with pytest.raises(LongRopeError) as error:
        prefill(tiny_model("llama"), text)
    assert error.value.code == "no-scaling"


def test_the_scaling_was_replaced_or_removed() -> None:
    scaled, window = scaled_and_window("llama")
    model, prefix = scaled.model, prefill(scaled, TEXT, window)
    expected = prefix.score(QUESTIONS[0])
    other = RopeScaling.single(geometry_of(model), 256, window.factors)
    for change in (lambda: apply_scaling(model, other), lambda: remove_scaling(model)):
        change()
        uses = (
            lambda: prefill(scaled, TEXT, window),
            lambda: prefix.score(QUESTIONS[0]),
            lambda: prefix.greedy(QUESTIONS[0], 1),
            lambda: scaled.pin_window(window),
        )
        for use in uses:
            with pytest.raises(LongRopeError, match="no longer applied to LlamaForCausalLM") as error:
                use()
            assert error.value.code == "not-applied"
    scaled = apply_scaling(model, scaled.scaling)
    with scaled_block(model, other):  # for a while: the handle is right again after it
        pass
    assert torch.equal(prefill(scaled, TEXT, window).score(QUESTIONS[0]), expected)


def test_removed_in_a_block_whose_error_is_not_hidden() -> None:
    scaled, window = scaled_and_window("llama")

    def block() -> None:
        with scaled.using(window) as model:
            remove_scaling(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()


def test_greedy_stops() -> None:
    scaled, window = scaled_and_window("llama")
    prefix = prefill(scaled, TEXT, window)
    free = prefix.greedy(tokens(0), 5)
    assert len(free) == 5
    first = free.index(free[2])
    assert prefix.greedy(tokens(0), 5, stop=(free[2],)) == free[: first + 1]
    assert prefix.greedy(tokens(0), 0) == []


def test_memory_is_bounded_by_the_chunk() -> None:
    scaled, window = scaled_and_window("llama")
    seen: list[int] = []
    scaled.model.model.layers[0].mlp.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    heads: list[int] = []
    scaled.model.lm_head.register_forward_hook(lambda _m, args, _o: heads.append(args[0].shape[1]))
    prefill(scaled, TEXT, window, chunk_size=32)
    assert seen == [32, 32, 25]  # the last token is fed with a continuation
    assert heads == []


@pytest.mark.parametrize(("family", "passes"), [("llama", 1), ("gemma2", 3)])
def test_a_text_is_read_in_one_pass_without_a_mask(family: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sliding layer's mask over the whole text would be quadratic: the text is read in chunks."""
    monkeypatch.setattr(module, "PREFILL_CHUNK", 32)
    monkeypatch.setattr(chunked, "MLP_CHUNK", 40)
    scaled, window = scaled_and_window(family)
    first = scaled.model.model.layers[0]
    seen: list[tuple[int, bool]] = []
    mlps: list[int] = []
    first.self_attn.register_forward_hook(
        lambda _m, _a, given, _o: seen.append((given["hidden_states"].shape[1], given["attention_mask"] is None)),
        with_kwargs=True,
    )
    first.mlp.act_fn.register_forward_hook(lambda _m, args, _o: mlps.append(args[0].shape[1]))
    prefill(scaled, TEXT, window)
    assert len(seen) == passes
    if passes == 1:
        assert seen == [(89, True)]
        assert mlps == [40, 40, 9]


def test_after_an_exception_the_prefix_is_as_it_was() -> None:
    scaled, window = scaled_and_window("gemma3_text")
    prefix = prefill(scaled, TEXT, window)
    expected = prefix.score(QUESTIONS[1])

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    handle = scaled.model.lm_head.register_forward_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        prefix.score(QUESTIONS[0])
    handle.remove()
    assert torch.equal(prefix.score(QUESTIONS[1]), expected)


@pytest.mark.parametrize("shape", [(2, 5), (1, 0), (5,)])
def test_not_one_text(shape: tuple[int, ...]) -> None:
    scaled, window = scaled_and_window("llama")
    with pytest.raises(LongRopeError, match="expected token ids of one text"):
        prefill(scaled, torch.ones(shape, dtype=torch.long), window)
    if shape != (1, 0):
        with pytest.raises(LongRopeError, match="expected the tokens of one continuation"):
            prefill(scaled, TEXT, window).greedy(torch.ones(shape, dtype=torch.long), 1)
    with pytest.raises(LongRopeError, match="expected the tokens of one continuation"):
        prefill(scaled, TEXT, window).score(torch.ones(shape, dtype=torch.long))


def test_a_chunk_of_nothing() -> None:
    scaled, window = scaled_and_window("llama")
    with pytest.raises(LongRopeError, match="at least 1 token, found 0"):
        prefill(scaled, TEXT, window, chunk_size=0)


def test_a_model_that_ignores_the_cache() -> None:
    scaled, window = scaled_and_window("llama")
    model = scaled.model.model
    own = model.forward
    model.forward = lambda **kwargs: own(**kwargs | {forward_argument(model): None})
    with pytest.raises(LongRopeError, match="keeps no keys"):
        fill(scaled, new_cache(scaled.model), TEXT, window)
