"""Text generation with a scaling, across the limits of its windows: `generate`, and options for `model.generate`.

Not a decoding loop of its own: tokens come from transformers' `model.generate`, whose cache `hooks.py` keeps right.
`model.generate` changes windows by itself wherever a scaling is applied; `generation` is for the options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.apply import scaled
from longrope.models.finite import require_finite_logits
from longrope.models.generation.cache import PREFILL_CHUNK
from longrope.models.generation.hooks import Switch, cache_hook, window_of_rows
from longrope.models.generation.rerotate import Rerotation
from longrope.models.scaled import ScaledModel, handle_of
from longrope.rope.scaling import RopeScaling


@contextmanager
def generation(
    model: PreTrainedModel | ScaledModel,
    scaling: RopeScaling | Path | str | None = None,
    *,
    switch: Switch = "recompute",
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[ScaledModel]:
    """A block in which `model.generate` of transformers uses `scaling`, or the one applied already where none is given.

    A text of n tokens, prompt and generated, uses the window for n (LongRoPE2: the original RoPE up to L). When the
    window changes, `switch` chooses how the cached keys follow: `recompute` fills the cache again from the tokens, so
    that the tokens are those of generation without a cache; `rerotate` turns the keys by the angle difference, which is
    exact in layer 0 only. Prompts are read `prefill_chunk` tokens at a time, under the window for the whole prompt.
    Greedy decoding, sampling and beam search work, with the default (dynamic) cache; other ways are refused. After the
    block the model is as before.

    Raises LongRopeError for options out of range, a model that cannot generate, a scaling for another model or none,
    and a model whose keys cannot be turned.
    """
    if switch not in get_args(Switch):
        raise _invalid(f"expected a `switch` of {' or '.join(get_args(Switch))}, found {switch!r}")
    if prefill_chunk < 1:
        raise _invalid(f"expected a `prefill_chunk` of at least 1 token, found {prefill_chunk}")
    own = model.model if isinstance(model, ScaledModel) else model
    with nullcontext(handle_of(model)) if scaling is None else scaled(own, scaling) as handle:
        hook = cache_hook(handle)
        before = hook.prefill_chunk, hook.rerotation
        hook.prefill_chunk = prefill_chunk
        hook.rerotation = Rerotation(handle) if switch == "rerotate" else None
        try:
            yield handle
        finally:
            hook.prefill_chunk, hook.rerotation = before


def generate(
    model: PreTrainedModel | ScaledModel,
    input_ids: Tensor,
    scaling: RopeScaling | Path | str | None = None,
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
    """Generate up to `max_new_tokens` tokens after each row of `input_ids` (B, T), across windows: returns (B, T + n).

    `model`, `scaling`, `switch` and `prefill_chunk` are those of `generation`. Rows are padded on the left, with
    `attention_mask` (B, T) zero there; all rows of a batch have to be in one window at every step. Greedy, or with
    `do_sample` drawn at `temperature` from the `top_p` nucleus, the same tokens for the same `seed`. A row ends at
    `eos_token_id` (one or more; None: the model's own; `()`: never). What else `model.generation_config` says, such as
    a repetition penalty, holds.

    Raises LongRopeError, before any forward, when the text would outgrow the scaling or rows would need two windows;
    and for logits that are not finite (`not-finite`).
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise _invalid(f"expected token ids of shape (batch, tokens), found {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise _invalid(f"expected at least 1 new token, found {max_new_tokens}")
    if not 0 < temperature < float("inf") or not 0 < top_p <= 1:
        raise _invalid(f"expected a temperature above 0 and a top_p in (0, 1], found {temperature:g}, {top_p:g}")
    if not do_sample and (temperature, top_p, seed) != (1.0, 1.0, None):
        raise LongRopeError(
            "`temperature`, `top_p` and `seed` are for sampling",
            code="invalid-setting",
            hint="give `do_sample=True` too, or leave them out",
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape or not bool(mask[:, -1].all()) or bool((mask.long().diff() < 0).any()):
        raise _invalid("expected an attention_mask of input_ids' shape, zero for padding on the left only")
    with generation(model, scaling, switch=switch, prefill_chunk=prefill_chunk) as handle:
        _check_lengths(handle, mask.sum(dim=-1).tolist(), max_new_tokens)
        target = handle.model
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
            checks = LogitsProcessorList([_FiniteLogits(target)])
            found: Tensor = target.generate(
                input_ids, generation_config=config, attention_mask=mask, logits_processor=checks
            )
    return found


class _FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """Passes logits on as they are, and refuses those that are not finite: any token would be the most likely one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        require_finite_logits(self.model, scores, input_ids.shape[-1])
        return scores


def _invalid(message: str) -> LongRopeError:
    return LongRopeError(message, code="invalid-setting")


def _check_lengths(handle: ScaledModel, lengths: Sequence[int], new_tokens: int) -> None:
    """Raise LongRopeError when rows of `lengths` tokens, growing by one a step, come to need a window that is missing,
    or two windows at once.

    The last of the new tokens is predicted and never read, so the longest forward has one token less.
    """
    last = new_tokens - 1
    if handle.pinned is None and max(lengths) + last > handle.scaling.target_length:
        raise LongRopeError(
            f"this scaling is for {handle.scaling.target_length} tokens; {max(lengths)} and {new_tokens} new ones"
            " are too many",
            code="beyond-the-scaling",
        )
    limits = [window.max_length - max(lengths) + 1 for window in handle.scaling.windows]
    for step in (0, *(step for step in limits if 0 < step <= last)):  # the first steps beyond each limit
        window_of_rows(handle, [length + step for length in lengths])
