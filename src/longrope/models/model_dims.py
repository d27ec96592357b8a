"""The sizes of a model that decide its costs, from its config alone: it is built without weights on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry, text_config

_SLIDING = ("sliding_attention", "chunked_attention")
_FULL = "full_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that decide FLOPs and bytes; all counts are numbers, not bytes."""

    name: str
    parameters: int
    """All weights, tied ones once."""
    layer_parameters: int
    """The weights of the largest layer."""
    active_weights: int
    """Matrix weights below the head that a token is multiplied with; of a mixture of experts, the chosen ones."""
    head_weights: int
    """The weights of the head, V·H."""
    mlp_weights: int
    """The active weights of the largest MLP."""
    hidden: int
    layers: int
    """All layers, those without attention too."""
    heads: int
    """Query heads of a layer."""
    queries: int
    """Numbers in the queries of a token in one layer."""
    keys: int
    values: int
    rotary_dim: int
    vocabulary: int
    experts: bool
    """True for a mixture of experts."""
    reaches: tuple[int | None, ...]
    """Tokens that each attention layer looks back; None for the whole text."""

    @property
    def mlp_width(self) -> int:
        """Numbers a token takes inside an MLP before its last matrix: 3·I where the MLP is gated, 2·I where not."""
        return self.mlp_weights // self.hidden

    @property
    def heads_output(self) -> int:
        """Numbers that attention gives for a token in one layer, before the output projection."""
        return self.values * self.heads // self.key_value_heads

    @property
    def key_value_heads(self) -> int:
        return max(1, self.keys * self.heads // self.queries)

    def attended_pairs(self, length: int) -> float:
        """Pairs of a query and a key in all layers of a text of `length` tokens: T²/2, W·T − W²/2 where W slides."""
        windows = (length if reach is None else min(reach, length) for reach in self.reaches)
        return sum(window * length - window**2 / 2 for window in windows)


def shape_of(name: str, model: PreTrainedModel) -> ModelShape:
    """The shape of a model, weightless or not. Raises LongRopeError where it has no head, or no list of layers."""
    head: Any = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise LongRopeError(
            f"expected a causal language model with a head, found {type(model).__name__} without one", code="no-head"
        )
    text = text_config(model.config)
    heads, queries, keys, values = _attention_sizes(text)
    decoder: Any = model.get_decoder()  # of a multimodal model the part that reads text
    layers, active = _layers(decoder), _active(decoder, text)
    return ModelShape(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_parameters=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        active_weights=sum(active.values()),
        head_weights=head.weight.numel(),
        mlp_weights=max(
            sum(count for path, count in _active(layer, text).items() if not _in_attention(path)) for layer in layers
        ),
        hidden=text.hidden_size,
        layers=len(layers),
        heads=heads,
        queries=queries,
        keys=keys,
        values=values,
        rotary_dim=RopeGeometry.from_config(model.config).rotary_dim,
        vocabulary=text.vocab_size,
        experts=any("experts" in path.split(".") for path in active),
        reaches=_reaches(text, len(layers)),
    )


def _layers(base: nn.Module) -> list[nn.Module]:
    """The members of the longest module list that is not inside another one."""
    lists: list[nn.ModuleList] = []

    def collect(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                lists.append(child)
            else:
                collect(child)

    collect(base)
    if not lists:
        raise LongRopeError(
            f"{type(base).__name__} has no list of layers: its costs cannot be planned", code="unknown-layers"
        )
    longest = max(lists, key=len)
    return list(longest)


def _active(module: nn.Module, text: Any) -> dict[str, int]:
    """The matrix weights of `module` that one token is multiplied with, by parameter path."""
    embeddings = {path for path, part in module.named_modules() if isinstance(part, nn.Embedding)}
    chosen = _mean(_first(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"))
    all_of_them = _first(text, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    active = {}
    for path, parameter in module.named_parameters():
        owner, _, kind = path.rpartition(".")
        if parameter.dim() < 2 or owner in embeddings or kind.endswith("bias"):
            continue
        parts = path.split(".")
        active[path] = parameter.numel()
        if "experts" in parts and chosen is not None and all_of_them is not None:
            active[path] = parameter.numel() * chosen // all_of_them
    return active


def _mean(count: int | list[int] | None) -> int | None:
    """A number of experts; of a list with one for each layer (hunyuan_v1_moe), the mean, rounded."""
    if isinstance(count, list | tuple):
        return round(sum(count) / len(count)) if count else None
    return count


def _in_attention(path: str) -> bool:
    return any("attn" in part or "attention" in part for part in path.split("."))


def _attention_sizes(text: Any) -> tuple[int, int, int, int]:
    """Heads, and the numbers of queries, keys and values of a token in one layer."""
    heads = text.num_attention_heads
    key_value_heads = _first(text, "num_key_value_heads", "multi_query_group_num") or heads
    per_head = _first(text, "head_dim") or text.hidden_size // heads
    latent = _first(text, "qk_rope_head_dim")
    if latent:  # multi-head latent attention, whose keys and values are made whole before they are attended to
        query = latent + text.qk_nope_head_dim
        return heads, heads * query, heads * query, heads * text.v_head_dim
    return heads, heads * per_head, key_value_heads * per_head, key_value_heads * per_head


def _reaches(text: Any, layers: int) -> tuple[int | None, ...]:
    window = (
        _first(text, "sliding_window", "attention_chunk_size") if getattr(text, "use_sliding_window", True) else None
    )
    types = getattr(text, "layer_types", None)
    if not types:
        return (window,) * layers
    return tuple(window if kind in _SLIDING else None for kind in types if kind in (*_SLIDING, _FULL))


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
