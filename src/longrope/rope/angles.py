"""The one frequency function: cosines and sines of a window at given positions. Everything that rotates uses it.

Plain float32 angles are wrong by up to 0.12 at position 2,097,152: the product n·θ has an ulp of 0.125 there. Here the
angle is counted in turns as a 32-bit fixed-point number whose overflow *is* the reduction modulo one turn, so the
float32 angle that reaches cos and sin always lies in [−π, π) and is exact to about 4e-7 rad at every position.
It costs two passes over memory more than the plain product and saves cos and sin their own range reduction;
benchmarks/angles.py measures both.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window

_TURN = 2**32


class _FixedPoint(NamedTuple):
    """Turns per token of every pair, split so that n·(steps/2³² + rest/2π) is exact to float64."""

    steps_D: Tensor  # int32: whole 2⁻³² turns per token; n·steps wraps modulo one turn
    rest_D: Tensor  # float32, radians per token: what rounding to whole steps left over (below 2⁻³³ turns)


@lru_cache(maxsize=128)
def _fixed_point(geometry: RopeGeometry, factors: tuple[float, ...], device: torch.device) -> _FixedPoint:
    turns = geometry.inv_freq / np.asarray(factors, dtype=np.float64) / (2 * math.pi)
    steps = np.rint(turns * _TURN)
    rest = (turns - steps / _TURN) * 2 * math.pi
    return _FixedPoint(
        torch.from_numpy(steps.astype(np.int64).astype(np.int32)).to(device),
        torch.from_numpy(rest.astype(np.float32)).to(device),
    )


@lru_cache(maxsize=16)
def _plain_inv_freq(geometry: RopeGeometry, device: torch.device) -> Tensor:
    # The arithmetic of transformers' default RoPE, in its order and its float32: identity must be bit-identical to it.
    exponent = torch.arange(0, geometry.rotary_dim, 2, dtype=torch.int64).float() / geometry.rotary_dim
    return (1.0 / (geometry.base**exponent)).to(device)


def _reduced_angle(geometry: RopeGeometry, factors: tuple[float, ...], positions: Tensor) -> Tensor:
    """n·θ_i/λ_i modulo 2π in [−π, π), float32. positions (...,) -> (..., D)."""
    steps_D, rest_D = _fixed_point(geometry, factors, positions.device)
    n = positions.reshape(-1)
    turns = torch.outer(n.to(torch.int32), steps_D)  # the integer product wraps: whole turns fall away
    angle = turns.view(torch.float32).copy_(turns)  # converted in the same memory: a second buffer costs a tenth
    angle.addr_(n.float(), rest_D, beta=2 * math.pi / _TURN)  # to radians, and the rest, in one pass
    return angle.view(*positions.shape, geometry.pairs)


def _float64_angle(geometry: RopeGeometry, factors: Tensor, positions: Tensor) -> Tensor:
    """n·θ_i/λ_i modulo 2π in float64, so that gradients reach `factors` (D,). positions (...,) -> (..., D)."""
    inv_freq_D = torch.from_numpy(geometry.inv_freq).to(positions.device) / factors.double()
    angle = positions.double()[..., None] * inv_freq_D
    turns = (angle.detach() / (2 * math.pi)).round_()
    return angle - turns * (2 * math.pi)


def _angle(
    geometry: RopeGeometry, factors: tuple[float, ...] | Tensor, positions: Tensor, dtype: torch.dtype
) -> Tensor:
    if isinstance(factors, Tensor):
        return _float64_angle(geometry, factors, positions).to(dtype)
    if dtype == torch.float64:
        return _float64_angle(geometry, torch.tensor(factors, device=positions.device, dtype=dtype), positions)
    return _reduced_angle(geometry, factors, positions)


def cos_sin(
    geometry: RopeGeometry,
    window: Window,
    positions: Tensor,
    *,
    factors: Tensor | None = None,
    attention_factor: Tensor | float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, times the attention factor, of every rotary pair (LongRoPE Eq. 2 and 3).

    `positions` is an integer tensor (...,) of absolute positions in tokens, below 2³¹; the result is a pair of tensors
    (..., D) of `dtype` (float32 or float64) on the same device. Positions n < n̂ keep the original angle n·θ_i, the
    others take n·θ_i/λ_i.

    `factors` (D,) and `attention_factor` replace the window's numbers by tensors through which gradients flow.

    A window whose factors are all 1 is the original RoPE: it is computed with the float32 arithmetic the model was
    trained with, so that it is bit-identical to the untouched model. Every other window has angles exact to 1e-6 rad.
    """
    if attention_factor is None:
        attention_factor = window.attention_factor
    identity = factors is None and all(factor == 1.0 for factor in window.factors)
    if identity:
        angle = (positions[..., None].float() * _plain_inv_freq(geometry, positions.device)).to(dtype)
    else:
        angle = _angle(geometry, window.factors if factors is None else factors, positions, dtype)
    if window.start_tokens > 0 and not identity:
        original = _angle(geometry, (1.0,) * geometry.pairs, positions, dtype)
        angle = torch.where((positions < window.start_tokens)[..., None], original, angle)
    if isinstance(attention_factor, Tensor) or angle.requires_grad:
        return angle.cos() * attention_factor, angle.sin() * attention_factor
    cos, sin = angle.cos(), angle.sin_()
    if attention_factor != 1.0:
        cos, sin = cos.mul_(attention_factor), sin.mul_(attention_factor)
    return cos, sin
