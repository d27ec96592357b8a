"""The rotary module that takes the place of a model's own: same inputs, same output layout, our frequencies.

The angles come from `rope.angles.cos_sin`; the family's attention rotates with the cosines and sines as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Output:
    """The form of the output of a family's rotary module."""

    layout: Layout
    casts: bool
    """True if cosines and sines have the dtype of the hidden states, False if they stay float32."""
    complex: bool = False
    """True if it returns one complex tensor cos + i·sin (B, T, D) (Llama 4, DeepSeek V2)."""
    rows: int = 0
    """Rows of positions in front of the batch: 3 where time, height and width have a row each (Qwen2-VL); 0 for none.
    Those of a text are equal, and so are their cosines."""

    def of(self, cos_BTD: Tensor, sin_BTD: Tensor, dtype: torch.dtype) -> Tensor | tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, D) as the family's module returns them for hidden states of `dtype`."""
        if self.complex:
            return torch.complex(cos_BTD, sin_BTD)
        kept = dtype if self.casts or dtype == torch.float64 else torch.float32
        cos, sin = (self.layout.spread(values).to(kept) for values in (cos_BTD, sin_BTD))
        if self.rows:
            cos, sin = (values.expand(self.rows, *values.shape) for values in (cos, sin))
        return cos, sin

    def split(self, returned: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, D or 2D) in the output of the family's module."""
        cos, sin = (returned.real, returned.imag) if self.complex else returned
        return (cos[0], sin[0]) if self.rows else (cos, sin)


class LongRopeRotary(nn.Module):
    """Cosines and sines of a `RopeScaling` for one model; the module it replaces is kept as `original`.

    The window is the smallest that holds the longest position of the forward, unless `pinned` is one. `factors` (D,)
    and `attention_factor`, when set, replace the pinned window's numbers by tensors that gradients flow through;
    `positions` (B, N), when set, are rotated by in the place of 0 … N − 1, which the model makes its masks from.
    Models with one RoPE per layer type: only `layer_type` is scaled, the others go to `original`. Attributes that a
    model looks up on its rotary module are those of `original`.
    """

    def __init__(self, original: nn.Module, scaling: RopeScaling, layer_type: str | None) -> None:
        super().__init__()
        self.original = original
        self.scaling = scaling
        self.layer_type = layer_type
        self.output = probe_output(original, scaling.geometry, layer_type)
        self.pinned: Window | None = None
        self.factors: Tensor | None = None
        self.attention_factor: Tensor | None = None
        self.positions: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def window(self, position_ids: Tensor) -> Window:
        """The window of this forward: the pinned one, or the smallest that holds the longest position."""
        if self.pinned is not None:
            return self.pinned
        return self.scaling.window_for(int(position_ids.max()) + 1)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """x (any shape; only its device and dtype count), position_ids (B or 1, T) or (R, B or 1, T) -> cos, sin.

        These are (B or 1, T, 2D), or as the family has them (`Output`). Raises LongRopeError where the rows of
        positions differ, as those of images do.
        """
        if layer_type is not None and layer_type != self.layer_type:
            return self.original(x, position_ids, layer_type)
        if position_ids.dim() == 3:
            if not bool((position_ids == position_ids[:1]).all()):
                raise LongRopeError(
                    "expected the positions of a text, found rows of positions that differ, as those of images do",
                    code="text-only",
                )
            position_ids = position_ids[0]
        if self.positions is not None:
            positions = self.positions.to(position_ids.device)  # of a model over several devices, any of them
            position_ids = positions.gather(1, position_ids.expand(len(positions), -1))
        cos_BTD, sin_BTD = cos_sin(
            self.scaling.geometry,
            self.window(position_ids),
            position_ids.to(x.device),
            factors=self.factors,
            attention_factor=self.attention_factor,
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
        )
        return self.output.of(cos_BTD, sin_BTD, x.dtype)


_PROBED = 8  # positions at which a module is called


def probe_output(module: nn.Module, geometry: RopeGeometry, layer_type: str | None) -> Output:
    """The form of the output of a family's rotary module, found by calling it.

    Raises LongRopeError for a module whose output is neither a pair of cosines and sines of 2D or D columns nor their
    complex sum.
    """
    name, pairs = type(module).__name__, geometry.pairs
    low, exact = _called(module, torch.bfloat16, layer_type), _called(module, torch.float32, layer_type)
    if isinstance(exact, Tensor) and exact.is_complex() and exact.shape == (1, _PROBED, pairs):
        return Output(Layout.PAIRS, casts=False, complex=True)
    try:
        (cos, sin), (cos_exact, _) = low, exact
        rows = cos.shape[0] if cos.dim() == 4 else 0
        fits = not cos.is_complex() and cos.shape == sin.shape and cos.shape[:-1] == (*(rows,) * bool(rows), 1, _PROBED)
    except (TypeError, ValueError, AttributeError) as error:
        raise LongRopeError(
            f"cannot scale {name}: it does not map (x, position_ids) to (cos, sin): {one_line(error)}", code="not-rope"
        ) from error
    if not fits or (rows and not bool((cos_exact == cos_exact[:1]).all())):
        raise LongRopeError(
            f"cannot scale {name}: expected cos and sin of shape (1, {_PROBED}, {2 * pairs}), found {tuple(cos.shape)}",
            code="not-rope",
        )
    casts, width = cos.dtype == torch.bfloat16, cos_exact.shape[-1]
    if width == pairs:
        return Output(Layout.PAIRS, casts, rows=rows)
    if width != 2 * pairs:
        raise LongRopeError(
            f"cannot scale {name}: its config says {pairs} rotary pairs, but it gives {width} columns, not {2 * pairs}",
            code="not-rope",
        )
    if torch.equal(cos_exact[..., :pairs], cos_exact[..., pairs:]):
        return Output(Layout.HALVES, casts, rows=rows)
    if torch.equal(cos_exact[..., 0::2], cos_exact[..., 1::2]):
        return Output(Layout.INTERLEAVED, casts, rows=rows)
    raise LongRopeError(
        f"cannot scale {name}: its cosines are laid out neither in halves nor interleaved", code="not-rope"
    )


def _called(module: nn.Module, dtype: torch.dtype, layer_type: str | None) -> Any:
    """The output of `module` for hidden states of `dtype` at positions 1 … 8, in one row or, where it wants it, three.

    Raises LongRopeError where it takes neither.
    """
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    positions = torch.arange(1, _PROBED + 1, device=device)[None]
    arguments = (layer_type,) if layer_type is not None else ()
    reason: Exception | None = None
    for rows in (positions, positions.expand(3, 1, -1)):
        try:
            with torch.no_grad():
                return module(torch.zeros(1, _PROBED, 1, dtype=dtype, device=device), rows, *arguments)
        except Exception as error:  # a foreign module may raise anything
            reason = reason or error
    raise LongRopeError(
        f"cannot scale {type(module).__name__}: it does not map (x, position_ids) to (cos, sin): "
        f"{one_line(reason or RuntimeError())}",
        code="not-rope",
    ) from reason
