"""Text generation with a scaling, across the limits of its windows: `generate`, and options for `model.generate`.

Not a decoding loop of its own: tokens come from transformers' `model.generate`, whose cache `switch.py` keeps right.
Wherever a scaling is installed `model.generate` switches by itself; `generation` is for the options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.generation.cache import PREFILL_CHUNK
from longrope.models.generation.hooks import Switch, cache_switch, window_of_rows
from longrope.models.generation.rerotate import Rerotation
from longrope.models.rotary import LongRopeRotary
from longrope.models.scaled import ScaledModel
from longrope.rope.scaling import RopeScaling


@contextmanager
def generation(
    model: PreTrainedModel | ScaledModel,
    scaling: RopeScaling | None = None,
    *,
    switch: Switch = "recompute",
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[ScaledModel]:
    """A block in which stock `model.generate` uses a scaling: a model and its scaling, or a `ScaledModel`.

    A text of n tokens, prompt and generated, uses the window for n (LongRoPE2: the original RoPE up to L). When the
    window changes, `switch` says what becomes of the cached keys: `recompute` fills the cache again from the tokens,
    so that cached generation is that without a cache; `rerotate` turns them by the angle difference, which is exact in
    layer 0 only. Prompts are read `prefill_chunk` tokens at a time, under the window for the whole prompt. Greedy
    decoding, sampling and beam search work, with the default (dynamic) cache; what would be wrong is refused.

    Raises LongRopeError for options out of range, a model that cannot generate, a scaling for another model, a model
    whose keys cannot be turned, and a model with a scaling installed when another is given.
    """
    if switch not in get_args(Switch):
        raise LongRopeError(f"expected a switch of {' or '.join(get_args(Switch))}, found {switch!r}")
    if prefill_chunk < 1:
        raise LongRopeError(f"expected a prefill chunk of at least 1 token, found {prefill_chunk}")
    with _installed(model, scaling) as scaled:
        hook = cache_switch(scaled)
        before = hook.prefill_chunk, hook.rerotation
        hook.prefill_chunk = prefill_chunk
        hook.rerotation = Rerotation(scaled) if switch == "rerotate" else None
        try:
            yield scaled
        finally:
            hook.prefill_chunk, hook.rerotation = before


@contextmanager
def _installed(model: PreTrainedModel | ScaledModel, scaling: RopeScaling | None) -> Iterator[ScaledModel]:
    if isinstance(model, ScaledModel):
        if scaling is not None:
            raise LongRopeError("expected a model with its scaling, or what install() returned; found both")
        yield model
        return
    if scaling is None:
        raise LongRopeError("expected a scaling to generate with, found none; give it, or what install() returned")
    if any(isinstance(module, LongRopeRotary) for module in model.modules()):
        raise LongRopeError("this model has a scaling installed: give what install() returned, or uninstall() it")
    try:
        yield apply_scaling(model, scaling)
    finally:
        remove_scaling(model)


def generate(
    model: PreTrainedModel | ScaledModel,
    input_ids: Tensor,
    scaling: RopeScaling | None = None,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    switch: Switch = "recompute",
    prefill_chunk: int = PREFILL_CHUNK,
) -> Tensor:
    """`input_ids` (B, T) with up to `max_new_tokens` tokens after each row: (B, T + n).

    `model`, `scaling`, `switch` and `prefill_chunk` are those of `generation`. Rows are padded on the left, with
    `attention_mask` (B, T) zero there; all rows of a batch have to be in one window at every step. Greedy, or with
    `do_sample` drawn at `temperature` from the `top_p` nucleus, the same tokens for the same `seed`. A row ends at
    `eos_token_id` (one or more; None: the model's own; `()`: never). What else `model.generation_config` says, such as
    a repetition penalty, holds.

    Raises LongRopeError, before any forward, when the text would outgrow the scaling or rows would need two windows.
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise LongRopeError(f"expected token ids of shape (batch, tokens), found {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise LongRopeError(f"expected at least 1 new token, found {max_new_tokens}")
    if not 0 < temperature < float("inf") or not 0 < top_p <= 1:
        raise LongRopeError(f"expected a temperature above 0 and a top_p in (0, 1], found {temperature:g}, {top_p:g}")
    if not do_sample and (temperature, top_p, seed) != (1.0, 1.0, None):
        raise LongRopeError("temperature, top_p and seed are for sampling: give do_sample=True too, or leave them out")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape or not bool(mask[:, -1].all()) or bool((mask.long().diff() < 0).any()):
        raise LongRopeError("expected an attention_mask of input_ids' shape, zero for padding on the left only")
    with generation(model, scaling, switch=switch, prefill_chunk=prefill_chunk) as scaled:
        _check_lengths(scaled, mask.sum(dim=-1).tolist(), max_new_tokens)
        target = scaled.model
        own = target.generation_config
        eos = own.eos_token_id if eos_token_id is None else eos_token_id
        if isinstance(eos, Sequence) and not eos:
            eos = target.config.get_text_config().vocab_size  # an id that never comes
        pad = own.pad_token_id if own.pad_token_id is not None else eos[0] if isinstance(eos, Sequence) else eos
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=1,
            eos_token_id=eos,
            pad_token_id=0 if pad is None else pad,
        )
        if do_sample:
            config.temperature, config.top_p, config.top_k = temperature, top_p, 0
        with nullcontext() if seed is None else torch.random.fork_rng():
            if seed is not None:
                torch.manual_seed(seed)
            found: Tensor = target.generate(input_ids, generation_config=config, attention_mask=mask)
    return found


def _check_lengths(scaled: ScaledModel, lengths: Sequence[int], new_tokens: int) -> None:
    """Raise LongRopeError when rows of `lengths` tokens, growing by one a step, come to need what there is not.

    The last of the new tokens is predicted and never read, so the longest forward has one token less.
    """
    last = new_tokens - 1
    if scaled.rotaries[0].pinned is None and max(lengths) + last > scaled.scaling.target_length:
        raise LongRopeError(
            f"this scaling reaches {scaled.scaling.target_length} tokens; {max(lengths)} and {new_tokens} new ones"
            " are too many"
        )
    limits = [window.max_length - max(lengths) + 1 for window in scaled.scaling.windows]
    for step in (0, *(step for step in limits if 0 < step <= last)):  # the first steps beyond each limit
        window_of_rows(scaled, [length + step for length in lengths])
