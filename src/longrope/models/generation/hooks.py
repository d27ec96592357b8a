"""`generate` across the windows of a scaling: chooses the window of every forward and keeps the cache right for it.

The rule (LongRoPE2, inference): the window for n tokens, where n counts all that the text has in this forward, prompt
and generated, whether they lie in a cache or not.

A cache holds keys of one window. When the next forward needs another, the cache is filled again from the tokens, in
chunks, or its keys are turned, so that the token after n tokens is predicted under the window for n, cached or not.
transformers keeps the old keys in all but three families, and what follows is then wrong without an error.

`apply_scaling` puts the hooks on the model and `remove_scaling` takes them off: one on `prepare_inputs_for_generation`,
which sees every forward before it runs, and two that refuse ways of generating that would be wrong across windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Literal

import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.cache_argument import arguments_of, cache_argument, forward_argument, take_cache
from longrope.models.devices import device_of
from longrope.models.generation.cache import PREFILL_CHUNK, check_cache, empty, fill, is_refillable
from longrope.models.generation.rerotate import Rerotation
from longrope.models.scaled import MethodHook, ScaledModel, method_hooks, not_applied
from longrope.rope.scaling import Window

Switch = Literal["recompute", "rerotate"]
"""The ways to change cached keys to another window: compute them again from the tokens, or turn them by the angles."""

_RIGHT_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
_OF_TOKENS = ("attention_mask", "position_ids")
_rotation = attrgetter("factors", "start_tokens", "attention_factor")
_MARK = "longrope_window"  # on a cache: the window of its keys; copies of the cache carry it along


def hook_generation(scaled: ScaledModel) -> None:
    """Put the hooks on the model; one that cannot generate is left as it is."""
    if isinstance(scaled.model, GenerationMixin):
        CacheHook(scaled, "prepare_inputs_for_generation").put()
        GenerateHook(scaled, "generate").put()
        ContinuousBatchingHook(scaled, "init_continuous_batching").put()


def cache_hook(scaled: ScaledModel) -> CacheHook:
    """The cache hook on the model. Raises LongRopeError when it has none, or that of another scaling."""
    for hook in method_hooks(scaled.model):
        if isinstance(hook, CacheHook) and hook.scaled is scaled:
            return hook
    name = type(scaled.model).__name__
    if isinstance(scaled.model, GenerationMixin):
        raise not_applied(scaled.model)
    raise LongRopeError(f"expected a model that generates text, found {name}, which does not", code="cannot-generate")


# The choice of the window.


def windows_differ(scaled: ScaledModel) -> bool:
    """True if a growing text can need keys of another window: no window is pinned, and not all have the same keys."""
    windows = scaled.scaling.windows
    return scaled.pinned is None and not all(same_keys(windows[0], window) for window in windows)


def same_keys(one: Window, other: Window) -> bool:
    """True if two windows rotate every key alike, whatever lengths they are for."""
    return bool(_rotation(one) == _rotation(other))


def window_of_rows(scaled: ScaledModel, lengths: Sequence[int]) -> Window:
    """The window for rows of `lengths` tokens in one forward.

    Raises LongRopeError when they need different ones: a forward has one window.
    """
    if scaled.pinned is not None:
        return scaled.pinned
    windows = {length: scaled.scaling.window_for(length) for length in sorted(set(lengths))}
    longest = windows[max(windows)]
    for length, window in windows.items():
        if not same_keys(window, longest):
            raise LongRopeError(
                f"expected rows of one window in a batch, found rows of {length} and {max(windows)} tokens on both "
                f"sides of {window.max_length}",
                code="rows-of-two-windows",
                hint="generate them apart, or together at equal lengths",
            )
    return longest


# The cache.


class CacheHook(MethodHook):
    """Replaces `prepare_inputs_for_generation`: makes the cache right for the window of the next forward."""

    prefill_chunk = PREFILL_CHUNK
    """Tokens that one forward reads into the cache."""
    rerotation: Rerotation | None = None
    """Turns the keys at a change of window; None: they are computed again."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The inputs of the next forward, as `prepare_inputs_for_generation` gives them for these arguments.

        `input_ids` (B, W) is the whole text, or only what the cache does not hold; `position_ids` (B or 1, T) and
        `attention_mask` (B, T) are the whole text's. The cache is found under every name. Raises LongRopeError, across
        windows, where there is none and the forward is not of the whole text.
        """
        given = arguments_of(self.own, args, kwargs)
        input_ids, coming = given.pop("input_ids"), given.pop("next_sequence_length", None)
        cache, several = take_cache(given), windows_differ(self.scaled)
        position_ids: Tensor | None = given.get("position_ids")
        past = 0 if cache is None else int(cache.get_seq_length())
        if not several:
            # Any cache and any way of generating will do. A plain text is still read in chunks.
            new = input_ids.shape[1] if coming is None else coming
            whole = position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == past + new
            embedded = given.get("inputs_embeds") is not None
            if not whole or embedded or not is_refillable(cache) or self._numbers_replaced:
                return self._own(input_ids, coming, cache, given)
        if position_ids is None or position_ids.dim() != 2:
            raise LongRopeError(
                "expected position_ids of shape (batch, tokens): windows are chosen by position", code="invalid-setting"
            )
        window = window_of_rows(self.scaled, (position_ids.max(dim=-1).values + 1).tolist())
        if cache is None:
            self._require_whole(input_ids, coming, given)
            return self._own(input_ids, coming, cache, given)
        check_cache(cache, "generation across windows")
        if given.get("inputs_embeds") is not None:
            raise LongRopeError(
                "expected input_ids, found inputs_embeds: a cache is filled again from tokens", code="text-only"
            )

        total = position_ids.shape[1]
        new = total - past  # tokens that the cache does not hold
        if new < 1:
            raise LongRopeError(
                f"expected new tokens after the {past} that the cache holds, found {total} in all",
                code="invalid-setting",
            )
        held: Window | None = getattr(cache, _MARK, None if several else window)
        if past and (held is None or not same_keys(held, window)):
            past = self._change_window(cache, held, window, position_ids[:, :past], whole=input_ids.shape[1] == total)
        # The forward to come takes the last tokens only, as many as fit a chunk.
        last = min(new, self.prefill_chunk)
        if total - past > last:
            self._fill(cache, input_ids, last, window, given)
        setattr(cache, _MARK, window)
        return self._own(input_ids, last, cache, given)

    @property
    def _numbers_replaced(self) -> bool:
        """True if tensors replace the numbers of the pinned window: then nothing can be filled under a window."""
        rotary = self.scaled.rotaries[0]
        return rotary.factors is not None or rotary.attention_factor is not None

    def _own(self, input_ids: Tensor, last: int | None, cache: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The inputs that the model's own method makes: the `last` tokens, and `cache` where the forward takes it."""
        model = self.scaled.model
        inputs: dict[str, Any] = {}
        # Phi-3's own method drops the cache where its own config changes windows: this one is right already.
        for prepare in (self.own, partial(GenerationMixin.prepare_inputs_for_generation, model)):
            passed = (
                {} if cache is None else {cache_argument(prepare, GenerationMixin.prepare_inputs_for_generation): cache}
            )
            inputs = prepare(input_ids, next_sequence_length=last, **given, **passed)
            if take_cache(inputs) is cache:
                break
        else:
            raise self._no_cache("prepare_inputs_for_generation drops it")
        return inputs if cache is None else inputs | {forward_argument(model): cache}

    def _require_whole(self, input_ids: Tensor, coming: int | None, given: dict[str, Any]) -> None:
        """Raise LongRopeError unless a forward without a cache is one of the whole text."""
        total = given["position_ids"].shape[1]
        read = input_ids.shape[1] if coming is None else coming
        if given.get("inputs_embeds") is not None:
            read = given["inputs_embeds"].shape[1]
        if given.get("use_cache") or read != total:
            raise self._no_cache(f"found none in a forward of {read} of {total} tokens")

    def _no_cache(self, what: str) -> LongRopeError:
        return LongRopeError(
            f"expected {type(self.scaled.model).__name__} to get a cache from generate, {what}: stale keys would stay"
            f" in it at a change of window (transformers {transformers.__version__})",
            code="no-cache",
            hint="generate with use_cache=False, or use the versions of transformers that longrope was tested with",
        )

    def _change_window(self, cache: Any, held: Window | None, window: Window, positions: Tensor, *, whole: bool) -> int:
        """Make `cache`, which has keys of `held` at `positions` (B or 1, p), one of `window`.

        Returns the number of tokens that it keeps.
        """
        if self.rerotation is not None:
            if held is None:
                raise LongRopeError(
                    "expected a cache filled by this model's generate, found one whose window is not known: its keys "
                    "cannot be turned",
                    code="unknown-cache",
                    hint="use `switch='recompute'`",
                )
            self.rerotation.turn(cache, positions, held, window)
            return positions.shape[1]
        if not whole:
            raise LongRopeError(
                f"this text needs the window of {window.max_length} tokens, for which its cache has to be filled again",
                code="whole-text-needed",
                hint="give `input_ids` of the whole text, not of its new tokens only",
            )
        empty(cache)
        return 0

    def _fill(self, cache: DynamicCache, ids: Tensor, last: int, window: Window, given: dict[str, Any]) -> None:
        """Read into the cache the tokens of the text that it lacks, except for the `last` ones."""
        content = [name for name, value in given.items() if isinstance(value, Tensor) and name not in _OF_TOKENS]
        if content:
            raise LongRopeError(
                f"expected text only, found {', '.join(content)}: a cache is filled from tokens", code="text-only"
            )
        positions, mask = given["position_ids"], given.get("attention_mask")
        end, past = positions.shape[1] - last, int(cache.get_seq_length())
        device = device_of(self.scaled.model)
        fill(
            self.scaled,
            cache,
            ids[:, past - positions.shape[1] : -last].to(device),
            window,
            self.prefill_chunk,
            position_ids=positions[:, past:end].to(device),
            attention_mask=None if mask is None else mask[:, :end].to(device),
        )


# Refusals.


class GenerateHook(MethodHook):
    """Replaces `generate`: refuses, before any work, ways of generating that would be wrong across windows.

    `CacheHook` refuses the faults that show later, such as a cache that does not fit.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if windows_differ(self.scaled):
            _check_mode(self.scaled.model, *args, **kwargs)
        return self.own(*args, **kwargs)


class ContinuousBatchingHook(MethodHook):
    """Replaces `init_continuous_batching`, whose paged cache holds rows of several windows."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if windows_differ(self.scaled):
            raise _not_across_windows("continuous batching")
        return self.own(*args, **kwargs)


def _check_mode(
    model: PreTrainedModel, inputs: Any = None, generation_config: GenerationConfig | None = None, *_: Any, **given: Any
) -> None:
    """Raise LongRopeError unless `generate` takes one token at a time, after a prompt read under one window."""
    config = GenerationConfig()
    for stated in (vars(model.generation_config), vars(generation_config) if generation_config else {}, given):
        vars(config).update({name: value for name, value in stated.items() if value is not None})
    mode = str(config.get_generation_mode(given.get("assistant_model")).value)
    if mode not in _RIGHT_MODES:
        raise _not_across_windows(mode.replace("_", " "))
    if config.guidance_scale not in (None, 1):
        raise _not_across_windows("guidance (a second, unconditional text with a cache of its own)")
    if config.prefill_chunk_size is not None:
        raise LongRopeError(
            "expected no prefill_chunk_size: its chunks would be read under windows of their own",
            code="not-across-windows",
            hint="use longrope.generation(..., prefill_chunk=...)",
        )
    if config.cache_implementation not in (None, "dynamic", "hybrid"):  # transformers itself ignores hybrid
        raise LongRopeError(
            "expected a dynamic cache for generation across windows, found cache_implementation "
            f"{config.cache_implementation!r}",
            code="not-across-windows",
            hint="leave it unset",
        )


def _not_across_windows(what: str) -> LongRopeError:
    return LongRopeError(
        f"{what} is not right across windows, where the cache has to change between two tokens",
        code="not-across-windows",
        hint="generate greedily, by sampling or with beams, or pin one window",
    )
