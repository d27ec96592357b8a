"""The sizes of a LongRoPEModel, and the cost of a forward before it is run. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, fields

from longrope.checks import count_in, whole_number
from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry
from longrope.units import LONGEST, format_length

VOCABULARY = 256
"""Token ids are bytes."""
_MLP_MULTIPLE = 64
_LARGEST_WIDTH, _MOST_LAYERS = 2**20, 10_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that a model is made from; every other size follows. Raises LongRopeError, naming the field at fault.

    A head takes d_model / n_heads dimensions, all of them rotary, so that quotient must be whole and even.
    """

    d_model: int
    n_heads: int
    num_layers: int
    base_length: int
    """L: tokens of the context window before any extension."""
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for field, largest in zip(fields(self), (_LARGEST_WIDTH, _LARGEST_WIDTH, _MOST_LAYERS, LONGEST), strict=False):
            object.__setattr__(self, field.name, count_in(field.name, getattr(self, field.name), 1, largest))
        if self.d_model % self.n_heads:
            raise LongRopeError(
                f"d_model must be a multiple of n_heads; found {self.d_model} and {self.n_heads}",
                code="invalid-setting",
            )
        if self.head_dim % 2:
            raise LongRopeError(
                f"d_model / n_heads must be even, a rotary pair is two dimensions; found {self.d_model} / "
                f"{self.n_heads} = {self.head_dim}",
                code="invalid-setting",
            )
        object.__setattr__(self, "rope_base", self.geometry.base)  # checked there, and a float

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def mlp_dim(self) -> int:
        """8/3 of d_model, which gives SwiGLU's three matrices the size of the usual two, rounded up to 64."""
        return -(-8 * self.d_model // (3 * _MLP_MULTIPLE)) * _MLP_MULTIPLE

    @property
    def geometry(self) -> RopeGeometry:
        return RopeGeometry(self.head_dim, self.rope_base, self.base_length)

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer: four of attention, three of the MLP."""
        return self.d_model * (4 * self.d_model + 3 * self.mlp_dim)

    @property
    def weights(self) -> int:
        """Numbers in the whole model: layers, norms, byte embeddings and head."""
        norms = (2 * self.num_layers + 1) * self.d_model
        return self.num_layers * self.layer_weights + norms + 2 * VOCABULARY * self.d_model


@dataclass(frozen=True, slots=True)
class ForwardCost:
    """The cost of one inference forward of `batch` rows of `length` tokens, embeddings in, hidden states out.

    A multiplication and an addition are two FLOPs; norms, rotations and the softmax are left out, attention counts the
    causal half. `str` is a table of all of it, in float32 and in bfloat16.
    """

    sizes: Sizes
    length: int
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("length", "batch"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))

    @property
    def matrix_flops(self) -> int:
        """FLOPs of the projections and MLPs: 2 for each weight and token."""
        return 2 * self.batch * self.length * self.sizes.num_layers * self.sizes.layer_weights

    @property
    def attention_flops(self) -> int:
        """FLOPs of q·kᵀ and its product with v: 2·d_model for each of the T²/2 pairs of positions, twice."""
        return 2 * self.batch * self.length**2 * self.sizes.d_model * self.sizes.num_layers

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.attention_flops

    @property
    def embedding_numbers(self) -> int:
        """Numbers in (batch, T, d_model): the input, the output, or the keys of one layer."""
        return self.batch * self.length * self.sizes.d_model

    def peak_bytes(self, itemsize: int) -> int:
        """Bytes of weights, angles, and inside a layer: input, residual, queries, keys, values and attention's output.

        The pieces that projections and MLPs work on come on top; they do not grow with T.
        """
        angles = 2 * self.length * self.sizes.head_dim // 2 * 4  # cosines and sines, float32
        return itemsize * (self.sizes.weights + 6 * self.embedding_numbers) + angles

    def __str__(self) -> str:
        numbers = {
            "weights": self.sizes.weights,
            "embeddings in": self.embedding_numbers,
            "hidden states out": self.embedding_numbers,
            "queries, keys and values of a layer": 3 * self.embedding_numbers,
            "keys and values of all layers (a cache)": 2 * self.sizes.num_layers * self.embedding_numbers,
        }
        rows = [(name, 4 * count, 2 * count) for name, count in numbers.items()]
        rows.append(("peak of a forward", self.peak_bytes(4), self.peak_bytes(2)))
        scores = self.batch * self.sizes.n_heads * self.length**2
        lines = [
            f"forward of {self.batch} × {self.length:,} tokens ({format_length(self.length)}), {self.sizes.weights:,} "
            "weights",
            f"{'FLOPs':40}{self.flops:>14.3g}   matrices {self.matrix_flops:.3g}, attention {self.attention_flops:.3g}",
            f"{'GB':40}{'float32':>14}{'bfloat16':>14}",
            *(f"{name:40}{four / 1e9:>14,.3f}{two / 1e9:>14,.3f}" for name, four, two in rows),
            f"{'(never made: attention scores of a layer)':40}{4 * scores / 1e9:>13,.0f}{2 * scores / 1e9:>14,.0f}",
        ]
        return "\n".join(lines)
