"""The standalone model: a small decoder-only transformer whose rotary embedding is a `RopeScaling`.

Pre-norm RMSNorm, rotary causal attention, SwiGLU, no biases: Llama's arithmetic and its names of weights, so that
`llama.py` gives the same logits in transformers. The model takes embeddings or bytes. Memory is O(T): attention runs in
a fused kernel, everything else in pieces of the sequence, and outside training nothing is kept for a backward pass.
Training and the search are in `api.py`, whose subclass is `longrope.LongRoPEModel`.

Shapes: B batch, T tokens, E d_model, H heads, C dimensions of a head, D = C/2 rotary pairs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from longrope.checks import LARGEST_SEED, count_in
from longrope.errors import LongRopeError
from longrope.models.chunked import MLP_CHUNK, in_pieces
from longrope.rope.angles import cos_sin
from longrope.rope.scaling import RopeScaling
from longrope.standalone.checkpoint import read_standalone, write_standalone
from longrope.standalone.sizes import VOCABULARY, ForwardCost, Sizes

EPSILON = 1e-6  # of the RMS norms
_INIT_STD = 0.02
# The kernels that never hold a T×T tensor: PyTorch would otherwise fall back in silence on one that does.
_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


class StandaloneModel(nn.Module):
    """A causal transformer over (B, T, d_model) embeddings, or over bytes, with a scaled rotary embedding.

    Weights are drawn from `seed` alone. `scaling` starts as the original RoPE: one window of `base_length` tokens. A
    forward takes the smallest window that holds its T. A new model is in eval mode.

    Raises LongRopeError for sizes that make no model.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        num_layers: int,
        base_length: int,
        *,
        rope_base: float = 10_000.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sizes = Sizes(d_model, n_heads, num_layers, base_length, rope_base)
        self.scaling = RopeScaling.original(self.sizes.geometry)
        self.piece = MLP_CHUNK  # positions that projections and MLPs work on at once
        self.embed_tokens = nn.Embedding(VOCABULARY, d_model)
        self.layers = nn.ModuleList(_Layer(self.sizes) for _ in range(num_layers))
        self.norm = nn.RMSNorm(d_model, eps=EPSILON)
        self.lm_head = nn.Linear(d_model, VOCABULARY, bias=False)
        self._draw_weights(seed)
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """Embeddings (B, T, d_model) -> hidden states (B, T, d_model); token ids (B, T) -> logits (B, T, 256).

        Raises LongRopeError for another shape or dtype, for ids that are not bytes, and for a T beyond the scaling.
        """
        is_ids = self._check(inputs)
        length = inputs.shape[1]
        window = self.scaling.window_for(length)
        hidden_BTE: Tensor = self.embed_tokens(inputs.long()) if is_ids else inputs
        cos_1TD, sin_1TD = cos_sin(
            self.scaling.geometry,
            window,
            torch.arange(length, device=hidden_BTE.device)[None],
            dtype=torch.float64 if hidden_BTE.dtype == torch.float64 else torch.float32,
        )
        for layer in self.layers:
            hidden_BTE = layer(hidden_BTE, cos_1TD, sin_1TD, self.piece)
        head = (lambda piece: self.lm_head(self.norm(piece))) if is_ids else self.norm
        return in_pieces(head, self.piece, hidden_BTE)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; weights take gradients in training mode only.

        A forward in eval mode so keeps no activations, even without `torch.no_grad`.
        """
        super().train(mode)
        return self.requires_grad_(mode)

    def with_scaling(self, scaling: RopeScaling) -> Self:
        """A copy of this model under `scaling`. Raises LongRopeError when that was made for another geometry."""
        scaling.check_fits(self.sizes.geometry)
        extended = copy.deepcopy(self)
        extended.scaling = scaling
        return extended

    def plan(self, length: int, batch: int = 1) -> ForwardCost:
        """FLOPs and bytes of a forward of `batch` rows of `length` tokens; printed, they are a table."""
        return ForwardCost(self.sizes, length, batch)

    def save(self, folder: Path | str) -> None:
        """Write the model to a new folder: `model.safetensors`, and sizes and scaling as `standalone.json`.

        Raises LongRopeError when the folder has anything in it or cannot be written.
        """
        write_standalone(Path(folder), self.sizes, self.scaling, self.state_dict())

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read what `save` wrote, bit for bit, on the CPU. Raises LongRopeError when that is not such a model."""
        sizes, scaling, tensors = read_standalone(Path(folder))
        expected = _shapes(sizes)  # before anything of these sizes is made
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            name = sorted(set(expected.items()) ^ set(found.items()))[0][0]
            raise LongRopeError(
                f"the weights in {folder} are not those of its sizes: {name} should have shape "
                f"{expected.get(name, 'none')}, found {found.get(name, 'none')}",
                code="damaged-file",
            )
        model = cls(sizes.d_model, sizes.n_heads, sizes.num_layers, sizes.base_length, rope_base=sizes.rope_base)
        model.load_state_dict(tensors, assign=True)
        model.scaling = scaling
        return model

    def _draw_weights(self, seed: int) -> None:
        """Normal weights of deviation 0.02; smaller where they write to the residual stream (GPT-2)."""
        # On the CPU: one seed gives one model, on any device.
        generator = torch.Generator("cpu").manual_seed(count_in("seed", seed, 0, LARGEST_SEED))
        writers = ("o_proj.weight", "down_proj.weight")
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() == 2:
                    std = _INIT_STD / (2 * self.sizes.num_layers) ** 0.5 if name.endswith(writers) else _INIT_STD
                    drawn = torch.randn(weight.shape, generator=generator, device="cpu", dtype=torch.float32)
                    weight.copy_(std * drawn)

    def _check(self, inputs: Tensor) -> bool:
        """True if `inputs` are token ids. Raises LongRopeError when they are neither ids nor fitting embeddings."""
        weight = self.embed_tokens.weight
        is_ids = not inputs.is_floating_point() and not inputs.is_complex() and inputs.dtype != torch.bool
        shaped = inputs.dim() == 2 if is_ids else inputs.dim() == 3 and inputs.shape[2] == self.sizes.d_model
        if not shaped or inputs.numel() == 0:
            raise LongRopeError(
                f"expected embeddings (batch, T, {self.sizes.d_model}) or token ids (batch, T); found {inputs.dtype} "
                f"{tuple(inputs.shape)}",
                code="wrong-inputs",
            )
        if inputs.device != weight.device or not (is_ids or inputs.dtype == weight.dtype):
            raise LongRopeError(
                f"expected inputs like the model, {weight.dtype} on {weight.device}; found {inputs.dtype} on "
                f"{inputs.device}",
                code="wrong-inputs",
            )
        if is_ids and not 0 <= int(inputs.min()) <= int(inputs.max()) < VOCABULARY:
            raise LongRopeError(
                f"token ids are bytes, 0 to {VOCABULARY - 1}; found {int(inputs.min())} to {int(inputs.max())}",
                code="wrong-inputs",
            )
        return is_ids


class _Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(sizes.d_model, eps=EPSILON)
        self.self_attn = _Attention(sizes)
        self.post_attention_layernorm = nn.RMSNorm(sizes.d_model, eps=EPSILON)
        self.mlp = _SwiGLU(sizes)

    def forward(self, hidden_BTE: Tensor, cos_1TD: Tensor, sin_1TD: Tensor, piece: int) -> Tensor:
        def before(hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return self.self_attn.project(self.input_layernorm(hidden), cos, sin)

        def after(hidden: Tensor, attended: Tensor) -> Tensor:
            hidden = hidden + self.self_attn.o_proj(attended)
            added: Tensor = self.mlp(self.post_attention_layernorm(hidden))
            return hidden + added

        attended_BTE = attend(in_pieces(before, piece, hidden_BTE, cos_1TD, sin_1TD))
        return in_pieces(after, piece, hidden_BTE, attended_BTE)


class _Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(sizes.d_model, sizes.d_model, bias=False) for _ in range(4)
        )

    def project(self, normed_BTE: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
        """Rotated queries, rotated keys, and values: (B, T, 3, H, C)."""
        cos, sin = cos_1TD[:, :, None], sin_1TD[:, :, None]  # (1, T, 1, D)
        q, k, v = (
            projection(normed_BTE).unflatten(-1, (self.heads, -1))  # (B, T, H, C)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return torch.stack((rotate(q, cos, sin), rotate(k, cos, sin), v), dim=2)


class _SwiGLU(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.d_model, sizes.mlp_dim, bias=False)
        self.up_proj = nn.Linear(sizes.d_model, sizes.mlp_dim, bias=False)
        self.down_proj = nn.Linear(sizes.mlp_dim, sizes.d_model, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


def _shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's weights by name, without the weights."""
    with torch.device("meta"):
        layer = _Layer(sizes).state_dict()
    embedding, width = (VOCABULARY, sizes.d_model), (sizes.d_model,)
    shapes = {"embed_tokens.weight": embedding, "norm.weight": width, "lm_head.weight": embedding}
    for index in range(sizes.num_layers):
        shapes |= {f"layers.{index}.{name}": tuple(weight.shape) for name, weight in layer.items()}
    return shapes


def rotate(heads_BTHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pair i, dimensions i and i + D of every head, by its angle (Llama's layout); cos and sin (1, T, 1, D).

    The products are taken in the cosines' precision, which is float32 for a bfloat16 model.
    """
    first, second = heads_BTHC.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(heads_BTHC.dtype)


def attend(qkv_BT3HC: Tensor) -> Tensor:
    """Causal attention in a fused kernel, O(T) memory: (B, T, 3, H, C) -> (B, T, E)."""
    q, k, v = qkv_BT3HC.permute(2, 0, 3, 1, 4)  # each (B, H, T, C)
    with sdpa_kernel(_FUSED):
        out_BHTC = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out_BHTC.transpose(1, 2).flatten(2)
