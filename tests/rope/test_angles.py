"""Cosines and sines against exact arithmetic, at the positions and sizes of real models."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longrope.rope.angles import cos_sin
from longrope.rope.closed_forms import ntk_aware, pi, su_attention_factor, yarn
from longrope.rope.geometry import FloatArray, RopeGeometry
from longrope.rope.presets import preset, preset_names
from longrope.rope.scaling import MAX_POSITION, Window

FARTHEST = 2_097_152
ALLOWED = 1e-4  # radians, at FARTHEST
ACHIEVED = 1e-6  # what this implementation promises, at every position
GEOMETRIES = [
    pytest.param(RopeGeometry(rotary_dim=dim, base=base, original_length=length), id=f"{dim}-{base:g}")
    for dim, base, length in [
        (64, 1e4, 2048),
        (96, 1e4, 4096),
        (128, 1e4, 4096),
        (128, 5e5, 8192),
        (128, 1e6, 32768),
        (128, 1e7, 8192),
    ]
]
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
POSITIONS = torch.tensor(
    [0, 1, 2, 7, 255, 4096, 65_535, 131_072, 999_983, 1_048_576, 1_999_993, *range(FARTHEST - 600, FARTHEST + 3)]
)


def exact_angle(geometry: RopeGeometry, factors: FloatArray, positions: Tensor) -> np.ndarray:
    """n·θ_i/λ_i modulo 2π in [−π, π], (N, D), from 60-digit arithmetic and integers."""
    one = 2**128  # a turn; turns per token are whole numbers of it, so that the product with n is exact
    with localcontext() as context:
        context.prec = 60
        logarithm, tau = Decimal(geometry.base).ln(), 2 * PI
        thetas = [(logarithm * (-2 * pair) / geometry.rotary_dim).exp() for pair in range(geometry.pairs)]
        steps = [int(one * theta / Decimal(factor) / tau) for theta, factor in zip(thetas, factors, strict=True)]
    turns = np.array([[n * step % one / one for step in steps] for n in positions.tolist()])
    return (turns - np.rint(turns)) * 2 * math.pi


def angle_error(cos: Tensor, sin: Tensor, exact: np.ndarray) -> float:
    """The largest angle, in radians, between (cos, sin) and the exact direction, whatever the length of (cos, sin)."""
    error = np.arctan2(sin.double().numpy(), cos.double().numpy()) - exact
    return float(np.abs(error - 2 * math.pi * np.rint(error / (2 * math.pi))).max())


def random_factors(pairs: int, seed: int, most: float) -> FloatArray:
    """Monotone factors from 1 to at most `most`."""
    return np.sort(np.exp(np.random.default_rng(seed).uniform(0, math.log(most), pairs)))


def window(factors: FloatArray, start_tokens: int = 0, attention_factor: float = 1.0) -> Window:
    return Window(2**22, tuple(factors.tolist()), start_tokens, attention_factor)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_angles_are_exact_to_two_million_tokens(geometry: RopeGeometry, seed: int) -> None:
    factors = random_factors(geometry.pairs, seed, 640.0)
    cos, sin = cos_sin(geometry, window(factors), POSITIONS)
    assert cos.dtype == sin.dtype == torch.float32
    exact = exact_angle(geometry, factors, POSITIONS)
    assert angle_error(cos, sin, exact) < ACHIEVED < ALLOWED
    np.testing.assert_allclose(cos.numpy(), np.cos(exact), atol=ACHIEVED)
    np.testing.assert_allclose(sin.numpy(), np.sin(exact), atol=ACHIEVED)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_plain_float32_product_is_not_exact(geometry: RopeGeometry) -> None:
    factors = random_factors(geometry.pairs, 0, 640.0)
    plain = POSITIONS.float()[:, None] * torch.from_numpy(geometry.inv_freq / factors).float()
    assert angle_error(plain.cos(), plain.sin(), exact_angle(geometry, factors, POSITIONS)) > 100 * ALLOWED


@pytest.mark.parametrize("name", preset_names()[::3])
def test_angles_of_published_factors(name: str) -> None:
    scaling = preset(name)
    long = scaling.windows[-1]
    positions = POSITIONS[::7]
    exact = exact_angle(scaling.geometry, np.array(long.factors), positions)
    assert angle_error(*cos_sin(scaling.geometry, long, positions), exact) < ACHIEVED


@settings(max_examples=25, deadline=None)
@given(
    dim=st.sampled_from([2, 16, 64, 96, 128, 256]),
    base=st.floats(100.0, 1e8),
    seed=st.integers(0, 2**32 - 1),
    least=st.floats(0.05, 1.0),
    positions=st.lists(st.integers(0, 2**22), min_size=1, max_size=5),
)
def test_angles_of_any_factors(dim: int, base: float, seed: int, least: float, positions: list[int]) -> None:
    geometry = RopeGeometry(rotary_dim=dim, base=base, original_length=4096)
    factors = least * random_factors(geometry.pairs, seed, 1024.0)  # below 1 too: faster than the original
    n = torch.tensor(positions)
    cos, sin = cos_sin(geometry, window(factors), n)
    # float64's own rounding of turns per token, times 4 million tokens, is part of the bound
    assert angle_error(cos, sin, exact_angle(geometry, factors, n)) < ACHIEVED


def test_angles_hold_at_the_last_position() -> None:
    geometry = RopeGeometry(rotary_dim=128, base=1e4, original_length=4096)
    factors = pi(geometry, 2**31)
    positions = torch.tensor([MAX_POSITION - 1, MAX_POSITION])
    cos, sin = cos_sin(geometry, window(factors), positions)
    assert angle_error(cos, sin, exact_angle(geometry, factors, positions)) < 1e-5  # float64 turns × 2³¹


def test_positions_of_any_shape_and_integer_type() -> None:
    geometry = RopeGeometry(rotary_dim=64, base=1e4, original_length=2048)
    scaled = window(ntk_aware(geometry, 8192), start_tokens=5)
    positions = torch.randint(0, 8192, (3, 4, 5))
    cos, sin = cos_sin(geometry, scaled, positions)
    assert cos.shape == sin.shape == (3, 4, 5, 32)
    one_cos, one_sin = cos_sin(geometry, scaled, positions[1, 2])
    assert torch.equal(cos[1, 2], one_cos)
    assert torch.equal(sin[1, 2], one_sin)
    assert torch.equal(cos, cos_sin(geometry, scaled, positions.int())[0])
    assert torch.equal(cos.mT, cos_sin(geometry, scaled, positions.mT)[0].permute(0, 2, 1, 3).mT)
    assert cos_sin(geometry, scaled, torch.empty(2, 0, dtype=torch.long))[0].shape == (2, 0, 32)
    assert cos_sin(geometry, scaled, torch.tensor(3))[0].shape == (32,)


def test_positions_are_left_as_they_were() -> None:
    geometry = RopeGeometry(rotary_dim=64, base=1e4, original_length=2048)
    positions = torch.arange(9, dtype=torch.int32)
    first = cos_sin(geometry, window(pi(geometry, 8192)), positions)
    assert torch.equal(positions, torch.arange(9, dtype=torch.int32))
    second = cos_sin(geometry, window(pi(geometry, 8192)), positions)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# Start tokens, Eq. 3.


@pytest.mark.parametrize("start_tokens", [1, 4, 64, 256])
def test_start_tokens_keep_the_original_angle(start_tokens: int) -> None:
    geometry = RopeGeometry(rotary_dim=128, base=1e4, original_length=4096)
    factors = random_factors(geometry.pairs, 3, 32.0)
    positions = torch.arange(300)
    scaled = cos_sin(geometry, window(factors, start_tokens), positions)
    early, late = slice(None, start_tokens), slice(start_tokens, None)
    for part, expected in ((early, np.ones(geometry.pairs)), (late, factors)):
        exact = exact_angle(geometry, expected, positions[part])
        assert angle_error(scaled[0][part], scaled[1][part], exact) < ACHIEVED
    # Eq. 3 is n·θ/λ beyond n̂, not (n − n̂)·θ/λ and not n̂·θ + (n − n̂)·θ/λ: position n̂ itself is already rescaled.
    without = cos_sin(geometry, window(factors), positions)
    for ours, theirs in zip(scaled, without, strict=True):
        assert torch.equal(ours[late], theirs[late])


def test_start_tokens_do_not_change_an_identity_window() -> None:
    geometry = RopeGeometry(rotary_dim=128, base=1e4, original_length=4096)
    positions = torch.arange(4096)
    plain = cos_sin(geometry, window(np.ones(64)), positions)
    started = cos_sin(geometry, window(np.ones(64), start_tokens=64), positions)
    assert torch.equal(plain[0], started[0])
    assert torch.equal(plain[1], started[1])


# The attention factor.


@pytest.mark.parametrize("start_tokens", [0, 16])
@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_the_attention_factor_multiplies_both(start_tokens: int, ratio: float) -> None:
    geometry = RopeGeometry(rotary_dim=96, base=1e4, original_length=4096)
    m = su_attention_factor(geometry, 131_072)
    assert m > 1.1
    factors = pi(geometry, ratio * 4096)
    positions = torch.arange(200)
    cos, sin = cos_sin(geometry, window(factors, start_tokens), positions)
    scaled_cos, scaled_sin = cos_sin(geometry, window(factors, start_tokens, m), positions)
    assert torch.equal(scaled_cos, cos * m)
    assert torch.equal(scaled_sin, sin * m)
    given_cos, given_sin = cos_sin(geometry, window(factors, start_tokens, 9.0), positions, attention_factor=m)
    assert torch.equal(given_cos, scaled_cos)
    assert torch.equal(given_sin, scaled_sin)


# The original RoPE.


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("base", [10000, 10000.0, 500000.0, 1e6, 1234567.8])
def test_factors_of_one_are_bit_identical_to_transformers(dim: int, base: float) -> None:
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    geometry = RopeGeometry.from_config(config)
    positions = torch.cat((torch.arange(5000), torch.arange(FARTHEST - 9, FARTHEST + 9)))[None]
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = cos_sin(geometry, window(np.ones(dim // 2)), positions)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(torch.cat((our, our), dim=-1), their)


# Factors as a tensor, with gradients.


@pytest.mark.parametrize("start_tokens", [0, 8])
def test_a_tensor_of_factors_gives_the_angles_of_the_tuple(start_tokens: int) -> None:
    geometry = RopeGeometry(rotary_dim=128, base=5e5, original_length=8192)
    factors = yarn(geometry, 131_072)
    scaled = window(factors, start_tokens, 1.1)
    identity = window(np.ones(geometry.pairs), start_tokens, 1.1)
    tuple_cos, tuple_sin = cos_sin(geometry, scaled, POSITIONS)
    cos, sin = cos_sin(geometry, identity, POSITIONS, factors=torch.from_numpy(factors))
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos, tuple_cos, rtol=0, atol=2e-6)
    torch.testing.assert_close(sin, tuple_sin, rtol=0, atol=2e-6)


@pytest.mark.parametrize("position", [3, 100, 4096, 131_072])
def test_gradients_are_those_of_central_differences(position: int) -> None:
    geometry = RopeGeometry(rotary_dim=64, base=1e4, original_length=4096)
    values = random_factors(geometry.pairs, 5, 32.0)
    factors = torch.from_numpy(values).requires_grad_()
    attention_factor = torch.tensor(1.2, requires_grad=True)
    start_tokens = 8
    positions = torch.tensor([position])
    cos, sin = cos_sin(
        geometry, window(values, start_tokens), positions, factors=factors, attention_factor=attention_factor
    )
    weights = torch.randn(2, geometry.pairs, generator=torch.Generator().manual_seed(1))
    (weights[0] * cos + weights[1] * sin).sum().backward()

    def value(inverse: FloatArray) -> FloatArray:  # of every pair, in float64
        theta = 1.0 if position < start_tokens else 1 / inverse
        angle = position * geometry.inv_freq * theta
        return weights[0].double().numpy() * np.cos(angle) + weights[1].double().numpy() * np.sin(angle)

    step = values * 1e-6 / max(1.0, position / 100)
    central = 1.2 * (value(values + step) - value(values - step)) / (2 * step)
    assert factors.grad is not None
    scale = max(1e-6, float(np.abs(central).max()))
    np.testing.assert_allclose(factors.grad.numpy() / scale, central / scale, rtol=0, atol=1e-4)
    assert bool((factors.grad != 0).any()) == (position >= start_tokens)
    assert attention_factor.grad is not None
    assert attention_factor.grad.item() == pytest.approx(value(values).sum(), abs=1e-4)


def test_no_gradient_is_kept_without_tensors() -> None:
    geometry = RopeGeometry(rotary_dim=64, base=1e4, original_length=4096)
    cos, sin = cos_sin(geometry, window(pi(geometry, 8192)), torch.arange(4))
    assert not cos.requires_grad
    assert not sin.requires_grad
