"""A whole report: what every run shows, in order, and where there are several, first what compares them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from longrope.report.collect import Run
from longrope.report.comparison import comparison
from longrope.report.metadata import Fact, facts, what_was_done
from longrope.report.numbers import count, listed
from longrope.report.sections import Exhibit, exhibits
from longrope.report.styles import OWN, Method, methods
from longrope.report.summary import Number, headline
from longrope.report.svg import drawing
from longrope.report.warnings import Caveats, caveats, comparability


@dataclass(frozen=True)
class Part:
    """One run of a report, or the comparison before the runs.

    `name` is empty where there is one part only; `tone` is the colour of the run's own scaling where there are several.
    """

    name: str
    lede: str
    numbers: tuple[Number, ...]
    caveats: tuple[Caveats, ...]
    exhibits: tuple[Exhibit, ...]
    facts: tuple[Fact, ...]
    tone: str | None = None


@dataclass(frozen=True)
class Report:
    """A title and its parts."""

    title: str
    parts: tuple[Part, ...]

    @property
    def exhibits(self) -> list[Exhibit]:
        return [exhibit for part in self.parts for exhibit in part.exhibits]


def build(runs: Sequence[Run]) -> Report:
    """The report on `runs`, figures drawn."""
    others = [name for run in runs for name in run.others]
    with drawing():
        if len(runs) == 1:
            return Report(_title(runs[0]), (_part(runs[0], methods([OWN, *others]), ""),))
        shown = methods([*(run.name for run in runs), *others])
        compared = {run.name for run in runs}
        rest = {name: method for name, method in shown.items() if name not in compared}
        parts = [_part(run, {OWN: replace(shown[run.name], name=OWN), **rest}, run.name) for run in runs]
        return Report(f"{listed([run.name for run in runs])}, side by side", (_first_part(runs, shown), *parts))


def _title(run: Run) -> str:
    if run.scaling is None:
        return f"{run.model}, measured"
    original, target = run.scaling.geometry.original_length, run.scaling.target_length
    return f"{run.model}: from {count(original)} to {count(target)} tokens"


def _first_part(runs: Sequence[Run], shown: Mapping[str, Method]) -> Part:
    models = list(dict.fromkeys(run.model for run in runs))
    doubts = comparability(runs)
    return Part(
        "The runs compared",
        f"{count(len(runs))} runs of {listed(models)}. Each has its own part below.",
        numbers=(),
        caveats=(Caveats("What does not compare", tuple(doubts)),) if doubts else (),
        exhibits=tuple(comparison(runs, shown)),
        facts=(),
    )


def _part(run: Run, shown: Mapping[str, Method], name: str) -> Part:
    found = exhibits(run, shown)
    if name:
        found = [replace(exhibit, name=f"{_slug(name)}-{exhibit.name}") for exhibit in found]
    return Part(
        name,
        what_was_done(run),
        tuple(headline(run, shown)),
        tuple(caveats(run, shown)),
        tuple(found),
        tuple(facts(run)),
        shown[OWN].tone if name else None,
    )


def _slug(name: str) -> str:
    """`name` as part of a file name and an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
