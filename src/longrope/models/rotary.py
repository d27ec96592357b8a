"""The rotary module that takes the place of a model's own: same inputs, same output layout, our frequencies.

The angles come from `rope.angles.cos_sin`; the family's attention rotates with the cosines and sines as before.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from longrope.errors import LongRopeError, one_line
from longrope.rope.angles import cos_sin
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window


class Layout(Enum):
    """The order of the D pairs along the last axis of a family's cosines and sines."""

    HALVES = "halves"  # (c_0 … c_{D−1}, c_0 … c_{D−1}), Llama and most others
    INTERLEAVED = "interleaved"  # (c_0, c_0, c_1, c_1, …), Cohere
    PAIRS = "pairs"  # (c_0 … c_{D−1}), families that repeat later

    def spread(self, values: Tensor) -> Tensor:
        """(..., D) -> (..., 2D), or (..., D) for PAIRS."""
        if self is Layout.HALVES:
            return torch.cat((values, values), dim=-1)
        if self is Layout.INTERLEAVED:
            return values.repeat_interleave(2, dim=-1)
        return values


class LongRopeRotary(nn.Module):
    """Cosines and sines of a `RopeScaling` for one model; the module it replaces is kept as `original`.

    The window is the smallest that holds the longest position of the forward, unless `pinned` is one. `factors` (D,)
    and `attention_factor`, when set, replace the pinned window's numbers by tensors that gradients flow through.
    Models with one RoPE per layer type: only `layer_type` is scaled, the others go to `original`.
    """

    def __init__(self, original: nn.Module, scaling: RopeScaling, layer_type: str | None) -> None:
        super().__init__()
        self.original = original
        self.scaling = scaling
        self.layer_type = layer_type
        self.layout, self.casts = probe_layout(original, scaling.geometry, layer_type)
        self.pinned: Window | None = None
        self.factors: Tensor | None = None
        self.attention_factor: Tensor | None = None

    def window(self, position_ids: Tensor) -> Window:
        """The window of this forward: the pinned one, or the smallest that holds the longest position."""
        if self.pinned is not None:
            return self.pinned
        return self.scaling.window_for(int(position_ids.max()) + 1)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """x (any shape; only its device and dtype count), position_ids (B or 1, T) -> cos, sin (B or 1, T, 2D)."""
        if layer_type is not None and layer_type != self.layer_type:
            other: tuple[Tensor, Tensor] = self.original(x, position_ids, layer_type)
            return other
        cos_BTD, sin_BTD = cos_sin(
            self.scaling.geometry,
            self.window(position_ids),
            position_ids.to(x.device),
            factors=self.factors,
            attention_factor=self.attention_factor,
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
        )
        dtype = x.dtype if self.casts or x.dtype == torch.float64 else torch.float32
        return self.layout.spread(cos_BTD).to(dtype), self.layout.spread(sin_BTD).to(dtype)


def probe_layout(module: nn.Module, geometry: RopeGeometry, layer_type: str | None) -> tuple[Layout, bool]:
    """The layout of a family's cosines, and whether it casts them to the hidden states' dtype, found by calling it.

    Raises LongRopeError for a module whose output is not a pair of real cosines and sines of 2D or D columns.
    """
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    positions = torch.arange(1, 9, device=device)[None]
    arguments = (layer_type,) if layer_type is not None else ()
    name, pairs = type(module).__name__, geometry.pairs
    try:
        with torch.no_grad():
            cos, sin = module(torch.zeros(1, 8, 1, dtype=torch.bfloat16, device=device), positions, *arguments)
            exact, _ = module(torch.zeros(1, 8, 1, dtype=torch.float32, device=device), positions, *arguments)
    except Exception as error:  # a foreign module may raise anything
        raise LongRopeError(
            f"cannot scale {name}: it does not map (x, position_ids) to (cos, sin): {one_line(error)}", code="not-rope"
        ) from error
    if cos.is_complex() or cos.shape != sin.shape or cos.shape[:-1] != positions.shape:
        raise LongRopeError(
            f"cannot scale {name}: expected cos and sin of shape (1, 8, {2 * pairs}), found {tuple(cos.shape)}",
            code="not-rope",
        )
    casts = cos.dtype == torch.bfloat16
    width = exact.shape[-1]
    if width == pairs:
        return Layout.PAIRS, casts
    if width != 2 * pairs:
        raise LongRopeError(
            f"cannot scale {name}: its config says {pairs} rotary pairs, but it gives {width} columns, not {2 * pairs}",
            code="not-rope",
        )
    if torch.equal(exact[..., :pairs], exact[..., pairs:]):
        return Layout.HALVES, casts
    if torch.equal(exact[..., 0::2], exact[..., 1::2]):
        return Layout.INTERLEAVED, casts
    raise LongRopeError(
        f"cannot scale {name}: its cosines are laid out neither in halves nor interleaved", code="not-rope"
    )
