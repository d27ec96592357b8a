"""The RoPE of an opened GGUF file is that of llama.cpp at all lengths: every scaling that keys and tensors state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longrope.models.loading import load_config, open_model
from longrope.rope.closed_forms import llama3
from longrope.rope.geometry import RopeGeometry
from tests.export.sources import refusal
from tests.models.gguf_models import HEAD_DIM, HEADS, WINDOW, model_of, save_gguf
from tests.models.test_gguf import EXACT, worst

gguf = pytest.importorskip("gguf")

TARGET, PAIRS = 4 * WINDOW, HEAD_DIM // 2
SHORT, LONG = np.linspace(1.0, 1.4, PAIRS), np.geomspace(1.0, 4.4, PAIRS)
LLAMA3 = llama3(RopeGeometry(HEAD_DIM, 10_000.0, WINDOW), 8.0)
SETS = {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}
LONGROPE = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": WINDOW}


def file(path, architecture="llama", keys=None, tensors=None):
    stated = {"context_length": TARGET} | {
        f"rope.scaling.{name}" if "." not in name else name: value for name, value in (keys or {}).items()
    }
    return save_gguf(path / "model.gguf", architecture, keys=stated, tensors=tensors)


@pytest.mark.parametrize(
    ("keys", "tensors", "rope_type", "original"),
    [
        ({"type": "linear", "factor": 4.0}, {}, "linear", WINDOW),
        ({"factor": 4.0}, {}, "linear", WINDOW),  # llama.cpp's default type
        ({"rope.scale_linear": 4.0}, {}, "linear", WINDOW),  # old files
        ({"type": "linear", "factor": 2.0, "original_context_length": 512}, {}, "linear", 512),
        ({"type": "none", "factor": 4.0}, {}, "default", TARGET),
        ({"factor": 4.0, "attn_factor": 1.2}, {}, "longrope", WINDOW),
        ({"type": "yarn", "factor": 4.0, "original_context_length": WINDOW}, {}, "yarn", WINDOW),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": WINDOW, "attn_factor": 0.9},
            {},
            "yarn",
            WINDOW,
        ),
        ({}, {"rope_freqs.weight": LLAMA3}, "llama3", WINDOW),
        ({}, {"rope_freqs.weight": LONG}, "longrope", int(TARGET / 4.4)),
        ({"factor": 2.0}, {"rope_freqs.weight": LONG}, "longrope", int(TARGET / 8.8)),
        ({}, {"rope_freqs.weight": np.ones(PAIRS)}, "default", TARGET),
        (LONGROPE, SETS, "longrope", WINDOW),
        (LONGROPE | {"attn_factor": 1.15}, SETS, "longrope", WINDOW),
        (LONGROPE | {"factor": 2.0}, SETS, "longrope", WINDOW),
    ],
    ids=str,
)
def test_llama_cpp_s_frequencies(keys, tensors, rope_type, original, tmp_path):
    path = file(tmp_path, keys=keys, tensors=tensors)
    loaded = open_model(path)
    assert loaded.model.config.rope_parameters["rope_type"] == rope_type
    assert loaded.geometry.original_length == original
    assert loaded.context_length == TARGET
    assert (loaded.checkpoint_scaling is None) == (rope_type == "default")
    assert worst(path, loaded.model, TARGET, [600, 1000]) < 2 * EXACT
    assert worst(path, loaded.model, WINDOW, [20, 200]) < EXACT  # llama.cpp has one set of factors for a context


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": WINDOW}
LINEAR = {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("phi3", LONGROPE | {"attn_factor": 1.15}),
        ("phi3", YARN),
        ("phi3", LINEAR),
        ("gemma3", LINEAR),  # in the layers without a window alone
        ("qwen2", YARN | {"yarn_beta_fast": 16.0, "yarn_log_multiplier": 0.1}),  # these two are read by other graphs
    ],
    ids=str,
)
def test_other_families_with_a_scaling(architecture, keys, tmp_path):
    path = file(tmp_path, architecture, keys, SETS if "rope.scaling.type" in keys else None)
    loaded = open_model(path)
    assert loaded.context_length == TARGET
    assert loaded.geometry.original_length == WINDOW
    assert worst(path, loaded.model, TARGET, [600, 1000]) < 2 * EXACT


def test_a_part_of_a_head_rotates(tmp_path):
    model = model_of("phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75})
    path = save_gguf(tmp_path / "model.gguf", "phi3", model=model)
    loaded = open_model(path)
    assert loaded.geometry.rotary_dim == 24
    assert worst(path, loaded.model, WINDOW, [1, 200]) < EXACT


@pytest.mark.parametrize("biases", ["of queries, keys and values", "of all"])
def test_a_llama_with_biases(biases, tmp_path):
    """Qwen 2 is written as a Llama too, and only its graph takes factors in llama.cpp."""
    model = model_of("qwen2") if "values" in biases else model_of("llama", attention_bias=True)
    path = save_gguf(tmp_path / "model.gguf", "llama", model=model)
    loaded = open_model(path)
    assert loaded.model.config.model_type == model.config.model_type
    assert worst(path, loaded.model, WINDOW, [1, 200]) < EXACT


def test_as_many_heads_have_keys_where_nothing_is_said(tmp_path):
    model = model_of("llama", num_key_value_heads=HEADS)
    path = save_gguf(tmp_path / "model.gguf", model=model, keys={"attention.head_count_kv": None})
    assert worst(path, open_model(path).model, WINDOW, [1, 200]) < EXACT


def test_the_base_that_is_not_stated(tmp_path):
    path = save_gguf(tmp_path / "model.gguf", model=model_of("llama"), keys={"rope.freq_base": None})
    assert load_config(str(path)).rope_parameters["rope_theta"] == 10_000.0


@pytest.mark.parametrize(
    ("architecture", "keys", "tensors", "named"),
    [
        ("llama", {"type": "magic"}, {}, "'magic'"),
        ("llama", {"type": "longrope"}, {}, "no factors"),
        ("llama", {}, SETS, "does not load them"),
        ("llama", LONGROPE, {"rope_factors_long.weight": LONG}, "one of two sets"),
        ("llama", LONGROPE, SETS | {"rope_freqs.weight": LONG}, "both rope_freqs and two sets"),
        ("llama", LONGROPE, {"rope_freqs.weight": LONG}, "rope_freqs in place of"),
        ("llama", LONGROPE, {name: values[:8] for name, values in SETS.items()}, "8 factors for 16"),
        ("llama", {"type": "longrope"}, SETS, "never takes the long"),
        ("llama", {"type": "yarn", "factor": 4.0}, {"rope_freqs.weight": LONG}, "beside the type yarn"),
        ("qwen2", {}, {"rope_freqs.weight": LONG}, "does not take"),
        ("llama", {}, {"rope_freqs.weight": np.zeros(PAIRS)}, "above 0"),
        ("llama", {"attn_factor": -1.0}, {}, "attn_factor"),
        ("llama", {"factor": "four"}, {}, "expected a number"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused(architecture, keys, tensors, named, tmp_path):
    error = refusal(load_config, str(file(tmp_path, architecture, keys, tensors)))
    assert named in str(error)
    assert "\n" not in str(error)


def test_a_saved_llama3_is_one_again(tmp_path):
    """`save_pretrained` states the scaling that the GGUF's tensor has."""
    path = file(tmp_path, tensors={"rope_freqs.weight": LLAMA3})
    loaded = open_model(path)
    loaded.model.save_pretrained(tmp_path / "saved")
    config = load_config(str(tmp_path / "saved"))
    assert config.rope_parameters["factor"] == pytest.approx(8.0)
    assert config.rope_parameters["original_max_position_embeddings"] == WINDOW
    assert torch.equal(open_model(path).model.lm_head.weight, loaded.model.lm_head.weight)
