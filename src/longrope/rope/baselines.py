"""The methods that a scaling is compared with, by name: closed forms, other scalings, the checkpoint's scaling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longrope.errors import LongRopeError
from longrope.rope.closed_forms import CLOSED_FORMS, ntk_aware
from longrope.rope.geometry import RopeGeometry
from longrope.rope.progressive import SECOND_FORMS, second_window
from longrope.rope.scaling import RopeScaling, Window

CHECKPOINT = "checkpoint"
"""The scaling of the checkpoint, which its config or the `scaling.json` beside it states."""
ORIGINAL = "original"
"""The model before it was extended."""
STRETCHING = tuple(name for name in CLOSED_FORMS if name not in ("none", "dynamic-ntk"))
"""The closed forms with the factors of the target length at every length."""
BASELINES = (*CLOSED_FORMS, CHECKPOINT, ORIGINAL, *SECOND_FORMS)
"""The names of all baselines. A scaling of one's own is named by its path, ending in .json."""


@dataclass(frozen=True, slots=True)
class Method:
    """A named choice of window by length: `window(length)` is the window for a text of `length` tokens.

    The method of a scaling is its `window_for`, which raises LongRopeError for a length beyond its last window.
    """

    name: str
    window: Callable[[int], Window]


def check_baseline(name: str) -> None:
    """Raise LongRopeError where `name` is neither in BASELINES nor the path of a scaling."""
    if name not in BASELINES and not name.endswith(".json"):
        raise LongRopeError(
            f"expected {', '.join(BASELINES)} or a scaling's path ending in .json to compare with, found {name!r}",
            code="unknown-baseline",
        )


def checkpoint_method(scaling: RopeScaling) -> Method:
    """The scaling of a checkpoint as transformers applies it: the last window holds for longer texts, too."""

    def window(length: int) -> Window:
        return scaling.window_for(min(length, scaling.target_length))

    return Method(CHECKPOINT, window)


def dynamic_method(geometry: RopeGeometry, factor: float) -> Method:
    """A checkpoint of rope type `dynamic`: beyond L, NTK-aware with the ratio f·n/L − (f − 1) at length n.

    `factor` is f. Source: `_compute_dynamic_ntk_parameters` of transformers.
    """

    def window(length: int) -> Window:
        original = geometry.original_length
        ratio = max(1.0, factor * length / original - (factor - 1.0))
        return Window(length, tuple(ntk_aware(geometry, ratio * original).tolist()))

    return Method(CHECKPOINT, window)


def closed_form_method(name: str, geometry: RopeGeometry, target_length: int) -> Method:
    """A closed form by name (`none`, `pi`, `ntk`, `ntk-critical`, `dynamic-ntk`, `yarn`).

    All but `dynamic-ntk` have the factors of `target_length` at every length, as runtimes apply them; `dynamic-ntk`
    follows the length. Raises LongRopeError for an unknown name.
    """
    if name not in CLOSED_FORMS:
        raise LongRopeError(
            f"expected one of {', '.join(CLOSED_FORMS)} to compare with, found {name!r}", code="unknown-baseline"
        )
    form = CLOSED_FORMS[name]

    def window(length: int) -> Window:
        factors, attention_factor = form(geometry, length if name == "dynamic-ntk" else target_length)
        return Window(
            max_length=max(length, target_length), factors=tuple(factors.tolist()), attention_factor=attention_factor
        )

    return Method(name, window)


def second_method(name: str, checkpoint_scaling: RopeScaling, target_length: int) -> Method:
    """A second closed form by name (`second-pi`, `second-ntk`, `second-ntk-critical`, `second-yarn`).

    It is for a model that was trained for `checkpoint_scaling`: its windows stay, and one more stretches it on to
    `target_length`, without a search. Raises LongRopeError for an unknown name, or a `target_length` that is not above
    the checkpoint's context length.
    """
    stretched = checkpoint_scaling.with_window(second_window(name, checkpoint_scaling, target_length))
    return Method(name, stretched.window_for)
