"""The colours of a report, and the style of each method: one label, colour, marker and line in all figures and tables.

Colours are Okabe and Ito's, distinct for every common kind of colour vision; markers and line styles say it again. A
figure is drawn in the light values. Written into a page, each becomes a CSS variable (`svg.py`), and the page's style
sheet gives the variables their values for light, dark and print.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from longrope.evaluation.results import LABELS
from longrope.evaluation.results import OWN as RESULT
from longrope.rope.baselines import CHECKPOINT, ORIGINAL

TONES = {
    # name: (light, dark); Okabe and Ito's palette, lighter on a dark page
    "vermilion": ("#d55e00", "#f4894a"),
    "blue": ("#0072b2", "#58ace4"),
    "green": ("#009e73", "#35c79c"),
    "purple": ("#cc79a7", "#dd9cc2"),
    "sky": ("#56b4e9", "#86cdf4"),
    "amber": ("#e69f00", "#f2bd49"),
    "grey": ("#7f7f7f", "#a0a0a0"),
    # of the page
    "ink": ("#1b1b1d", "#e8e6e1"),
    "quiet": ("#5c5f66", "#a3a6ad"),
    "line": ("#dbdad5", "#36383d"),
    "paper": ("#fefefd", "#151618"),
}

OWN = "own scaling"
"""The name of a run's own scaling in its rows, whatever file it came from."""


@dataclass(frozen=True, slots=True)
class MethodStyle:
    """The style of one method. `tone` names its colour in TONES."""

    name: str
    label: str
    tone: str
    marker: str = "o"
    line: str = "--"
    own: bool = False


Shown = Mapping[str, MethodStyle]
"""The styles of the methods that are shown, by name and in order."""

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
    """True if `name` is a closed form or the model as it was, and not a scaling that was found."""
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
    return LABELS[RESULT] if name == OWN else name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def light(tone: str) -> str:
    """The colour that a figure is drawn in."""
    return TONES[tone][0]


def variables(dark: bool) -> str:
    """CSS declarations of every tone."""
    return " ".join(f"--{name}: {values[dark]};" for name, values in TONES.items())
