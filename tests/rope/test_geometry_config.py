"""`RopeGeometry.from_config` over real transformers configurations, version 5 objects and version 4 dicts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2VLConfig,
    Qwen3Config,
    StableLmConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry, rope_layer_types, rope_parameters_of

ONES_48 = [1.0] * 48


def _longrope(length: int | None, **more: Any) -> dict[str, Any]:
    inside = {} if length is None else {"original_max_position_embeddings": length}
    return {"rope_type": "longrope", "short_factor": ONES_48, "long_factor": [2.0] * 48} | inside | more


PHI3: dict[str, Any] = {"hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=4096), (128, 1e4, 4096)),
        (LlamaConfig(head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 5e5}), (64, 5e5, 2048)),
        (MistralConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), (128, 1e6, 131072)),
        (MixtralConfig(), (128, 1e6, 131072)),  # the class has head_dim = None
        (Qwen3Config(hidden_size=1024, num_attention_heads=16, head_dim=128), (128, 1e4, 32768)),
        (Phi3Config(**PHI3, rope_parameters=_longrope(4096)), (96, 1e4, 4096)),
        # The top level goes first in transformers, so it does here.
        (Phi3Config(**PHI3, original_max_position_embeddings=8192, rope_parameters=_longrope(2048)), (96, 1e4, 8192)),
        (Phi3Config(hidden_size=3072, num_attention_heads=32, max_position_embeddings=256), (96, 1e4, 256)),
        (GPTNeoXConfig(hidden_size=6144, num_attention_heads=64), (24, 1e4, 2048)),
        (GPTNeoXConfig(hidden_size=512, num_attention_heads=8, rotary_pct=0.5, rotary_emb_base=20000), (32, 2e4, 2048)),
        (StableLmConfig(), (20, 1e4, 4096)),
        (StableLmConfig(hidden_size=2048, num_attention_heads=32, partial_rotary_factor=0.5), (32, 1e4, 4096)),
        (DeepseekV3Config(), (64, 1e4, 4096)),
        (Gemma3TextConfig(), (256, 1e6, 131072)),
        (Gemma3Config(), (256, 1e6, 131072)),
        (Olmo3Config(), (128, 5e5, 2048)),
        (Qwen2VLConfig(), (128, 1e6, 32768)),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Config") if hasattr(value, "model_type") else "",
)
def test_real_configurations(config: Any, expected: tuple[int, float, int]) -> None:
    geometry = RopeGeometry.from_config(config)
    assert (geometry.rotary_dim, geometry.base, geometry.original_length) == expected


@pytest.mark.parametrize(
    ("config", "module"),
    [
        (LlamaConfig(head_dim=96), LlamaRotaryEmbedding),
        (GPTNeoXConfig(hidden_size=6144, num_attention_heads=64), GPTNeoXRotaryEmbedding),
        (StableLmConfig(), StableLmRotaryEmbedding),
    ],
    ids=["llama", "gpt_neox", "stablelm"],
)
def test_frequencies_are_those_of_the_model(config: Any, module: Any) -> None:
    inv_freq: torch.Tensor = module(config).inv_freq
    np.testing.assert_allclose(RopeGeometry.from_config(config).inv_freq, inv_freq.double().numpy(), rtol=1e-6)


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_frequencies_per_layer_type(layer_type: str) -> None:
    inv_freq = getattr(Gemma3RotaryEmbedding(Gemma3TextConfig()), f"{layer_type}_inv_freq")
    geometry = RopeGeometry.from_config(Gemma3TextConfig(), layer_type=layer_type)
    np.testing.assert_allclose(geometry.inv_freq, inv_freq.double().numpy(), rtol=1e-6)


def test_explicit_original_length_wins() -> None:
    config = Phi3Config(**PHI3, rope_parameters=_longrope(4096))
    assert RopeGeometry.from_config(config, original_length=2048).original_length == 2048


def test_version_4_namespace() -> None:
    config = SimpleNamespace(
        model_type="llama",
        hidden_size=4096,
        num_attention_heads=32,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={"type": "llama3", "factor": 16.0, "original_max_position_embeddings": 8192},
    )
    assert RopeGeometry.from_config(config) == RopeGeometry(rotary_dim=128, base=5e5, original_length=8192)
    parameters = rope_parameters_of(config)
    assert parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 8192,
    }
    parameters["factor"] = 1.0  # a copy
    assert config.rope_scaling["factor"] == 16.0
    config.rope_scaling = None
    config.original_max_position_embeddings = None
    assert RopeGeometry.from_config(config).original_length == 131072
    assert rope_parameters_of(config) == {"rope_type": "default", "rope_theta": 500000.0}


def test_original_length_of_two_places() -> None:
    inside = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 1e4}
    config = SimpleNamespace(head_dim=64, original_max_position_embeddings=4096, rope_parameters=inside)
    assert RopeGeometry.from_config(config).original_length == 4096
    config.rope_parameters = {"full_attention": inside}
    assert RopeGeometry.from_config(config).original_length == 2048


def test_version_4_latent_attention() -> None:
    config = SimpleNamespace(
        hidden_size=7168, num_attention_heads=128, qk_rope_head_dim=64, rope_theta=1e4, max_position_embeddings=4096
    )
    assert RopeGeometry.from_config(config) == RopeGeometry(rotary_dim=64, base=1e4, original_length=4096)


def test_version_4_names_of_partial_rotary() -> None:
    neox = SimpleNamespace(
        hidden_size=6144, num_attention_heads=64, rotary_pct=0.25, rotary_emb_base=10000, max_position_embeddings=2048
    )
    assert RopeGeometry.from_config(neox) == RopeGeometry(rotary_dim=24, base=1e4, original_length=2048)


@pytest.mark.parametrize("top_level", [None, 4096])
def test_version_4_dict_through_transformers(top_level: int | None) -> None:
    old: dict[str, Any] = {"rope_theta": 250000.0, "rope_scaling": _longrope(None if top_level else 4096, type="su")}
    del old["rope_scaling"]["rope_type"]
    if top_level:
        old["original_max_position_embeddings"] = top_level
    config = LlamaConfig.from_dict(old | PHI3)
    assert RopeGeometry.from_config(config) == RopeGeometry(rotary_dim=96, base=250000.0, original_length=4096)
    assert rope_parameters_of(config)["rope_type"] == "longrope"


def test_layer_types() -> None:
    assert rope_layer_types(LlamaConfig()) == []
    assert rope_layer_types(Qwen3Config()) == []  # has layer_types, but one RoPE for all
    assert rope_layer_types(GPT2Config()) == []
    assert sorted(rope_layer_types(Gemma3Config())) == ["full_attention", "sliding_attention"]
    assert sorted(rope_layer_types(Olmo3Config())) == ["full_attention", "sliding_attention"]
    assert RopeGeometry.from_config(Gemma3TextConfig(), layer_type="sliding_attention").base == 1e4
    assert RopeGeometry.from_config(Qwen3Config(), layer_type="full_attention").base == 1e4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "expected a model with rotary position embeddings .* found gpt2 without"),
        (FalconConfig(alibi=True), "found falcon without"),
        (SimpleNamespace(hidden_size=64), "found SimpleNamespace without"),
        (
            SimpleNamespace(rope_theta=1e4, hidden_size=64, max_position_embeddings=9),
            "expected head_dim, or hidden_size and num_attention_heads",
        ),
        (SimpleNamespace(rope_theta=1e4, head_dim=64), "expected max_position_embeddings"),
        (SimpleNamespace(rope_theta=1e4, head_dim=33, max_position_embeddings=9), "rotary_dim must be even.*found 33"),
        (SimpleNamespace(rope_theta="x", head_dim=32, max_position_embeddings=9), "base must be"),
        (SimpleNamespace(rope_scaling=[1], rope_theta=1e4), "RoPE parameters of SimpleNamespace as a dict"),
        (Gemma4TextConfig(), "'proportional' in gemma4_text"),
    ],
)
def test_refusals_are_one_line(config: Any, message: str) -> None:
    with pytest.raises(LongRopeError, match=message) as caught:
        RopeGeometry.from_config(config)
    assert caught.value.code in ("not-rope", "invalid-config", "invalid-number", "invalid-geometry")
    assert "\n" not in str(caught.value)


def test_one_head_dim_per_layer_is_refused() -> None:
    with pytest.raises(LongRopeError, match="expected one head_dim for all layers"):
        RopeGeometry.from_config(Gemma4TextConfig(), layer_type="sliding_attention")


def test_unknown_layer_type() -> None:
    with pytest.raises(LongRopeError, match=r"one of .*full_attention.*found 'global' in gemma3_text"):
        RopeGeometry.from_config(Gemma3TextConfig(), layer_type="global")
