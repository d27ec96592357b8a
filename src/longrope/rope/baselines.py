"""What is compared: a name, and the window it uses at each length. Closed forms, scalings, or no scaling at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longrope.errors import LongRopeError
from longrope.rope.closed_forms import CLOSED_FORMS, ntk_aware
from longrope.rope.geometry import RopeGeometry
from longrope.rope.progressive import second_window
from longrope.rope.scaling import RopeScaling, Window

CHECKPOINT = "checkpoint"
"""The name of the scaling that a checkpoint carries, among baselines and contenders."""
ORIGINAL = "original"
"""The name of the model before it was extended."""


@dataclass(frozen=True, slots=True)
class Method:
    """A named choice of windows. `window(length)` is the window for a text of `length` tokens."""

    name: str
    window: Callable[[int], Window]


def scaling_method(name: str, scaling: RopeScaling) -> Method:
    """A scaling with its own windows, chosen by length; a length beyond its last window raises LongRopeError."""
    return Method(name, scaling.window_for)


def checkpoint_method(scaling: RopeScaling) -> Method:
    """What a checkpoint does with the scaling it carries: as transformers does, its last window goes on for ever."""

    def window(length: int) -> Window:
        return scaling.window_for(min(length, scaling.target_length))

    return Method(CHECKPOINT, window)


def dynamic_method(geometry: RopeGeometry, factor: float) -> Method:
    """What a checkpoint of rope type `dynamic` does beyond L: NTK-aware with the ratio f·n/L − (f − 1) at length n."""

    def window(length: int) -> Window:
        original = geometry.original_length
        ratio = max(1.0, factor * length / original - (factor - 1.0))
        return Window(length, tuple(ntk_aware(geometry, ratio * original).tolist()))

    return Method(CHECKPOINT, window)


def closed_form_method(name: str, geometry: RopeGeometry, target_length: int) -> Method:
    """A closed form of METHOD's table by name (`none`, `pi`, `ntk`, `ntk-critical`, `dynamic-ntk`, `yarn`).

    All but `dynamic-ntk` have the factors of `target_length` at every length, as runtimes apply them; `dynamic-ntk`
    follows the length. Raises LongRopeError for an unknown name.
    """
    if name not in CLOSED_FORMS:
        raise LongRopeError(f"expected one of {', '.join(CLOSED_FORMS)} to compare with, found {name!r}")
    form = CLOSED_FORMS[name]

    def window(length: int) -> Window:
        factors, attention_factor = form(geometry, length if name == "dynamic-ntk" else target_length)
        return Window(
            max_length=max(length, target_length), factors=tuple(factors.tolist()), attention_factor=attention_factor
        )

    return Method(name, window)


def second_method(name: str, carried: RopeScaling, target_length: int) -> Method:
    """A second closed form by name (`second-pi`, `second-ntk`, `second-ntk-critical`, `second-yarn`): what a model does
    that was trained for `carried` and is stretched on to `target_length` without a search.

    Within its reach it keeps the carried windows. Raises LongRopeError for an unknown name, or a `target_length` that
    is not beyond the reach.
    """
    return scaling_method(name, carried.with_window(second_window(name, carried, target_length)))
