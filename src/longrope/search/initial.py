"""The seeds of every search method and the baselines of a search: closed forms, and the checkpoint's own scaling.

There are three cases. The search of a model with its original RoPE starts from closed forms (Algorithm 1). A search
beyond the scaling of a checkpoint starts from its factors and their stretched forms (LongRoPE, 2402.13753, §3.3), as
multiples of those factors, or in an absolute space beside the closed forms. A search inside the context length
(recovery of short windows) starts from the original RoPE, the factors of the checkpoint and closed forms of small
ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np

from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.rope.baselines import CHECKPOINT
from longrope.rope.closed_forms import CLOSED_FORMS, ntk_aware, pi, yarn, yarn_linear
from longrope.rope.geometry import FloatArray, RopeGeometry
from longrope.rope.progressive import (
    SECOND_FORMS,
    second_ntk,
    second_pi,
    second_window,
    second_yarn,
    second_yarn_linear,
)
from longrope.rope.scaling import Window
from longrope.search.config import SearchConfig

KNOT_FORMS = ("yarn", "ntk-critical")
"""The closed forms that a search on the knots may start from, beside ramps (`start.py`)."""
MILD_RATIOS = (2.0, 4.0)
"""Ratios of the closed forms that a recovery starts from, besides that of its own length."""
SECOND_BETAS = (8, 2)
"""β_fast of further seeds of a second YaRN, beside its own 32: a pair that turned more often in training keeps its
factor. The best value depends on L'."""
NONE = "none"
Seed = tuple[FloatArray, int | None]
"""The factors (D,) of a seed, or their multiples; and the n̂ of the checkpoint's window that it is made of, if any."""


def trained_factors(loaded: LoadedModel, length: int, config: SearchConfig) -> FloatArray | None:
    """The factors λ_trained (D,) that a search for `length` tokens multiplies; None in an absolute space.

    Raises LongRopeError (`invalid-setting`) where `config` names a space and there is nothing to multiply.
    """
    checkpoint_scaling = loaded.checkpoint_scaling
    if checkpoint_scaling is None or length <= loaded.context_length:
        if config.space is not None:
            raise LongRopeError(
                f"expected a checkpoint with a scaling that the search goes beyond for the `space` {config.space}, "
                f"found {loaded.name} with a window of {loaded.context_length} tokens searched for {length}",
                code="invalid-setting",
                hint="leave `space` out",
            )
        return None
    return None if config.space == "absolute" else np.asarray(checkpoint_scaling.windows[-1].factors)


def relative_seeds(loaded: LoadedModel, length: int, config: SearchConfig) -> list[Seed]:
    """The multiples μ (D,) that a relative Algorithm 1 starts from: 1, then PI, NTK and YaRN for s₂ = L'/L_ft."""
    assert loaded.checkpoint_scaling is not None
    last = loaded.checkpoint_scaling.windows[-1]
    factors = np.asarray(last.factors)
    stretch = (loaded.geometry, factors, loaded.context_length, length)
    second = second_yarn_linear if config.yarn_ramp == "authors" else second_yarn
    forms = [second_pi(*stretch), second_ntk(*stretch), second(*stretch, config.beta_fast, config.beta_slow)]
    seeds = [np.ones(loaded.geometry.pairs), *(form / factors for form in forms)]
    return [(seed, last.start_tokens) for seed in seeds]


def evolution_seeds(loaded: LoadedModel, length: int, config: SearchConfig | None = None) -> list[Seed]:
    """The factors (D,) that Algorithm 1 starts from for a window of `length` tokens, the likeliest first.

    `config` has the settings of the YaRN among them.
    """
    geometry, checkpoint_scaling = loaded.geometry, loaded.checkpoint_scaling
    chosen = config or SearchConfig()
    seeds: list[Seed] = []
    if length > loaded.context_length:
        if checkpoint_scaling is not None:
            start_tokens = checkpoint_scaling.windows[-1].start_tokens
            seeds = [(seed, start_tokens) for seed in reversed(checkpoint_seeds(loaded, length).values())]
        forms = [pi(geometry, length), ntk_aware(geometry, length), yarn_seed(geometry, length, chosen)]
        return seeds + [(form, None) for form in forms]
    if checkpoint_scaling is not None:
        windows = sorted(checkpoint_scaling.windows, key=lambda window: window != loaded.checkpoint_window(length))
        seeds = [(np.asarray(window.factors), window.start_tokens) for window in windows]
    lengths = [max(length, geometry.original_length), *(ratio * geometry.original_length for ratio in MILD_RATIOS)]
    forms = [form for mild in lengths for form in (yarn_seed(geometry, mild, chosen), ntk_aware(geometry, mild))]
    return [(np.ones(geometry.pairs), None), *seeds, *((form, None) for form in forms)]


def yarn_seed(geometry: RopeGeometry, length: float, config: SearchConfig) -> FloatArray:
    """The YaRN (D,) that Algorithm 1 starts from."""
    form = yarn_linear if config.yarn_ramp == "authors" else yarn
    return form(geometry, length, config.beta_fast, config.beta_slow)


def knot_seeds(loaded: LoadedModel, length: int) -> dict[str, FloatArray]:
    """The factors that a search on the knots (gradient, hybrid, CMA-ES) may start from, by name: (D,) each.

    Closed forms, and the scaling of the checkpoint as it is and stretched.
    """
    seeds = {name: CLOSED_FORMS[name](loaded.geometry, length)[0] for name in KNOT_FORMS}
    return seeds | checkpoint_seeds(loaded, length)


def checkpoint_seeds(loaded: LoadedModel, length: int) -> dict[str, FloatArray]:
    """The checkpoint's factors and their forms stretched to `length`, by name: (D,) each; none without a scaling."""
    window = loaded.checkpoint_window(length)
    if window is None:
        return {}
    return {CHECKPOINT: np.asarray(window.factors)} | second_forms(loaded, length)


def second_forms(loaded: LoadedModel, length: int) -> dict[str, FloatArray]:
    """The checkpoint's factors stretched to a `length` beyond its context length, by name: (D,) each; none where there
    is nothing to stretch."""
    checkpoint_scaling = loaded.checkpoint_scaling
    if checkpoint_scaling is None or length <= loaded.context_length:
        return {}
    stretch = (loaded.geometry, checkpoint_scaling.windows[-1].factors, loaded.context_length, length)
    forms = {name: form(*stretch) for name, form in SECOND_FORMS.items()}
    return forms | {f"second-yarn, β_fast {beta}": second_yarn(*stretch, beta_fast=beta) for beta in SECOND_BETAS}


def baselines(loaded: LoadedModel, length: int, *, formulas: bool = True) -> dict[str, Window]:
    """The windows that a search for `length` tokens is compared with: closed forms, the checkpoint's own scaling, and
    that stretched, each with its own attention factor.

    At the original window itself all closed forms are the original RoPE, which is then the only one. Without
    `formulas`: the original RoPE and the checkpoint's scaling. A form whose last factors are too large for a window, as
    those of NTK by critical dimension for a very long one, is left out.
    """
    geometry, checkpoint_scaling = loaded.geometry, loaded.checkpoint_scaling
    windows = {NONE: _closed_window(NONE, geometry, length)}
    if formulas and length > geometry.original_length:
        forms = {name: partial(_closed_window, name, geometry, length) for name in CLOSED_FORMS if name != NONE}
        windows |= _possible(forms)
    own_window = loaded.checkpoint_window(length)
    if own_window is not None:
        windows[CHECKPOINT] = replace(own_window, max_length=length)
    if formulas and checkpoint_scaling is not None and length > loaded.context_length:
        windows |= _possible({name: partial(second_window, name, checkpoint_scaling, length) for name in SECOND_FORMS})
    return windows


def _closed_window(name: str, geometry: RopeGeometry, length: int) -> Window:
    """The closed form `name` for `length` tokens, with its own attention factor."""
    factors, own = CLOSED_FORMS[name](geometry, length)
    return Window(length, tuple(factors.tolist()), 0, own)


def _possible(forms: Mapping[str, Callable[[], Window]]) -> dict[str, Window]:
    """The windows of `forms` by name, without those that raise LongRopeError."""
    windows = {}
    for name, form in forms.items():
        with suppress(LongRopeError):
            windows[name] = form()
    return windows
