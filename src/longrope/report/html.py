"""A report as one HTML file: no script, nothing from a network, figures as SVG that follow the page's colours.

The page is `assets/report.html.j2`, its style `assets/report.css`. A content security policy in the page forbids
everything that is not in the file itself.
"""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from longrope.report.figures.colours import variables
from longrope.report.numbers import FEW_TRIALS, MARK
from longrope.report.page import Report
from longrope.report.sections import Exhibit


def render(report: Report, version: str) -> str:
    """The page of `report`, made by `version` of longrope. The same report gives the same text."""
    assets = files("longrope") / "assets"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((assets / "report.html.j2").read_text("utf-8"))
    return template.render(
        report=report,
        numbered=_numbered(report),
        style=Markup((assets / "report.css").read_text("utf-8")),
        light=Markup(variables(dark=False)),
        dark=Markup(variables(dark=True)),
        mark=MARK,
        few_trials=FEW_TRIALS,
        svg=_svg,
        version=version,
    )


def _svg(exhibit: Exhibit) -> Markup:
    assert exhibit.drawing is not None
    return Markup(exhibit.drawing.inline(exhibit.name, f"{exhibit.title}; the table that follows has its numbers"))


def _numbered(report: Report) -> dict[str, int]:
    """Exhibit name -> its number among the figures, or among the tables for one without a figure."""
    numbers: dict[str, int] = {}
    counts = {True: 0, False: 0}
    for exhibit in report.exhibits:
        kind = exhibit.drawing is not None
        counts[kind] += 1
        numbers[exhibit.name] = counts[kind]
    return numbers
