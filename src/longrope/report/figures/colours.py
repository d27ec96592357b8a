"""The report's colours, light and dark: one place for figures and page, so that a figure can follow the page's theme.

A figure is drawn in the light values. Written into a page, each becomes a CSS variable (`svg.py`), and the page's
style sheet gives the variables their values for light, dark and print.
"""

from __future__ import annotations

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


def light(tone: str) -> str:
    """The colour that a figure is drawn in."""
    return TONES[tone][0]


def variables(dark: bool) -> str:
    """CSS declarations of every tone."""
    return " ".join(f"--{name}: {values[dark]};" for name, values in TONES.items())
