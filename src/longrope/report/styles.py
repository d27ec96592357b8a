"""Who is compared: one label, colour, marker and line each, the same in every figure and table of a report.

Colours are Okabe and Ito's, distinct for every common kind of colour vision; markers and line styles say it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from longrope.rope.baselines import CHECKPOINT, ORIGINAL

OWN = "own scaling"
"""What the rows of a run call the scaling that it found, whatever file that came from."""
OWN_LABEL = "longrope"


@dataclass(frozen=True, slots=True)
class Method:
    """How one contender is shown. `tone` names its colour: `colours.TONES` has the values for light and dark."""

    name: str
    label: str
    tone: str
    marker: str = "o"
    line: str = "--"
    own: bool = False


_KNOWN = {
    method.name: method
    for method in (
        Method("none", "no scaling", "grey", "s"),
        Method("pi", "PI", "blue", "^"),
        Method("ntk", "NTK-aware", "green", "D"),
        Method("ntk-critical", "NTK-critical", "purple", "v"),
        Method("dynamic-ntk", "dynamic NTK", "sky", "P", ":"),
        Method("yarn", "YaRN", "ink", "X", "--"),
        Method(CHECKPOINT, "checkpoint as it is", "amber", "h", "-."),
        Method(ORIGINAL, "original model", "grey", "*", ":"),
        Method("second-pi", "checkpoint, PI", "blue", "1", ":"),
        Method("second-ntk", "checkpoint, NTK-aware", "green", "2", ":"),
        Method("second-ntk-critical", "checkpoint, NTK-critical", "purple", "3", ":"),
        Method("second-yarn", "checkpoint, YaRN", "ink", "4", ":"),
        Method("yarn-rcd", "YaRN-rcd", "ink", "x", ":"),
        Method("ntk-rcd", "NTK-rcd", "purple", "<", ":"),
    )
}
_LONGEST = 28  # letters of a label
_FURTHER = (("amber", "*"), ("sky", ">"), ("blue", "p"), ("green", "8"), ("purple", "d"), ("grey", "H"))


def is_baseline(name: str) -> bool:
    """Whether `name` is a closed form or the model as it was, and not somebody's scaling."""
    return name in _KNOWN


def methods(names: Iterable[str]) -> dict[str, Method]:
    """How each of `names` is shown. Scalings that were found come first: the first in vermilion, all in solid lines."""
    names = list(dict.fromkeys(names))
    found = [name for name in names if not is_baseline(name)]
    shown = {}
    for index, name in enumerate(found):
        tone, marker = ("vermilion", "o") if index == 0 else _FURTHER[(index - 1) % len(_FURTHER)]
        shown[name] = Method(name, label(name), tone, marker, "-", own=True)
    order = list(_KNOWN)
    baselines = sorted((name for name in names if is_baseline(name)), key=order.index)
    return shown | {name: _KNOWN[name] for name in baselines}


def label(name: str) -> str:
    """What a scaling that was found is called; of a long name the end, which is where file names differ."""
    return OWN_LABEL if name == OWN else name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
