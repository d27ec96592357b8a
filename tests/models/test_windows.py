"""The original window and the window of a checkpoint, from the ways in which configs state them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longrope.costs.plan import plan
from longrope.errors import LongRopeError
from longrope.models.inspect import inspect_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
}
QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
GEMMA3 = LLAMA | {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 16,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 1024,
    "sliding_window_pattern": 2,
}
PHI3 = LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 1}
SHORT, LONG = [1.0 + 0.02 * pair for pair in range(8)], [1.0 + 4.0 * pair for pair in range(8)]
LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
ORIGINAL = {"original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def write(folder: Path, config: dict[str, Any], window: int | None, key: str, entry: Any, **more: Any) -> str:
    """A folder with a config.json alone: `entry` under `key`, the window in max_position_embeddings."""
    folder.mkdir()
    lengths = {} if window is None else {"max_position_embeddings": window}
    (folder / "config.json").write_text(json.dumps(config | lengths | {key: entry} | more), "utf-8")
    return str(folder)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("config", "window", "entry", "given", "original", "reached"),
    [
        # linear: the factor is part of the stated window, and L a guess, unless it is stated or given.
        (LLAMA, 16384, LINEAR, None, 4096, 16384),
        (LLAMA, 16384, LINEAR, 4096, 4096, 16384),
        (LLAMA, 4096, LINEAR, 4096, 4096, 16384),  # the window before the factor, as some checkpoints have it
        (LLAMA, 16384, LINEAR, 8192, 8192, 16384),
        (LLAMA, 16384, LINEAR | ORIGINAL, None, 4096, 16384),
        (LLAMA, 4096, LINEAR | ORIGINAL, None, 4096, 16384),
        (GEMMA3, 131072, {"rope_type": "linear", "factor": 8.0}, None, 16384, 131072),
        (GEMMA3, 131072, {"rope_type": "linear", "factor": 8.0}, 32768, 32768, 131072),
        # YaRN: factor times the original length, where max_position_embeddings stays behind.
        (QWEN3, 40960, YARN, None, 32768, 131072),
        (QWEN3, 32768, YARN, None, 32768, 131072),
        (QWEN3, 131072, YARN, None, 32768, 131072),
        (QWEN3, 262144, YARN, None, 32768, 262144),
        (QWEN3, 32768, {"rope_type": "yarn", "factor": 4.0}, None, 32768, 131072),
        (QWEN3, 40960, {"rope_type": "yarn", "factor": 4.0}, 32768, 32768, 131072),
        (LLAMA, 131072, LLAMA3 | {"original_max_position_embeddings": 8192}, None, 8192, 131072),
        # longrope: the long factors count where the window reaches beyond L.
        (LLAMA, 32768, LONGROPE | {"original_max_position_embeddings": 32768}, None, 32768, 32768),
        (LLAMA, 32768, LONGROPE | ORIGINAL, None, 4096, 32768),
        (LLAMA, 4096, LONGROPE | ORIGINAL | {"factor": 8.0}, None, 4096, 32768),
        (PHI3, 131072, LONGROPE | ORIGINAL, None, 4096, 131072),
    ],
)
def test_windows(
    config: dict[str, Any], window: int, entry: Any, given: int | None, original: int, reached: int, key: str, tmp_path
) -> None:
    if config is GEMMA3 and key == "rope_parameters":  # the class passes over a flat dictionary under this name
        entry = NESTED
    folder = write(tmp_path / "model", config, window, key, entry)
    found = inspect_model(folder, original_length=given)
    assert (found.original_length, found.context_window) == (original, reached)
    assert found.existing_windows[-1]["max_length"] == reached


def test_one_dictionary_per_layer_type(tmp_path):
    folder = write(tmp_path / "model", GEMMA3, 131072, "rope_parameters", NESTED)
    found = inspect_model(folder)
    assert (found.original_length, found.context_window) == (16384, 131072)


def test_a_text_model_inside_another(tmp_path):
    text = GEMMA3 | {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    folder = write(tmp_path / "model", {"model_type": "gemma3"}, None, "text_config", text)
    found = inspect_model(folder)
    assert (found.original_length, found.context_window) == (16384, 131072)


def test_the_window_under_another_name(tmp_path):
    """Vicuna's and LongChat's configs state the window that they were extended to in max_sequence_length."""
    folder = write(tmp_path / "model", LLAMA, 4096, "rope_scaling", LINEAR, max_sequence_length=16384)
    found = inspect_model(folder)
    assert (found.original_length, found.context_window) == (4096, 16384)


@pytest.mark.parametrize(
    ("entry", "given", "says"),
    [
        (LINEAR, None, "window of 16384 divided by the linear factor 4"),
        (LINEAR, 4096, ""),
        (LINEAR | ORIGINAL, None, ""),
        ({"rope_type": "yarn", "factor": 4.0}, None, "transformers takes for the original length of YaRN"),
        ({"rope_type": "yarn", "factor": 4.0} | ORIGINAL, None, ""),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16384}, None, ""),  # Qwen2.5's card
        (None, None, ""),
    ],
)
def test_a_guess_is_said_to_be_one(entry, given, says, tmp_path):
    found = inspect_model(write(tmp_path / "model", LLAMA, 16384, "rope_scaling", entry), original_length=given)
    assert says in found.original_length_guess
    assert bool(found.original_length_guess) is bool(says)
    assert ("a guess" in str(found)) is bool(says)


def test_a_target_inside_the_window_names_the_guess(tmp_path):
    folder = write(tmp_path / "model", LLAMA, 16384, "rope_scaling", LINEAR)
    with pytest.raises(LongRopeError, match="window of 16384 tokens, found 8192; its original window L of 4096 is a g"):
        plan(folder, 8192)
    assert plan(folder, "32k", original_length=4096).original_length == 4096
    with pytest.raises(LongRopeError, match=r"window of 131072 tokens, found 65536$"):
        plan(write(tmp_path / "yarn", QWEN3, 40960, "rope_scaling", YARN), "64k")


def test_longrope_at_its_original_length_has_the_short_factors(tmp_path):
    entry = LONGROPE | {"original_max_position_embeddings": 32768}
    found = inspect_model(write(tmp_path / "model", LLAMA, 32768, "rope_scaling", entry))
    (window,) = found.existing_windows
    assert (window["first_factor"], window["last_factor"], window["attention_factor"]) == (1.0, SHORT[-1], 1.0)


@pytest.mark.parametrize(
    ("config", "kind", "advice"),
    [
        (PHI3 | ORIGINAL, "su", "write 'longrope' in place of 'su'"),
        (LLAMA, "su", "write 'longrope' in place of 'su'"),
        (QWEN3, "su", "write 'longrope' in place of 'su'"),
        (LLAMA, "mrope", "write 'default' in place of 'mrope'"),
        (LLAMA, "magic", "it knows axial, default, dynamic"),
    ],
)
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_a_type_that_transformers_does_not_know(config, kind, advice, key, tmp_path):
    entry = {key: kind, "short_factor": SHORT, "long_factor": LONG}
    folder = write(tmp_path / "model", config, 131072, "rope_scaling", entry)
    with pytest.raises(LongRopeError, match=advice) as error:
        inspect_model(folder)
    assert error.value.code == "unknown-rope-type"
    assert "\n" not in str(error.value)
