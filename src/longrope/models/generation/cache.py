"""Keys and values of a text under one window: filled in chunks, shared by many continuations.

Not generation across windows: that is `hooks.py`. Here the caller chooses the window. Evaluation reads a long text once
and asks many questions about it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from longrope.errors import LongRopeError, one_line
from longrope.models.cache_argument import cache_fault, with_cache
from longrope.models.chunked import base_of, logits_chunk
from longrope.models.devices import device_of
from longrope.models.finite import require_finite_logits
from longrope.models.scaled import ScaledModel, handle_of
from longrope.models.scoring import run_base
from longrope.rope.scaling import Window

PREFILL_CHUNK = 2048


def prefill(
    model: PreTrainedModel | ScaledModel, ids: Tensor, window: Window | None = None, *, chunk_size: int | None = None
) -> Prefilled:
    """Read `ids` (1, T) under `window` for continuations that share them; no logits are made.

    `model` has a scaling applied; `window` is its window for T tokens, when not given. By default the text is read in
    one pass, in which attention needs no mask, with the activations that scoring has (`scoring.token_nll`). With a
    `chunk_size`, and where layers attend to a sliding window, so many tokens at a time: memory is then the cache, and
    the activations and mask of one chunk. The model should be in eval mode.

    Raises LongRopeError when `ids` is not one text of at least one token, no scaling is applied, or another one by now,
    or the model's cache is not made of keys and values.
    """
    scaled = handle_of(model)
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise LongRopeError(
            f"expected token ids of one text, shape (1, T), found {tuple(ids.shape)}", code="invalid-setting"
        )
    window = window or scaled.pinned or scaled.scaling.window_for(ids.shape[1])
    cache = new_cache(scaled.model)
    _require_continued(scaled, cache)
    text, chunk = ids[:, :-1], PREFILL_CHUNK if chunk_size is None else chunk_size
    if chunk_size is None and text.shape[1] and not any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        with torch.no_grad(), scaled.using(window):
            run_base(scaled.model, text, cache=cache)
        _check_filled(cache, text.shape[1], scaled.model)
    else:
        fill(scaled, cache, text, window, chunk)
    return Prefilled(scaled, window, cache, ids[:, -1:], chunk)


@dataclass(frozen=True)
class Prefilled:
    """A text that was read: continuations are scored or generated after it and leave it as it was.

    They raise LongRopeError where the scaling that it was read under was removed from the model since, or replaced.

    The last token is not in the cache: it is fed again with every continuation, whose first logits it gives.
    """

    scaled: ScaledModel
    window: Window
    cache: DynamicCache
    last: Tensor  # (1, 1)
    chunk_size: int

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return int(self.cache.get_seq_length()) + 1

    def score(self, tokens: Tensor) -> Tensor:
        """NLL in nats of `tokens` (1, n) after the text: (n,), float32, or float64 for a float64 model.

        Entry j is −log p(tokens j | the text, tokens 0 … j−1). Raises LongRopeError when `tokens` is not (1, n), n ≥ 1.
        """
        self._check(tokens, at_least=1)
        fed = torch.cat([self.last, tokens[:, :-1].to(self.last)], dim=1)
        vocabulary = self.scaled.model.config.get_text_config().vocab_size
        size = min(self.chunk_size, logits_chunk(vocabulary))
        pieces = []
        with self._continued():
            for at in range(0, fed.shape[1], size):
                logits = self._logits(fed[:, at : at + size])
                target = tokens[0, at : at + size].to(logits.device)
                pieces.append(F.cross_entropy(logits[0], target, reduction="none"))
        return torch.cat(pieces)

    def greedy(self, tokens: Tensor, max_new_tokens: int, stop: Collection[int] = ()) -> list[int]:
        """The most likely tokens after the text and `tokens` (1, k), k ≥ 0: at most `max_new_tokens` of them.

        Ends with the first token of `stop` that appears. Raises LongRopeError when `tokens` is not (1, k),
        and when a most likely token is none because logits are NaN.
        """
        self._check(tokens, at_least=0)
        fed = torch.cat([self.last, tokens.to(self.last)], dim=1)
        found: list[int] = []
        with self._continued():
            fill(self.scaled, self.cache, fed[:, :-1], self.window, self.chunk_size)
            token = fed[:, -1:]
            while len(found) < max_new_tokens and (not found or found[-1] not in stop):
                logits = self._logits(token)[:, -1:]
                require_finite_logits(self.scaled.model, logits, int(self.cache.get_seq_length()))
                token = logits.argmax(-1)
                found.append(int(token))
        return found

    def _logits(self, ids: Tensor) -> Tensor:
        """Logits (1, n, V) of `ids` (1, n), which join the cache."""
        if ids.shape[1] > 1:
            _require_continued(self.scaled, self.cache)
        past = int(self.cache.get_seq_length())
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        with self.scaled.using(self.window) as model:
            logits: Tensor = model(input_ids=ids, position_ids=positions, **with_cache(model, self.cache)).logits
        _check_filled(self.cache, past + ids.shape[1], model)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _check(self, tokens: Tensor, at_least: int) -> None:
        if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] < at_least:
            raise LongRopeError(
                f"expected the tokens of one continuation, shape (1, n) with n of at least {at_least}, "
                f"found {tuple(tokens.shape)}",
                code="invalid-setting",
            )

    @contextmanager
    def _continued(self) -> Iterator[None]:
        """Removes from the cache, at the end of the block, the tokens that the block added.

        A full layer is cut, so that the text's keys never exist twice; any other has dropped tokens of the text by
        then, or changed its states in place, and gets its few tensors back.
        """
        layers: list[Any] = list(self.cache.layers)
        before = [{} if type(layer) is DynamicLayer and layer.is_initialized else _copied(layer) for layer in layers]
        length = self.length - 1
        try:
            with torch.no_grad():
                yield
        finally:
            for layer, kept in zip(layers, before, strict=True):
                if kept:
                    vars(layer).update(kept)
                else:
                    layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for `model`. Raises LongRopeError when it needs one that cannot be filled again from tokens."""
    cache = DynamicCache(config=model.config)
    check_cache(cache, type(model).__name__)
    return cache


def _copied(layer: Any) -> dict[str, Any]:
    """The attributes of a cache layer. States of linear attention are copied, because an update writes into them; an
    update of keys makes new tensors and leaves these alone."""
    return {
        name: {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}
        if isinstance(found, dict)
        else found
        for name, found in vars(layer).items()
    }


_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)
# Layers that also hold states of linear attention, keys of an index, or nothing: by name, because older versions of
# transformers have not all of them.
_REFILLED = (
    *_KEYS_AND_VALUES,
    *(
        getattr(cache_utils, name)
        for name in (
            "DynamicIndexedLayer",
            "LinearAttentionLayer",
            "LinearAttentionAndFullAttentionLayer",
            "LinearAttentionAndSlidingWindowAttentionLayer",
            "DummyLayer",
        )
        if hasattr(cache_utils, name)
    ),
)


def is_refillable(cache: Any) -> bool:
    """True if `cache` is a dynamic cache whose layers can all be emptied and filled again from tokens."""
    layers = getattr(cache, "layers", None)
    return layers is not None and not cache.offloading and all(type(layer) in _REFILLED for layer in layers)


def holds_keys_and_values_only(cache: DynamicCache) -> bool:
    """True if `cache` holds keys and values, of full or sliding layers, and no states or index."""
    return all(type(layer) in _KEYS_AND_VALUES for layer in cache.layers)


def check_cache(cache: Any, purpose: str) -> None:
    """Raise LongRopeError unless `cache` is a dynamic cache that can be filled again from tokens."""
    if not is_refillable(cache):
        kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
        offloaded = ", offloaded" if getattr(cache, "offloading", False) else ""
        raise LongRopeError(
            f"expected a dynamic cache of keys and values for {purpose}, found {type(cache).__name__}"
            f" of {', '.join(sorted(kinds)) or 'no layers'}{offloaded}",
            code="cannot-generate",
        )


def empty(cache: DynamicCache) -> None:
    """Take all tokens out of `cache`. Older releases of transformers only overwrite them with zeros."""
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        layer.keys = layer.values = None
        layer.is_initialized = False
    cache.reset()  # the counts of sliding layers


def fill(
    scaled: ScaledModel,
    cache: DynamicCache,
    ids: Tensor,
    window: Window,
    chunk_size: int = PREFILL_CHUNK,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> None:
    """Append the keys and values of `ids` (B, n) to `cache`, all under `window`.

    Runs the model below its head, `chunk_size` tokens at a time. `position_ids` (B or 1, n) are those of `ids`, by
    default what follows the cache; `attention_mask` (B, p + n) covers the cache's p tokens too.

    Raises LongRopeError for a chunk size below 1, or a model that does not use the cache.
    """
    if chunk_size < 1:
        raise LongRopeError(f"expected a prefill chunk of at least 1 token, found {chunk_size}", code="invalid-setting")
    model, base, count = scaled.model, base_of(scaled.model), ids.shape[1]
    past = int(cache.get_seq_length())
    if past or count > chunk_size:
        _require_continued(scaled, cache)
    if position_ids is None:
        position_ids = torch.arange(past, past + count, device=ids.device)[None]
    with torch.no_grad(), scaled.using(window):
        for start in range(0, count, chunk_size):
            stop = min(start + chunk_size, count)
            base(
                input_ids=ids[:, start:stop],
                position_ids=position_ids[:, start:stop],
                attention_mask=None if attention_mask is None else attention_mask[:, : past + stop],
                **with_cache(base, cache),
            )
    _check_filled(cache, past + count, model)


_CONTINUED: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""The reason why a text cannot be read in parts, empty where it can, of the models that were tried."""
_TRIED = 40, 27  # tokens of a text, and of its first part


def _require_continued(scaled: ScaledModel, cache: DynamicCache) -> None:
    """Raise LongRopeError unless reading a text in two parts gives what reading it at once gives; tried once a model.

    A family may go on from its states a token at a time only, without an error (RecurrentGemma). Layers of keys and
    values alone are trusted where nothing in its classes speaks against it (`cache_fault`).
    """
    if scaled.model not in _CONTINUED:
        fault = cache_fault(scaled.model, base_of(scaled.model))
        trusted = holds_keys_and_values_only(cache)
        _CONTINUED[scaled.model] = fault or ("" if trusted else _why_not_continued(scaled))
    if reason := _CONTINUED[scaled.model]:
        raise LongRopeError(
            f"{type(scaled.model).__name__} cannot go on from a cached text: {reason}", code="cannot-generate"
        )


def _why_not_continued(scaled: ScaledModel) -> str:
    model = scaled.model
    base, (count, first) = base_of(model), _TRIED
    ids = torch.arange(1, count + 1, device=device_of(model))[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(count, device=device_of(model))[None]
    cache: Any = DynamicCache(config=model.config)
    try:
        with torch.no_grad(), scaled.using(scaled.scaling.windows[-1]):
            whole = base(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, first:]
            for part in (slice(0, first), slice(first, count)):
                parts = base(input_ids=ids[:, part], position_ids=positions[:, part], **with_cache(base, cache))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # foreign code, which may want a cache of its own
        return one_line(error)
    off = float((parts.last_hidden_state - whole).abs().max() / whole.abs().max())
    allowed = 1e-2 if model.dtype in (torch.float32, torch.float64) else 0.2
    # Numbers that are not finite are no matter of the cache: whoever uses them says so.
    return f"its hidden states are off by {off:.2g} of the largest" if math.isfinite(off) and off > allowed else ""


def _check_filled(cache: DynamicCache, length: int, model: PreTrainedModel) -> None:
    if int(cache.get_seq_length()) != length:
        raise LongRopeError(
            f"{type(model).__name__} keeps no keys in the cache it is given; it cannot be continued",
            code="cannot-generate",
        )
