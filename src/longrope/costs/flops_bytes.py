"""FLOPs of scoring, gradients, training and reading, and peak bytes of the last two, from a model's shape.

Pure arithmetic; the peak bytes of scoring and of gradients are in `models/peak_bytes.py`.

A multiplication and an addition are two FLOPs. Matrices are counted apart from attention, whose rate differs. Norms,
rotations and the softmax are left out. Attention counts the pairs that are attended to: the causal half, inside the
window where it slides. torch's `FlopCounterMode` counts the whole square of a flash kernel, twice as much.

Notation as there. The tests compare FLOPs and bytes with torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from longrope.data.mix import ORIGINAL_WINDOW
from longrope.models import chunked
from longrope.models.config import LayerInputs
from longrope.models.generation.cache import PREFILL_CHUNK
from longrope.models.layer_inputs import layers_run_again
from longrope.models.model_dims import ModelShape
from longrope.models.peak_bytes import Bytes, angle_bytes, layer_bytes, logits_piece
from longrope.train.config import FinetuneConfig

STATE_BYTES = 16
"""Bytes of a trained weight: itself 4, its gradient 4, AdamW's two moments 8 (float32)."""
_FLASH_BACKWARD = 2.5
"""FLOPs of a flash attention's backward over those of its forward: 5 products (scores again, dV, dP, dQ, dK) for 2."""


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of matrices (projections, MLPs, head) and of attention (q·kᵀ and its product with v)."""

    matrices: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.matrices + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matrices + other.matrices, self.attention + other.attention)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.matrices * times, self.attention * times)


def forward_flops(shape: ModelShape, length: int, scored: int | None = None) -> Flops:
    """A forward of one text of `length` tokens; the head runs for `scored` positions (default: all)."""
    head = shape.head_weights * (length if scored is None else scored)
    matrices = 2 * (shape.active_weights * length + head)
    per_pair = 2 * (shape.queries + shape.heads_output)
    return Flops(matrices, per_pair * shape.attended_pairs(length))


def gradient_flops(
    shape: ModelShape, length: int, scored: int | None = None, layer_inputs: LayerInputs = "keep"
) -> Flops:
    """Loss and gradient by the factors: forward, forward again (checkpoints), and gradients of inputs, not of weights.

    3 forwards of matrices, 2 of the head; of attention 2 and a backward, 4.5. In a text of several `backward_piece`s,
    an MLP is computed once more for its backward pass, without its last matrix: 2/3 of it where it is gated, else
    less. With `layer_inputs` recompute all layers but the last of each block run forward once more.
    """
    once, below = forward_flops(shape, length, scored), forward_flops(shape, length, 0)
    pieces = length > chunked.backward_piece(shape.mlp_width)
    again = 2 / 3 * 2 * length * shape.layers * shape.mlp_weights if pieces else 0.0
    blocks = below * (layers_run_again(shape.layers, layer_inputs) / shape.layers)
    return Flops(2 * once.matrices + below.matrices + again, (2 + _FLASH_BACKWARD) * once.attention) + blocks


def training_flops(shape: ModelShape, length: int, document: int | None = None) -> Flops:
    """A row of training: forward, forward again, and gradients of inputs and weights.

    4 forwards of matrices; of attention as in `gradient_flops`. Attention stays inside documents of
    `document` tokens (default: the row is one).
    """
    size = min(document or length, length)
    once = forward_flops(shape, size) * (length / size)
    return Flops(4 * once.matrices, (2 + _FLASH_BACKWARD) * once.attention)


def run_flops(shape: ModelShape, config: FinetuneConfig, original_length: int) -> Flops:
    """All rows of a fine-tuning; those of the original window hold documents of `original_length` tokens."""
    rows, flops = config.steps * config.rows_per_step, Flops()
    for part, share in config.shares.items():
        document = original_length if part in ORIGINAL_WINDOW else config.length
        flops += training_flops(shape, config.length, document) * (rows * share)
    return flops


def reading_bytes(shape: ModelShape, length: int, itemsize: int) -> Bytes:
    """The bytes of `prefill`: keys and values of all layers, and a layer at work on the whole text.

    Where layers attend to a sliding window, a chunk of 2,048 tokens is at work: it holds its layer's keys and values
    once more (they are extended by copying), repeated for every head where heads share them, and its mask against all
    tokens in bytes and as numbers.
    """
    per_token = itemsize * (shape.keys + shape.values)
    kept = per_token * sum(length if reach is None else min(length, reach) for reach in shape.reaches)
    if all(reach is None for reach in shape.reaches):
        activations = layer_bytes(shape, length, itemsize) + angle_bytes(shape, length, itemsize)
    else:
        repeated = shape.heads // shape.key_value_heads if shape.heads != shape.key_value_heads else 0
        chunk = min(length, PREFILL_CHUNK)
        activations = (1 + repeated) * per_token * length + (1 + itemsize) * chunk * length
        activations += 3 * itemsize * chunk * (shape.hidden + shape.queries)
        activations = max(activations, itemsize * chunk * (4 * shape.hidden + shape.mlp_width))
    return {"weights": shape.parameters * itemsize, "keys and values": kept, "activations": activations}


def training_bytes(
    shape: ModelShape, length: int, *, gpus: int, context_parallel: int = 1, offload: bool = False, itemsize: int = 2
) -> Bytes:
    """The bytes of a training step: AdamW with float32 states sharded over `gpus` (FSDP2), computed in bfloat16.

    16 bytes for each weight over the GPUs; gathered for computing: two layers (one at work, one on its way), their
    gradients, and the weights outside the layers. Every layer keeps its input (two with `offload`); the layer
    computed again holds a·T·(5H + q + k + v + o + 2M), gradients included, and 8·T·H where norms are taken in float32;
    logits come in pieces, 12 bytes for each number. `context_parallel` devices share the T tokens of a row.
    """
    tokens = length / context_parallel
    hidden = tokens * shape.hidden * itemsize
    attention = shape.queries + shape.keys + shape.values + shape.heads_output
    per_token = 5 * shape.hidden + attention + 2 * shape.mlp_width
    outside = shape.parameters - shape.layers * shape.layer_parameters
    gathered = itemsize * (4 * shape.layer_parameters + max(outside, 0))
    upcast = 8 * tokens * shape.hidden if itemsize < 4 else 0
    return {
        "states": STATE_BYTES * shape.parameters / gpus,
        "gathered weights": gathered,
        "inputs of the layers": (2 if offload else shape.layers) * hidden,
        "activations": max(itemsize * tokens * per_token + upcast, 2 * hidden + 12 * logits_piece(shape, int(tokens))),
    }
