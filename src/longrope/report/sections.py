"""The exhibits of one run: for every topic that was measured a figure, its caption and its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from longrope.evaluation.results import EvalRow
from longrope.report import tables
from longrope.report.collect import Run
from longrope.report.figures.by_length import accuracy_figure, perplexity_figure, position_figure, score_figure
from longrope.report.figures.factors import factors_figure
from longrope.report.figures.needles import needle_figure
from longrope.report.figures.search import outside, search_figure
from longrope.report.numbers import BEST_NOTE, FEW_TRIALS, MARK, count, listed
from longrope.report.styles import OWN, Shown
from longrope.report.svg import Drawing
from longrope.report.tables import Table
from longrope.rope.baselines import closed_form_method
from longrope.rope.scaling import RopeScaling, Window

FACTORS_SHOWN = ("pi", "ntk", "ntk-critical", "yarn")
"""The closed forms that factors are drawn against; the others are one of these at the target length, or all ones."""


@dataclass(frozen=True)
class Exhibit:
    """A figure (or none) with its title, caption and tables. `folded`: the tables are long, and closed on a screen.

    `name` is that of its files and its anchor.
    """

    name: str
    title: str
    caption: str
    drawing: Drawing | None
    tables: tuple[Table, ...]
    folded: bool = False

    @property
    def csv_files(self) -> dict[str, str]:
        """File name -> a table as CSV; several tables of one exhibit are numbered."""
        names = [self.name + (f"-{number}" if number > 1 else "") for number in range(1, len(self.tables) + 1)]
        return {f"{name}.csv": table.to_csv() for name, table in zip(names, self.tables, strict=True)}

    @property
    def few(self) -> bool:
        return any(table.few for table in self.tables)


def exhibits(run: Run, shown: Shown) -> list[Exhibit]:
    """The exhibits of a run: results first, then the search and its factors."""
    makers = (_perplexity, _position, _passkey, _needle, _ruler, _retention, _search, _factors)
    return [exhibit for make in makers if (exhibit := make(run, shown)) is not None]


def _factors(run: Run, shown: Shown) -> Exhibit | None:
    if run.scaling is None:
        return None
    scaling, target = run.scaling, run.scaling.target_length
    windows, further = closed_forms(scaling) | {OWN: scaling.windows[-1]}, _further_windows(scaling, shown[OWN].label)
    real = scaling.provenance.get("critical_dim")
    real = real if isinstance(real, int) else None
    caption = (
        f"A rotary pair turns by nθ/λ at position n: λ = 1 leaves it as it was trained, λ = "
        f"{target / scaling.geometry.original_length:g} interpolates it evenly. Pairs from the critical dimension on "
        f"do not finish a turn within {count(scaling.geometry.original_length)} tokens."
    )
    return Exhibit(
        "factors",
        "Rescale factors",
        caption,
        Drawing(factors_figure(scaling.geometry, windows, shown, further, real)),
        (tables.factors(scaling.geometry, windows, shown, further),),
        folded=True,
    )


def closed_forms(scaling: RopeScaling) -> dict[str, Window]:
    """The windows of FACTORS_SHOWN for the target length of `scaling`."""
    target = scaling.target_length
    return {name: closed_form_method(name, scaling.geometry, target).window(target) for name in FACTORS_SHOWN}


def _further_windows(scaling: RopeScaling, label: str) -> dict[str, Window]:
    """The windows before the last that are not all ones."""
    return {
        f"{label}, ≤ {count(window.max_length)} tokens": window
        for window in scaling.windows[:-1]
        if any(factor != 1.0 for factor in window.factors)
    }


def loss_unit(run: Run) -> str:
    """The unit of a search's loss."""
    needle = run.trace is not None and run.trace.header.get("objective") == "needle"
    return "nats per answer token of the search texts" if needle else "nats per token of the search texts"


def _search(run: Run, shown: Shown) -> Exhibit | None:
    trace = run.trace
    if trace is None or not trace.series:
        return None
    above, baselines = outside(trace)
    hidden = [f"{count(above)} evaluations"] * bool(above)
    hidden += [f"{shown[name].label} ({trace.baselines[name]:.2f})" for name in baselines if name in shown]
    caption = (
        f"Best loss so far at {count(trace.target_length)} tokens, {loss_unit(run)}, against the cost. A token pass "
        "is one token sent forward; a backward counts two. The large dot is the result; the baselines were scored on "
        "the same texts."
    )
    other = len(trace.series) > 1
    if other:
        caption += " Validation texts, and shorter windows, have other losses: they do not compare with the lines."
    if hidden:
        caption += f" Above the frame: {listed(hidden)}."
    numbers = [tables.baselines(trace, shown, shown[OWN]), tables.improvements(trace, other)]
    choices = run.scaling.provenance.get("critical_dims") if run.scaling is not None else None
    if isinstance(choices, dict) and choices.get("losses"):
        numbers.insert(1, tables.critical_dims(choices["losses"]))
    return Exhibit(
        "search", "The search", caption, Drawing(search_figure({OWN: trace}, shown)), tuple(numbers), folded=True
    )


def _perplexity(run: Run, shown: Shown) -> Exhibit | None:
    rows = run.of("perplexity", "perplexity")
    if not rows:
        return None
    caption = f"Perplexity of held-out texts by context length, {_trials(rows)}, bars and ±: one standard error."
    if any(row.losses for row in rows):
        caption += " It is the error over texts. Methods are compared text by text: a smaller difference can be real."
    return Exhibit(
        "perplexity",
        "Perplexity by length",
        caption,
        Drawing(perplexity_figure(rows, shown, run.original_length)),
        (tables.by_length(rows, shown, f"Perplexity ± one standard error. {BEST_NOTE}", tables.shown_perplexity),),
    )


def _position(run: Run, shown: Shown) -> Exhibit | None:
    rows = [row for row in run.rows if row.metric == "nll"]
    if not rows:
        return None
    lengths = sorted({row.length for row in rows}, reverse=True)
    longest = [row for row in rows if row.length == lengths[0]]
    caption = (
        f"Mean loss by position in texts of {count(lengths[0])} tokens, {_trials(longest)}, bars: one standard error. "
        "A line that goes on falling beyond the original window makes use of far context; one that rises is lost there."
    )
    return Exhibit(
        "position",
        "Loss by position",
        caption,
        Drawing(position_figure(longest, shown, run.original_length)),
        tuple(tables.positions(rows, shown, length) for length in lengths),
        folded=True,
    )


def _passkey(run: Run, shown: Shown) -> Exhibit | None:
    rows = run.of("passkey", "accuracy")
    if not rows:
        return None
    caption = (
        f"Passkeys of five digits given back exactly, {_trials(rows)} at each length; bars and ranges: 95 % intervals."
    )
    return Exhibit(
        "passkey",
        "Passkey retrieval",
        caption,
        Drawing(accuracy_figure(rows, shown, run.original_length)),
        (
            tables.by_length(
                rows, shown, f"Exact answers with 95 % intervals (per cent). {BEST_NOTE}", tables.shown_share
            ),
        ),
    )


def _needle(run: Run, shown: Shown) -> Exhibit | None:
    rows, likely = run.of("needle", "accuracy"), run.of("needle", "answer_logprob")
    if not rows:
        return None
    caption = (
        "Needles found exactly, in per cent, by depth in the text (0 is its start) and context length, "
        f"{_trials(rows)} in each cell."
    )
    numbers = [tables.by_depth(rows, shown, "Exact answers with 95 % intervals (per cent).", tables.shown_share)]
    if likely:
        title = "Log-probability of the answer, nats per token ± one standard error; 0 is certainty."
        numbers.append(tables.by_depth(likely, shown, title, tables.shown_value))
    drawing = Drawing(needle_figure(rows, shown))
    return Exhibit("needle", "Needles by depth and length", caption, drawing, tuple(numbers), folded=True)


def _ruler(run: Run, shown: Shown) -> Exhibit | None:
    scores = run.of("ruler", "score")
    means = [row for row in scores if row.detail.get("task") == "mean"]
    if not means:
        return None
    effective, tasks = run.of("ruler", "effective_length"), [row for row in scores if row not in means]
    absolute = [float(row.detail["threshold"]) for row in effective if row.detail.get("rule") == "absolute"]
    kinds = len({str(row.detail["task"]) for row in tasks})
    caption = (
        f"Mean score of {count(kinds)} RULER task{'s' * (kinds != 1)} by context length, {_trials(means)} at each "
        "length, bars and ±: one standard error."
    )
    numbers = [tables.by_length(means, shown, f"Mean score ± one standard error. {BEST_NOTE}")]
    if effective:
        numbers.append(tables.effective_lengths(effective, shown))
    if tasks:
        numbers.append(tables.by_task(tasks, shown, "Score by task ± one standard error."))
    return Exhibit(
        "ruler",
        "RULER",
        caption,
        Drawing(score_figure(means, shown, run.original_length, absolute[0] if absolute else None)),
        tuple(numbers),
        folded=True,
    )


def _retention(run: Run, shown: Shown) -> Exhibit | None:
    rows = run.of("retention")
    if not rows:
        return None
    caption = "Quality on short texts against the original model."
    return Exhibit("retention", "Short texts", caption, None, (tables.retention(rows, shown),))


def _trials(rows: list[EvalRow]) -> str:
    """The number of trials behind each number, and the mark where they are few."""
    trials = sorted({row.trials for row in rows})
    text = count(trials[0]) if len(trials) == 1 else f"{count(trials[0])} to {count(trials[-1])}"
    return f"{text} trials" + (f" ({MARK} fewer than {FEW_TRIALS})" if trials[0] < FEW_TRIALS else "")
