"""Peak bytes of scoring a text and of its gradient by the factors, from a model's shape. Pure arithmetic.

Bytes are the peak on one device of one text at a time with a flash or memory-efficient attention kernel, which makes no
T×T matrix. Notation: T tokens, a bytes a number, H hidden, q, k, v, o numbers of queries, keys, values and attention's
output of a token, M `mlp_width`, V vocabulary, N layers. The tests compare with the storages that live.
"""

from __future__ import annotations

import math
from functools import partial

from longrope.models import chunked
from longrope.models.config import LayerInputs
from longrope.models.layer_inputs import held_inputs
from longrope.models.model_dims import ModelShape

Bytes = dict[str, float]
"""Bytes by purpose; they add up to the peak."""
GATHERED = "gathered keys and values"


def scoring_bytes(shape: ModelShape, length: int, itemsize: int) -> Bytes:
    """The bytes of `token_nll`: every loss of one text, without gradients.

    The larger of a layer and of a piece of the head: the hidden states, and 8 bytes a number of a piece of logits.
    """
    head = length * shape.hidden * itemsize + 8 * logits_piece(shape, length)
    return {
        "weights": shape.parameters * itemsize,
        "activations": max(layer_bytes(shape, length, itemsize), head) + angle_bytes(shape, length, itemsize),
    }


def layer_bytes(shape: ModelShape, length: int, itemsize: int) -> int:
    """The bytes of a layer without gradients, its norms and its MLP in pieces.

    At its rotation it holds a·T·(3H + q + k + v) numbers (inputs of the model, of the layer, normed) and
    a·T·max(3q, q + 3k) of the rotation; at a norm in float32 a·T·3H and a piece of 8·8192·H, in its MLP a·T·4H and a
    piece of a·2048·M.
    """
    hidden, piece = length * shape.hidden * itemsize, min(length, chunked.MLP_CHUNK)
    attention = shape.queries + shape.keys + shape.values + max(3 * shape.queries, shape.queries + 3 * shape.keys)
    return max(
        3 * hidden + itemsize * length * attention,
        3 * hidden + 8 * min(length, chunked.NORM_CHUNKS * chunked.MLP_CHUNK) * shape.hidden,
        4 * hidden + itemsize * piece * (shape.mlp_width + shape.hidden),
    )


def gradient_bytes(shape: ModelShape, length: int, itemsize: int, layer_inputs: LayerInputs = "keep") -> Bytes:
    """The bytes of an objective's `loss_and_gradient`: weights get no gradient, layers are computed again.

    a·T·(n + 3)·H of layer inputs and gradients, where n inputs of N layers are held at once (`held_inputs`), and the
    larger of a layer and of the head. A layer computed again holds a·T·(3q + o + 3k + v), and a piece of its MLP with
    its gradients, 2·a·M a position, or of a norm in float32, 28·H (`backward_piece` has their positions); the head 12
    bytes for each number of a piece of logits.
    """
    per_token = 3 * (shape.queries + shape.keys) + shape.heads_output + shape.values
    mlp, norm = chunked.backward_piece(shape.mlp_width), chunked.backward_piece(chunked.NORM_NUMBERS * shape.hidden)
    piece = max(min(length, mlp) * 2 * itemsize * shape.mlp_width, min(length, norm) * 28 * shape.hidden)
    return {
        "weights": shape.parameters * itemsize,
        "inputs of the layers": (held_inputs(shape.layers, layer_inputs) + 3) * length * shape.hidden * itemsize,
        "activations": max(itemsize * length * per_token + piece, 12 * logits_piece(shape, length))
        + 2 * angle_bytes(shape, length, itemsize),
    }


def host_bytes(shape: ModelShape, length: int, itemsize: int) -> int:
    """The host memory of `offload`: all layer inputs, each in the next power of two that PyTorch's page-locked memory
    comes in."""
    return int(shape.layers * 2 ** math.ceil(math.log2(length * shape.hidden * itemsize)))


def logits_piece(shape: ModelShape, length: int) -> int:
    """Numbers in one piece of the logits of a text."""
    return min(length, chunked.logits_chunk(shape.vocabulary)) * shape.vocabulary


def angle_bytes(shape: ModelShape, length: int, itemsize: int) -> float:
    """The bytes of cosines and sines of every position, of token ids and positions."""
    return length * (2 * shape.rotary_dim * itemsize + 16)


def shared_bytes(
    shape: ModelShape,
    length: int,
    itemsize: int,
    *,
    gradient: bool,
    processes: int,
    layer_inputs: LayerInputs = "keep",
) -> Bytes:
    """The bytes on each of `processes` devices that share a text, in scoring it or in its gradient.

    Those of a text of T/P tokens, beside the keys and values of the whole text for one layer: S and half of it in the
    exchange; of a gradient S, its gradient and a copy of that in the exchange.
    """
    size = partial(gradient_bytes, layer_inputs=layer_inputs) if gradient else scoring_bytes
    if processes == 1:
        return size(shape, length, itemsize)
    gathered = (3.0 if gradient else 1.5) * row_bytes(shape, length, itemsize)
    return {**size(shape, math.ceil(length / processes), itemsize), GATHERED: gathered + 24 * length}


def row_bytes(shape: ModelShape, length: int, itemsize: int) -> float:
    """The bytes of the keys and values of a text in one layer."""
    return float(itemsize * length * (shape.keys + shape.values))
