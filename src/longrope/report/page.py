"""A whole report: a chapter for every run, and before them a comparison where there are several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from longrope.report.collect import Run
from longrope.report.comparison import comparison
from longrope.report.metadata import Fact, description, facts
from longrope.report.numbers import count, listed
from longrope.report.sections import Exhibit, exhibits
from longrope.report.styles import OWN, MethodStyle, method_styles
from longrope.report.summary import Number, headline
from longrope.report.svg import drawing
from longrope.report.warnings import WarningGroup, comparability, warnings


@dataclass(frozen=True)
class Chapter:
    """One run of a report, or the comparison before the runs.

    `name` is empty where there is one part only; `tone` is the colour of the run's own scaling where there are several.
    """

    name: str
    lede: str
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
        chapters = [_chapter(run, {OWN: replace(shown[run.name], name=OWN), **rest}, run.name) for run in runs]
        return Report(f"{listed([run.name for run in runs])}, side by side", (_first_chapter(runs, shown), *chapters))


def _title(run: Run) -> str:
    if run.scaling is None:
        return f"{run.model}, measured"
    original, target = run.scaling.geometry.original_length, run.scaling.target_length
    return f"{run.model}: from {count(original)} to {count(target)} tokens"


def _first_chapter(runs: Sequence[Run], shown: Mapping[str, MethodStyle]) -> Chapter:
    models = list(dict.fromkeys(run.model for run in runs))
    doubts = comparability(runs)
    return Chapter(
        "The runs compared",
        f"{count(len(runs))} runs of {listed(models)}. Each has its own part below.",
        numbers=(),
        warnings=(WarningGroup("Not comparable", tuple(doubts)),) if doubts else (),
        exhibits=tuple(comparison(runs, shown)),
        facts=(),
    )


def _chapter(run: Run, shown: Mapping[str, MethodStyle], name: str) -> Chapter:
    found = exhibits(run, shown)
    if name:
        found = [replace(exhibit, name=f"{_slug(name)}-{exhibit.name}") for exhibit in found]
    return Chapter(
        name,
        description(run),
        tuple(headline(run, shown)),
        tuple(warnings(run, shown)),
        tuple(found),
        tuple(facts(run)),
        shown[OWN].tone if name else None,
    )


def _slug(name: str) -> str:
    """`name` as part of a file name and an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
