"""Which window a forward of a model with a scaling uses, and when two windows differ for its keys.

The rule (LongRoPE2, inference): the window for n tokens, where n counts all that the text has in this forward, prompt
and generated, whether they lie in a cache or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window

if TYPE_CHECKING:
    from longrope.models.install import Installed


def switches(installed: Installed) -> bool:
    """Whether the keys of a text can come to need another window: not when one is fixed, or all have the same keys."""
    windows = installed.scaling.windows
    return installed.rotaries[0].fixed is None and not all(same_keys(windows[0], window) for window in windows)


def same_keys(one: Window, other: Window) -> bool:
    """Whether two windows rotate every key alike, whatever lengths they are for."""
    return one == other or (one.factors, one.start_tokens, one.attention_factor) == (
        other.factors,
        other.start_tokens,
        other.attention_factor,
    )


def window_of_rows(installed: Installed, lengths: Sequence[int]) -> Window:
    """The window for rows of `lengths` tokens in one forward.

    Raises LongRopeError when they need different ones: a forward has one window.
    """
    fixed = installed.rotaries[0].fixed
    if fixed is not None:
        return fixed
    windows = {length: installed.scaling.window_for(length) for length in sorted(set(lengths))}
    longest = windows[max(windows)]
    for length, window in windows.items():
        if not same_keys(window, longest):
            raise LongRopeError(
                f"expected rows of one window in a batch, found rows of {length} and {max(windows)} tokens on both "
                f"sides of {window.max_length}; generate them apart, or together at equal lengths"
            )
    return longest
