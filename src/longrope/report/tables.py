"""The numbers behind every figure, as tables of finished cells. Captions name the measurement and its unit."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from longrope.evaluation.results import EvalRow, shown_measures
from longrope.evaluation.verdict import best_by_length, headline_cells
from longrope.report.numbers import NOTHING, Cell, count, fixed, per_cent, share, with_error
from longrope.report.styles import MethodStyle, Shown
from longrope.report.trace import Trace
from longrope.rope.baselines import ORIGINAL
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from longrope.units import format_length


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a table: its label, its cells, and the tone of its method's colour where it has one."""

    label: str
    cells: tuple[Cell, ...]
    tone: str | None = None
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A caption, column heads (the first is that of the labels) and lines as long as the heads."""

    caption: str
    head: tuple[str, ...]
    lines: tuple[Line, ...]

    def to_csv(self) -> str:
        """The table as comma-separated values (RFC 4180). A column with errors is followed by a column of them.

        Numbers are without separators of thousands, and with `-` for a minus, so that programs can read them.
        """
        with_errors = [any(line.cells[place].error for line in self.lines) for place in range(len(self.head) - 1)]

        def spread(items: Sequence[str], errors: Sequence[str]) -> list[str]:
            pairs = zip(items, errors, with_errors, strict=True)
            return [text for item, error, has in pairs for text in ((item, error) if has else (item,))]

        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\r\n")
        heads = self.head[1:]
        writer.writerow([self.head[0], *spread(heads, [f"{head} error" for head in heads])])
        for line in self.lines:
            values = [_number(cell.text) for cell in line.cells]
            writer.writerow([line.label, *spread(values, [_number(cell.error.strip("± ")) for cell in line.cells])])
        return file.getvalue()

    @property
    def few(self) -> bool:
        """True if a number comes from few trials."""
        return any(cell.few for line in self.lines for cell in line.cells)


Show = Callable[[EvalRow], Cell]


def _number(text: str) -> str:
    """The text of a cell for a program."""
    text = "" if text == NOTHING.text else text.replace("−", "-")
    return text.replace(",", "") if re.fullmatch(r"-?[\d,.]+", text) else text


def shown_value(row: EvalRow) -> Cell:
    """± one standard error."""
    return with_error(row.value, row.stderr, row.trials)


def shown_perplexity(row: EvalRow) -> Cell:
    """± one standard error, with two decimals: methods differ by less than the error, which is between texts."""
    return with_error(row.value, row.stderr, row.trials, decimals=2 if row.value < 10_000 else None)


def shown_share(row: EvalRow) -> Cell:
    """Per cent with the 95 % interval."""
    return share(row.value, row.trials)


def by_length(rows: Sequence[EvalRow], shown: Shown, caption: str, show: Show = shown_value) -> Table:
    """A line per method, a column per length; the best of a column, and those alike, are marked."""
    lengths = sorted({row.length for row in rows})
    winners = _winners(rows)
    cells = {(row.scaling, row.length): replace(show(row), best=(row.scaling, row.length) in winners) for row in rows}
    lines = [_line(one, [cells.get((one.name, length), NOTHING) for length in lengths]) for one in _among(rows, shown)]
    return Table(caption, ("scaling", *map(format_length, lengths)), tuple(lines))


def _winners(rows: Sequence[EvalRow]) -> set[tuple[str, int]]:
    """The best method of every length, and those that cannot be told from it."""
    suite = rows[0].suite
    rankings = best_by_length(headline_cells(rows, suite), suite)
    return {(name, length) for length, ranking in rankings.items() for name in ranking.winners}


def factors(
    geometry: RopeGeometry, windows: Mapping[str, Window], shown: Shown, further: Mapping[str, Window]
) -> Table:
    """A line per rotary pair: its period in tokens and λ under every method."""
    named = [(one.label, windows[name]) for name, one in shown.items() if name in windows]
    columns = [*named, *further.items()]
    lines = [
        Line(str(pair), (Cell(_short(period)), *(Cell(fixed(window.factors[pair], 3)) for _, window in columns)))
        for pair, period in enumerate(geometry.periods.tolist())
    ]
    extra = [Line("attention factor m", (NOTHING, *(Cell(fixed(window.attention_factor, 4)) for _, window in columns)))]
    if any(window.start_tokens for _, window in columns):
        extra.append(Line("start tokens n̂", (NOTHING, *(Cell(str(window.start_tokens)) for _, window in columns))))
    head = ("rotary pair", "period (tokens)", *(name for name, _ in columns))
    return Table("Rescale factor λ by rotary pair.", head, (*lines, *extra))


def baselines(trace: Trace, shown: Shown, own: MethodStyle) -> Table:
    """Losses on the search texts at the target length, the search's result among them, highest first."""
    pairs = [(shown[name], loss) for name, loss in trace.baselines.items() if name in shown]
    pairs += [] if trace.result is None else [(own, trace.result)]
    ordered = sorted(pairs, key=lambda pair: (pair[1] == pair[1], -pair[1]))  # NaN first
    lines = [_line(one, [with_error(loss, None)]) for one, loss in ordered]
    return Table("Loss on the search texts, nats per token.", ("scaling", "loss"), tuple(lines))


def critical_dims(losses: Sequence[Mapping[str, float]]) -> Table:
    """The best candidate of each real critical dimension that was searched, by both objectives (LongRoPE2)."""
    objectives = [name for name in losses[0] if name != "critical_dim"]
    lines = []
    for row in losses:
        cells = (NOTHING if row[name] is None else Cell(f"{row[name]:.4f}") for name in objectives)
        lines.append(Line(str(row["critical_dim"]), tuple(cells)))
    caption = "Loss of the best candidate of each real critical dimension, nats per token, by objective."
    return Table(caption, ("d_rcd", *objectives), tuple(lines))


def improvements(trace: Trace, other: bool) -> Table:
    """The evaluations that were better than all before; with `other` those on other texts or windows as well.

    Losses have four decimals: a line that would repeat the loss above it is left out.
    """
    target = ("search", trace.target_length)
    series = [(key, points) for key, points in trace.series.items() if key != target] if other else []
    lines = []
    for (split, length), points in [*series, (target, trace.improvements)]:
        above = None
        for point in points:
            passes, loss = count(point.token_passes) if trace.counted else "–", f"{point.loss:.4f}"
            cells = (Cell(passes), Cell(f"{split}, {format_length(length)}"), Cell(loss))
            lines += [Line(count(point.evaluations), cells)] if loss != above else []
            above = loss
    caption = f"Every improvement{', and every validation,' if other else ''} that four decimals show."
    return Table(caption, ("evaluation", "token passes", "texts, window", "loss"), tuple(lines))


def positions(rows: Sequence[EvalRow], shown: Shown, length: int) -> Table:
    """A line per bucket of positions, a column per method, at one context length."""
    rows = [row for row in rows if row.length == length]
    buckets = sorted({(int(row.detail["from"]), int(row.detail["to"])) for row in rows})
    present = _among(rows, shown)
    cells = {(row.scaling, int(row.detail["from"]), int(row.detail["to"])): shown_value(row) for row in rows}
    lines = [
        Line(f"{low:,} – {high - 1:,}", tuple(cells.get((one.name, low, high), NOTHING) for one in present))
        for low, high in buckets
    ]
    caption = f"Nats per token by position in texts of {length:,} tokens."
    return Table(caption, ("positions", *(one.label for one in present)), tuple(lines))


def by_depth(rows: Sequence[EvalRow], shown: Shown, caption: str, show: Show) -> Table:
    """A line per method and depth, a column per length."""
    lengths = sorted({row.length for row in rows})
    depths = sorted({float(row.detail["depth"]) for row in rows})
    cells = {(row.scaling, float(row.detail["depth"]), row.length): show(row) for row in rows}
    lines = [
        _line(
            one,
            [cells.get((one.name, depth, length), NOTHING) for length in lengths],
            f"{one.label}, depth {100 * depth:.0f} %",
        )
        for one in _among(rows, shown)
        for depth in depths
    ]
    return Table(caption, ("scaling", *map(format_length, lengths)), tuple(lines))


def by_task(rows: Sequence[EvalRow], shown: Shown, caption: str) -> Table:
    """A line per method and task, a column per length."""
    lengths = sorted({row.length for row in rows})
    tasks = list(dict.fromkeys(str(row.detail["task"]) for row in rows))
    cells = {(row.scaling, str(row.detail["task"]), row.length): shown_value(row) for row in rows}
    lines = [
        _line(one, [cells.get((one.name, task, length), NOTHING) for length in lengths], f"{task}, {one.label}")
        for task in tasks
        for one in _among(rows, shown)
    ]
    return Table(caption, ("task, scaling", *map(format_length, lengths)), tuple(lines))


def effective_lengths(rows: Sequence[EvalRow], shown: Shown) -> Table:
    """The longest length whose mean score passes a threshold, a column per rule and threshold."""
    rules = sorted({(str(row.detail.get("rule")), float(row.detail["threshold"])) for row in rows})
    cells: dict[tuple[str, str, float], float] = {}
    for row in rows:  # of several evaluations, each at its own lengths
        key = row.scaling, str(row.detail.get("rule")), float(row.detail["threshold"])
        cells[key] = max(row.value, cells.get(key, row.value))
    lines = [_line(one, [_tokens(cells.get((one.name, *rule))) for rule in rules]) for one in _among(rows, shown)]
    head = ("scaling", *(f"{rule} (≥ {threshold:g})" for rule, threshold in rules))
    return Table("Effective length in tokens: the longest whose mean score passes the threshold.", head, tuple(lines))


def retention(rows: Sequence[EvalRow], shown: Shown) -> Table:
    """A line per measure, a column per method, and the change against the original model."""
    measures: dict[tuple[str, str, int], dict[str, EvalRow]] = {}
    for row, (task, metric) in zip(rows, shown_measures(rows), strict=True):
        measures.setdefault((task, metric, row.length), {})[row.scaling] = row
    present = _among(rows, shown)
    lines = []
    for (task, metric, length), values in measures.items():
        cells = [_kept(values.get(one.name), values.get(ORIGINAL)) for one in present]
        lines.append(Line(_measure(task, metric, length), tuple(cells)))
    caption = "Short texts, ± one standard error; in parentheses the change against the original model."
    return Table(caption, ("measure", *(one.label for one in present)), tuple(lines))


def _kept(row: EvalRow | None, original: EvalRow | None) -> Cell:
    if row is None:
        return NOTHING
    cell = shown_value(row)
    if original is None or original is row or not original.value or row.metric == "top1_agreement":
        return cell
    return Cell(cell.text, f"{cell.error} ({per_cent(row.value, original.value)})".strip(), cell.few)


def _measure(task: str, metric: str, length: int) -> str:
    if not task and metric == "perplexity":
        return f"perplexity, {format_length(length)} tokens"
    return f"{task}: {metric}" if task else "same most likely token (share)" if metric == "top1_agreement" else metric


def _among(rows: Iterable[EvalRow], shown: Shown) -> list[MethodStyle]:
    names = {row.scaling for row in rows}
    return [one for name, one in shown.items() if name in names]


def _line(one: MethodStyle, cells: Sequence[Cell], label: str | None = None) -> Line:
    return Line(label or one.label, tuple(cells), one.tone, one.own)


def _tokens(value: float | None) -> Cell:
    return NOTHING if value is None else Cell(count(round(value)) if value else "none")


def _short(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else count(round(value))
