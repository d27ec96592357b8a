"""Turn cached keys from one window to another by the difference of their angles, instead of computing them again.

Beyond the papers. A key under window a is m_a·R(φ_a)·k, with k the key before rotation; turning it by φ_b − φ_a and
multiplying by m_b/m_a gives m_b·R(φ_b)·k. That is exact for layer 0, whose k comes from the embeddings. Deeper layers'
k, and all values, come from hidden states that were computed under window a and stay so: an approximation, which costs
O(T) where computing again costs O(T²). benchmarks/generation.py measures both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from longrope.errors import LongRopeError
from longrope.models.cache_argument import with_cache
from longrope.models.chunked import base_of
from longrope.models.devices import device_of
from longrope.models.generation.cache import holds_keys_and_values_only, new_cache
from longrope.models.scaled import ScaledModel
from longrope.rope.angles import cos_sin
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window

_PROBE_POSITIONS = (1, 2, 3, 5, 8, 13, 21, 34)
_PIECE = 2048  # tokens turned at once: their float32 copies are what it takes beside the new keys


@dataclass(frozen=True)
class Pairing:
    """The dimensions of a head that are its rotary pairs: 2D of them from `start`, pair i is (i, D+i) or (2i, 2i+1)."""

    start: int
    interleaved: bool

    def turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """keys (B, H, T, head_dim), cos and sin (B, T, D) -> the turned keys, computed in cos's dtype."""
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D): all heads alike
        pairs = cos.shape[-1]
        turned = keys.clone()
        part = turned[..., self.start : self.start + 2 * pairs]
        first, second = (part[..., 0::2], part[..., 1::2]) if self.interleaved else torch.split(part, pairs, dim=-1)
        x, y = first.to(cos.dtype), second.to(cos.dtype)
        new_first, new_second = x * cos - y * sin, x * sin + y * cos
        first.copy_(new_first)
        second.copy_(new_second)
        return turned


class Rerotation:
    """The rotation of keys in every layer of a scaled model, found by trying; None for a layer that is not scaled.

    Raises LongRopeError when a layer's keys move with the window in another way than by rotation of pairs.
    """

    def __init__(self, scaled: ScaledModel) -> None:
        self.geometry = scaled.scaling.geometry
        self.pairings = _probe(scaled)

    def turn(self, cache: DynamicCache, positions: Tensor, old: Window, new: Window) -> None:
        """Turn all keys of `cache` from `old` to `new`; `positions` (B or 1, p) are those of its p tokens."""
        for layer, pairing in zip(cache.layers, self.pairings, strict=True):
            if pairing is not None:
                layer.keys = self._turned(layer.keys, pairing, positions, old, new)

    def _turned(self, keys: Tensor, pairing: Pairing, positions: Tensor, old: Window, new: Window) -> Tensor:
        held = keys.shape[-2]  # a sliding layer holds the last ones only
        positions = positions[:, positions.shape[1] - held :].to(keys.device)
        turned = torch.empty_like(keys)
        for at in range(0, held, _PIECE):
            piece = slice(at, at + _PIECE)
            cos, sin = angle_difference(self.geometry, old, new, positions[:, piece], _precision(keys.dtype))
            turned[:, :, piece] = pairing.turn(keys[:, :, piece], cos, sin)
        return turned


def angle_difference(
    geometry: RopeGeometry, old: Window, new: Window, positions: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of φ_new − φ_old times m_new/m_old at `positions` (...,): a pair of (..., D)."""
    c, s = cos_sin(geometry, old, positions, dtype=dtype)
    c_new, s_new = cos_sin(geometry, new, positions, dtype=dtype)
    square = old.attention_factor**2
    return (c_new * c + s_new * s) / square, (s_new * c - c_new * s) / square


def _precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _probe(scaled: ScaledModel) -> tuple[Pairing | None, ...]:
    """The pairing of every layer, from texts of one token each.

    A lone token attends to itself only, whatever its angle: hidden states are the same under both windows in every
    layer, and the keys differ by the rotation alone.
    """
    geometry = scaled.scaling.geometry
    old, new = (Window(max(_PROBE_POSITIONS) + 1, (factor,) * geometry.pairs) for factor in (1.0, 3.0))
    before, after = _lone_keys(scaled, old), _lone_keys(scaled, new)
    positions = torch.tensor(_PROBE_POSITIONS, device=device_of(scaled.model))[:, None]
    pairings: list[Pairing | None] = []
    for index, (keys, moved) in enumerate(zip(before, after, strict=True)):
        cos, sin = angle_difference(geometry, old, new, positions.to(keys.device), _precision(keys.dtype))
        starts = {0, keys.shape[-1] - 2 * geometry.pairs}
        candidates = [Pairing(start, interleaved) for start in sorted(starts) for interleaved in (False, True)]
        if _close(keys, moved):
            pairings.append(None)
            continue
        fitting = [pairing for pairing in candidates if _close(pairing.turn(keys, cos, sin), moved)]
        if not fitting:
            raise LongRopeError(
                f"cannot turn the cached keys of layer {index} of {type(scaled.model).__name__}: it does not rotate"
                " pairs of dimensions of the keys it caches",
                code="cannot-rerotate",
                hint="use `switch='recompute'`",
            )
        pairings.append(fitting[0])
    return tuple(pairings)


def _lone_keys(scaled: ScaledModel, window: Window) -> list[Tensor]:
    """Every layer's keys of eight texts of one token at different positions, each (8, H, 1, head_dim)."""
    model = scaled.model
    count = len(_PROBE_POSITIONS)
    ids = torch.arange(count, device=device_of(model))[:, None] % model.config.get_text_config().vocab_size
    positions = torch.tensor(_PROBE_POSITIONS, device=device_of(model))[:, None]
    cache: Any = new_cache(model)
    if not holds_keys_and_values_only(cache):  # an index of keys, or states, would have to be turned too
        raise LongRopeError(
            f"cannot turn the cached keys of {type(model).__name__}: its cache holds more than keys and values",
            code="cannot-rerotate",
            hint="use `switch='recompute'`",
        )
    with torch.no_grad(), scaled.using(window):
        base = base_of(model)
        base(input_ids=ids, position_ids=positions, **with_cache(base, cache))
    return [layer.keys for layer in cache.layers]


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding: three hundredths of the largest number in bfloat16, 1e-3 of it in float32."""
    tolerance = max(1e-3, 4 * torch.finfo(one.dtype).eps)
    return bool((one.double() - other.double()).abs().max() <= tolerance * one.double().abs().max())
