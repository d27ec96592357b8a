"""Suites must be able to fail: a model that ignores far context, and one whose rotary is broken, show it in each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from transformers import MistralConfig, MistralForCausalLM

from longrope.data.samples import draw_samples
from longrope.data.tokens import bos_of
from longrope.evaluation.needle import draw_grid, grid_depths, measure_needles
from longrope.evaluation.passkey import draw_passkeys, measure_passkeys
from longrope.evaluation.perplexity import measure_perplexity
from longrope.evaluation.results import EvalRow
from longrope.evaluation.retention import measure_retention, most_likely_tokens
from longrope.evaluation.ruler.suite import measure_ruler
from longrope.evaluation.ruler.tasks import draw_task
from longrope.models.apply import apply_scaling
from longrope.models.scaled import ScaledModel
from longrope.rope.baselines import Method
from longrope.rope.scaling import RopeScaling, Window
from tests.evaluation.embedded import WINDOW, geometry, none, shuffled, tiny, tiny_tokenizer, tokenized

SIGHT = 16  # three layers see 3·15 tokens back, less than a question has


@cache
def short_sighted() -> ScaledModel:
    """The embedded model's weights in a class whose attention reaches SIGHT tokens back."""
    theirs = tiny().model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps")
    names += ("rope_parameters", "bos_token_id", "eos_token_id")
    config = MistralConfig(**{name: getattr(theirs, name) for name in names}, sliding_window=SIGHT)
    model = MistralForCausalLM(config).eval()
    weights = {name: value for name, value in tiny().model.state_dict().items() if "original" not in name}
    model.load_state_dict(weights)
    return apply_scaling(model, RopeScaling.original(geometry()))


def score(rows: Sequence[EvalRow], metric: str) -> float:
    return float(np.mean([row.value for row in rows if row.metric == metric]))


def passkeys(scaled: ScaledModel, method: Method, count: int = 6) -> float:
    samples = draw_passkeys(tiny_tokenizer(), length=WINDOW, count=count, seed=1)
    return score(measure_passkeys(scaled, tiny_tokenizer(), samples, method), "accuracy")


def needles(scaled: ScaledModel, method: Method, depths: int = 5) -> tuple[float, float]:
    tokenizer = tiny_tokenizer()
    documents = tokenized(tokenizer)
    grid = draw_grid(documents, tokenizer, length=WINDOW, depths=grid_depths(depths), trials=1, per_document=2, seed=0)
    rows = measure_needles(scaled, tokenizer, grid, method)
    return score(rows, "accuracy"), score(rows, "answer_logprob")


def ruler(scaled: ScaledModel, method: Method, count: int = 4) -> float:
    tokenizer = tiny_tokenizer()
    samples = draw_task("niah_single_2", tokenizer, length=WINDOW, count=count, seed=0, documents=tokenized(tokenizer))
    return score(measure_ruler(scaled, tokenizer, samples, method), "score")


def test_one_fixed_window_for_prompt_and_answer_together() -> None:
    """Every suite asks for the window of the whole length, once, and reads everything under it."""
    asked: list[int] = []

    def window(length: int) -> Window:
        asked.append(length)
        return none().window(length)

    method = Method("asked", window)
    passkeys(tiny(), method, count=1)
    needles(tiny(), method, depths=2)
    ruler(tiny(), method, count=1)
    assert asked == [WINDOW] * 3


def test_the_model_itself_retrieves() -> None:
    assert passkeys(tiny(), none()) >= 0.7
    accuracy, logprob = needles(tiny(), none())
    assert accuracy >= 0.7
    assert logprob > -0.3
    assert ruler(tiny(), none()) >= 80


def test_a_model_that_ignores_far_context_fails() -> None:
    assert passkeys(short_sighted(), none()) == 0.0
    accuracy, logprob = needles(short_sighted(), none())
    assert accuracy == 0.0
    assert logprob < -1.0
    assert ruler(short_sighted(), none()) == 0.0


def test_a_broken_rotary_fails_to_retrieve() -> None:
    assert passkeys(tiny(), shuffled()) == 0.0
    accuracy, logprob = needles(tiny(), shuffled())
    assert accuracy == 0.0
    assert logprob < -1.0
    assert ruler(tiny(), shuffled()) == 0.0


@pytest.mark.parametrize("broken", ["sight", "rotary"])
def test_perplexity_and_retention_show_both(broken: str) -> None:
    tokenizer = tiny_tokenizer()
    samples = draw_samples(tokenized(tokenizer), length=WINDOW, count=3, seed=0, bos_token_id=bos_of(tokenizer))
    scaled, method = (short_sighted(), none()) if broken == "sight" else (tiny(), shuffled())
    whole = measure_perplexity(tiny(), samples, [WINDOW], none(), positions=True)
    damaged = measure_perplexity(scaled, samples, [WINDOW], method, positions=True)
    assert damaged[0].value > 1.02 * whole[0].value
    original = most_likely_tokens(tiny(), samples, none())
    perplexity_row, agreement = measure_retention(scaled, samples, method, original)
    assert perplexity_row.value == damaged[0].value
    assert agreement.value < 0.9
    if broken == "rotary":
        assert damaged[0].value > 2 * whole[0].value
    else:  # near positions know nothing of it, far ones lose
        first, last = (np.array([row.value for row in rows[1:]]) for rows in (whole, damaged))
        assert (last - first)[-1] > (last - first)[0]
