"""The scaling a checkpoint carries: what transformers' own rotary modules compute for the same configuration."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo3Config,
    Phi3Config,
    PhimoeConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.hunyuan_v1_dense.configuration_hunyuan_v1_dense import HunYuanDenseV1Config
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding

from longrope.errors import LongRopeError
from longrope.rope.hf_config import scaling_of_config
from longrope.rope.scaling import Window

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
RISING = np.linspace(1.0, 20.0, 48).round(3).tolist()
SHORT = np.linspace(1.0, 2.0, 48).round(3).tolist()
PHI3: dict[str, Any] = {"hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072}


def _llama(max_length: int, **parameters: Any) -> LlamaConfig:
    base = {"rope_theta": 5e5}
    return LlamaConfig(max_position_embeddings=max_length, head_dim=96, rope_parameters=base | parameters)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (_llama(16384, rope_type="linear", factor=4.0), 16384),
        (_llama(10240, rope_type="linear", factor=2.5), 10240),
        (_llama(131072, **LLAMA3, original_max_position_embeddings=8192), 131072),
        (_llama(16384, **YARN), 16384),
        (_llama(4096, **YARN), 16384),
        (_llama(16384, **YARN, beta_fast=128.0, beta_slow=2.0), 16384),
        (_llama(16384, **YARN, truncate=False), 16384),
        (_llama(16384, **YARN, attention_factor=1.3), 16384),
        (_llama(16384, **YARN, mscale=1.0, mscale_all_dim=0.8), 16384),
        (_llama(16384, **YARN, mscale=1.0), 16384),
        (_llama(32768, **(YARN | {"factor": None})), 32768),
        (DeepseekV3Config(max_position_embeddings=16384, rope_parameters=YARN | {"rope_theta": 1e4}), 16384),
        (GPTNeoXConfig(rope_parameters={"rope_type": "linear", "factor": 2.0}), 2048),
    ],
)
def test_one_window_as_transformers_computes_it(config: Any, target: int) -> None:
    rope_type = config.rope_parameters["rope_type"]
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu")
    scaling = scaling_of_config(config)
    assert scaling is not None
    (window,) = scaling.windows
    ours = scaling.geometry.inv_freq / np.array(window.factors)
    np.testing.assert_allclose(ours, inv_freq.double().numpy(), rtol=1e-6)
    assert window.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert (window.max_length, window.start_tokens) == (target, 0)
    assert scaling.provenance["rope_parameters"]["rope_type"] == rope_type


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(**PHI3, rope_parameters={"rope_type": "longrope", "short_factor": SHORT, "long_factor": RISING}),
        # With the old name transformers demands the original length inside the dict as well.
        Phi3Config(
            **PHI3,
            rope_parameters={
                "type": "su",
                "short_factor": SHORT,
                "long_factor": RISING,
                "original_max_position_embeddings": 4096,
            },
        ),
        LlamaConfig(
            **PHI3,
            rope_parameters={
                "rope_type": "longrope",
                "short_factor": SHORT,
                "long_factor": RISING,
                "factor": 16.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": 4096,
            },
        ),
    ],
    ids=["phi3", "phi3-su", "llama"],
)
def test_longrope_has_two_windows(config: Any) -> None:
    scaling = scaling_of_config(config)
    assert scaling is not None
    assert [window.max_length for window in scaling.windows] == [4096, 131072]
    for window, length in zip(scaling.windows, (4096, 4097), strict=True):
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
        ours = scaling.geometry.inv_freq / np.array(window.factors)
        np.testing.assert_allclose(ours, inv_freq.double().numpy(), rtol=1e-6)
        assert window.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert "short_factor" not in scaling.provenance["rope_parameters"]


def test_phimoe_has_an_attention_factor_per_window() -> None:
    parameters = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": RISING, "rope_theta": 1e4}
    parameters |= {"original_max_position_embeddings": 4096, "short_mscale": 1.1, "long_mscale": 1.3}
    scaling = scaling_of_config(PhimoeConfig(**PHI3, rope_parameters=parameters))
    assert scaling is not None
    assert [window.attention_factor for window in scaling.windows] == [1.1, 1.3]


def test_version_4_namespace() -> None:
    config = SimpleNamespace(
        hidden_size=3072,
        num_attention_heads=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling={"type": "su", "short_factor": SHORT, "long_factor": RISING},
    )
    scaling = scaling_of_config(config)
    assert scaling is not None
    su = math.sqrt(1 + math.log(32) / math.log(4096))
    assert scaling.windows == (Window(4096, tuple(SHORT), 0, su), Window(131072, tuple(RISING), 0, su))


@pytest.mark.parametrize(
    "parameters",
    [{"full_attention": YARN | {"rope_theta": 5e5}}, {"full_attention": YARN | {"rope_theta": 5e5, "truncate": False}}],
)
def test_per_layer_type(parameters: dict[str, Any]) -> None:
    sliding = {"sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}
    config = Olmo3Config(max_position_embeddings=16384, rope_parameters=parameters | sliding)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu", layer_type="full_attention")
    scaling = scaling_of_config(config)
    assert scaling is not None
    (window,) = scaling.windows
    ours = scaling.geometry.inv_freq / np.array(window.factors)
    np.testing.assert_allclose(ours, inv_freq.double().numpy(), rtol=1e-6)
    assert window.attention_factor == pytest.approx(attention_factor)
    assert scaling_of_config(config, "sliding_attention") is None


def test_fixed_alpha_under_the_name_dynamic() -> None:
    parameters = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}
    config = HunYuanDenseV1Config(head_dim=128, max_position_embeddings=32768, rope_parameters=parameters)
    inv_freq: torch.Tensor = HunYuanDenseV1RotaryEmbedding(config).inv_freq
    scaling = scaling_of_config(config)
    assert scaling is not None
    assert scaling.target_length == 32768
    ours = scaling.geometry.inv_freq / np.array(scaling.windows[0].factors)
    np.testing.assert_allclose(ours, inv_freq.double().numpy(), rtol=2e-6)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        Gemma3TextConfig(),
        _llama(4096, rope_type="dynamic", factor=4.0),
        _llama(4096, rope_type="linear", factor=1.0),
        SimpleNamespace(rope_theta=1e4, head_dim=64, max_position_embeddings=4096, rope_scaling={"type": "mrope"}),
    ],
    ids=["llama", "gemma3", "dynamic", "linear-1", "mrope"],
)
def test_nothing_is_scaled(config: Any) -> None:
    assert scaling_of_config(config) is None


def _namespace(**parameters: Any) -> SimpleNamespace:
    return SimpleNamespace(rope_theta=1e4, head_dim=96, max_position_embeddings=4096, rope_scaling=parameters)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "found gpt2 without"),
        (_namespace(rope_type="magic"), "expected a rope_type of default, dynamic, linear, .* found 'magic'"),
        (_namespace(rope_type="linear"), "expected factor among the RoPE parameters of type 'linear'; found none"),
        (_namespace(rope_type="linear", factor="8"), "factor must be a finite number"),
        (_namespace(rope_type="linear", factor=0.5), "target_length must not be below"),
        (_namespace(rope_type="llama3", factor=8.0), "expected low_freq_factor among"),
        (_namespace(rope_type="longrope", long_factor=RISING), "expected short_factor among"),
        (
            _namespace(rope_type="longrope", factor=2.0, short_factor=SHORT, long_factor=RISING[1:]),
            r"windows\[1\].factors must hold 48 factors",
        ),
        (
            _namespace(rope_type="longrope", factor=2.0, short_factor=SHORT, long_factor="x"),
            "factors must be a sequence",
        ),
        (
            _namespace(rope_type="yarn", factor=2.0, attention_factor=-1.0),
            "attention_factor must be a finite number above 0",
        ),
    ],
)
def test_refusals(config: Any, message: str) -> None:
    with pytest.raises(LongRopeError, match=message) as caught:
        scaling_of_config(config)
    assert caught.value.code != "invalid-input"
    assert "\n" not in str(caught.value)
