"""A whole report, and its page: a chapter for every run, and before them a comparison where there are several.

The page is one HTML file: no script, nothing from a network, figures as SVG that follow the page's colours. A content
security policy in it forbids everything that is not in the file itself. Its template is `assets/report.html.j2`, its
style `assets/report.css`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from longrope.report.collect import Run
from longrope.report.comparison import comparison
from longrope.report.metadata import Fact, about, description, facts
from longrope.report.numbers import FEW_TRIALS, MARK, count, listed
from longrope.report.sections import Exhibit, exhibits
from longrope.report.styles import OWN, Shown, method_styles, variables
from longrope.report.summary import Number, headline, verdict
from longrope.report.svg import drawing
from longrope.report.tables import Table
from longrope.report.warnings import WarningGroup, comparability, warnings


@dataclass(frozen=True)
class Chapter:
    """One run of a report, or the comparison before the runs.

    `name` is empty where there is one part only; `tone` is the colour of the run's own scaling where there are several.
    """

    name: str
    lede: str
    verdict: tuple[str, ...]
    about: tuple[Fact, ...]
    numbers: tuple[Number, ...]
    warnings: tuple[WarningGroup, ...]
    exhibits: tuple[Exhibit, ...]
    facts: tuple[Fact, ...]
    tone: str | None = None


@dataclass(frozen=True)
class Report:
    """A title and its parts."""

    title: str
    chapters: tuple[Chapter, ...]

    @property
    def exhibits(self) -> list[Exhibit]:
        return [exhibit for part in self.chapters for exhibit in part.exhibits]


def build(runs: Sequence[Run]) -> Report:
    """The report on `runs`, figures drawn."""
    others = [name for run in runs for name in run.others]
    with drawing():
        if len(runs) == 1:
            return Report(_title(runs[0]), (_chapter(runs[0], method_styles([OWN, *others]), ""),))
        shown = method_styles([*(run.name for run in runs), *others])
        compared = {run.name for run in runs}
        rest = {name: method for name, method in shown.items() if name not in compared}
        slugs = _slugs([run.name for run in runs])
        chapters = [
            _chapter(run, {OWN: replace(shown[run.name], name=OWN), **rest}, run.name, slug)
            for run, slug in zip(runs, slugs, strict=True)
        ]
        return Report(f"{listed([run.name for run in runs])}, side by side", (_first_chapter(runs, shown), *chapters))


def _title(run: Run) -> str:
    if run.scaling is None:
        return f"{run.model}, measured"
    original, target = run.scaling.geometry.original_length, run.scaling.target_length
    return f"{run.model}: from {count(original)} to {count(target)} tokens"


def _first_chapter(runs: Sequence[Run], shown: Shown) -> Chapter:
    models = list(dict.fromkeys(run.model for run in runs))
    doubts = comparability(runs)
    return Chapter(
        "The runs compared",
        f"{count(len(runs))} runs of {listed(models)}. Each has its own part below.",
        verdict=(),
        about=(),
        numbers=(),
        warnings=(WarningGroup("Not comparable", tuple(doubts)),) if doubts else (),
        exhibits=tuple(comparison(runs, shown)),
        facts=(),
    )


def _chapter(run: Run, shown: Shown, name: str, slug: str = "") -> Chapter:
    found = exhibits(run, shown)
    if slug:
        found = [replace(exhibit, name=f"{slug}-{exhibit.name}") for exhibit in found]
    return Chapter(
        name,
        description(run),
        tuple(verdict(run, shown)),
        tuple(about(run)),
        tuple(headline(run, shown)),
        tuple(warnings(run, shown)),
        tuple(found),
        tuple(facts(run)),
        shown[OWN].tone if name else None,
    )


def _slugs(names: Sequence[str]) -> list[str]:
    """Each of `names` as part of a file name and an anchor; what comes out alike is numbered."""
    found = ["compared"]  # the exhibits of the first chapter
    for name in names:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
        numbered = (f"{slug}-{number}" for number in range(2, len(names) + 2))
        found.append(slug if slug not in found else next(one for one in numbered if one not in found))
    return found[1:]


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
        csv_link=_csv_link,
        version=version,
    )


def _svg(exhibit: Exhibit) -> Markup:
    assert exhibit.drawing is not None
    return Markup(exhibit.drawing.inline(exhibit.name, f"{exhibit.title}; the table that follows has its numbers"))


def _csv_link(table: Table) -> str:
    """A link that holds the whole table as CSV, for a click that saves it."""
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(table.to_csv().encode()).decode()}"


def _numbered(report: Report) -> dict[str, int]:
    """Exhibit name -> its number among the figures, or among the tables for one without a figure."""
    numbers: dict[str, int] = {}
    counts = {True: 0, False: 0}
    for exhibit in report.exhibits:
        kind = exhibit.drawing is not None
        counts[kind] += 1
        numbers[exhibit.name] = counts[kind]
    return numbers
