"""The style of each method: one label, colour, marker and line, the same in every figure and table of a report.

Colours are Okabe and Ito's, distinct for every common kind of colour vision; markers and line styles say it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from longrope.rope.baselines import CHECKPOINT, ORIGINAL

OWN = "own scaling"
"""The name of a run's own scaling in its rows, whatever file it came from."""
OWN_LABEL = "longrope"


@dataclass(frozen=True, slots=True)
class MethodStyle:
    """The style of one method. `tone` names its colour: `colours.TONES` has the values for light and dark."""

    name: str
    label: str
    tone: str
    marker: str = "o"
    line: str = "--"
    own: bool = False


_KNOWN = {
    method.name: method
    for method in (
        MethodStyle("none", "no scaling", "grey", "s"),
        MethodStyle("pi", "PI", "blue", "^"),
        MethodStyle("ntk", "NTK-aware", "green", "D"),
        MethodStyle("ntk-critical", "NTK-critical", "purple", "v"),
        MethodStyle("dynamic-ntk", "dynamic NTK", "sky", "P", ":"),
        MethodStyle("yarn", "YaRN", "ink", "X", "--"),
        MethodStyle(CHECKPOINT, "checkpoint as it is", "amber", "h", "-."),
        MethodStyle(ORIGINAL, "original model", "grey", "*", ":"),
        MethodStyle("second-pi", "checkpoint, PI", "blue", "1", ":"),
        MethodStyle("second-ntk", "checkpoint, NTK-aware", "green", "2", ":"),
        MethodStyle("second-ntk-critical", "checkpoint, NTK-critical", "purple", "3", ":"),
        MethodStyle("second-yarn", "checkpoint, YaRN", "ink", "4", ":"),
        MethodStyle("yarn-rcd", "YaRN-rcd", "ink", "x", ":"),
        MethodStyle("ntk-rcd", "NTK-rcd", "purple", "<", ":"),
    )
}
_LONGEST = 28  # letters of a label
_FURTHER = (("amber", "*"), ("sky", ">"), ("blue", "p"), ("green", "8"), ("purple", "d"), ("grey", "H"))


def is_baseline(name: str) -> bool:
    """Whether `name` is a closed form or the model as it was, and not a scaling that was found."""
    return name in _KNOWN


def method_styles(names: Iterable[str]) -> dict[str, MethodStyle]:
    """The style of each of `names`. Scalings that were found come first: the first in vermilion, all in solid lines."""
    names = list(dict.fromkeys(names))
    found = [name for name in names if not is_baseline(name)]
    shown = {}
    for index, name in enumerate(found):
        tone, marker = ("vermilion", "o") if index == 0 else _FURTHER[(index - 1) % len(_FURTHER)]
        shown[name] = MethodStyle(name, label(name), tone, marker, "-", own=True)
    order = list(_KNOWN)
    baselines = sorted((name for name in names if is_baseline(name)), key=order.index)
    return shown | {name: _KNOWN[name] for name in baselines}


def label(name: str) -> str:
    """The label of a scaling that was found; of a long name its end, where file names differ."""
    return OWN_LABEL if name == OWN else name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
