"""The headline of a run: a few numbers, each with its uncertainty and the number to compare it with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from longrope.evaluation.results import EvalRow
from longrope.evaluation.verdict import headline_cells
from longrope.evaluation.verdict import verdict as evaluation_verdict
from longrope.report.collect import Run
from longrope.report.numbers import Cell, amount, count, per_cent, share, with_error
from longrope.report.styles import OWN, Shown
from longrope.report.tables import Show, shown_share, shown_value
from longrope.rope.baselines import CHECKPOINT, ORIGINAL
from longrope.search.verdict import search_verdict


@dataclass(frozen=True, slots=True)
class Number:
    """One number of the headline: its label, its value, and the numbers to compare it with."""

    label: str
    value: Cell
    note: str


def headline(run: Run, shown: Shown) -> list[Number]:
    """The numbers of `run` that were measured, the most telling first."""
    own_name = method_of(run)
    found = [
        _perplexity(run, shown, own_name),
        _price(run, own_name),
        _passkey(run, shown, own_name),
        _needle(run, shown, own_name),
        _ruler(run, shown, own_name),
        _agreement(run, own_name),
        _search_loss(run, shown),
        _cost(run),
        _proof(run),
    ]
    return [number for number in found if number is not None]


def verdict(run: Run, shown: Shown) -> list[str]:
    """The verdict in a few sentences: the best method of every suite at its longest length, and the difference to the
    original model; where nothing was measured, the search against its best baseline.
    """
    labels = {name: method.label for name, method in shown.items()}
    own, found, others = method_of(run), [], []
    for suite in ("perplexity", "passkey", "needle", "ruler"):
        lines = evaluation_verdict(headline_cells(run.rows, suite), suite, own, labels)
        found += lines if suite == "perplexity" else []
        others += [] if suite == "perplexity" else lines[:1]
    found += [" ".join(others)] if others else []
    if not found and run.trace is not None and run.trace.result is not None:
        said = str(search_verdict(run.trace.result, run.trace.baselines))
        found = [f"On the texts of the search: {said}. Nothing was measured on other texts."]
    return found


def method_of(run: Run) -> str:
    """The method that a run is about: its own scaling, else the checkpoint as it is, the last one of its results."""
    names = list(dict.fromkeys(row.scaling for row in run.rows))
    extended = [name for name in names if name != ORIGINAL] or names  # suites on short texts put the original first
    return OWN if OWN in names or not names else extended[-1]


def original_row(run: Run, rows: Sequence[EvalRow], length: int) -> EvalRow | None:
    """The row of the model as it was, at `length`: `original`, the scaling it came with, or no scaling at all."""
    by_name = {row.scaling: row for row in rows if row.length == length and row.scaling != method_of(run)}
    return next((by_name[name] for name in (ORIGINAL, CHECKPOINT, "none") if name in by_name), None)


def pooled(rows: Sequence[EvalRow]) -> tuple[float, int]:
    """(share, trials) of several accuracies together."""
    trials = sum(row.trials for row in rows)
    return sum(row.value * row.trials for row in rows) / trials if trials else math.nan, trials


def _perplexity(run: Run, shown: Shown, own_name: str) -> Number | None:
    rows = run.of("perplexity", "perplexity")
    own = _longest(rows, own_name)
    if own is None:
        return None
    others = [row for row in rows if row.length == own.length and row.scaling != own_name]
    notes = []
    if others:
        best = min(others, key=lambda row: (math.isnan(row.value), row.value))
        notes = [f"best of the others: {shown[best.scaling].label} {shown_value(best)}"]
        unscaled = next((row for row in others if row.scaling == "none"), None)
        notes += [f"no scaling: {shown_value(unscaled)}"] if unscaled is not None and unscaled is not best else []
    return Number(f"perplexity at {count(own.length)} tokens", shown_value(own), "; ".join(notes))


def _price(run: Run, own_name: str) -> Number | None:
    """The change in perplexity inside the original window."""
    measured = [run.of(suite, "perplexity") for suite in ("retention", "perplexity")]
    rows = max(measured, key=lambda rows: max((row.trials for row in rows), default=0))
    length = run.original_length or min((row.length for row in rows), default=0)
    own = next((row for row in rows if row.scaling == own_name and row.length == length), None)
    original = original_row(run, rows, length)
    if own is None or original is None or not math.isfinite(own.value / original.value):
        return None
    few = shown_value(own).few
    note = f"perplexity {shown_value(own)}; the original model has {shown_value(original)}"
    label = f"change inside the original window, {count(length)} tokens"
    return Number(label, Cell(per_cent(own.value, original.value), few=few), note)


def _passkey(run: Run, shown: Shown, own_name: str) -> Number | None:
    rows = run.of("passkey", "accuracy")
    own = _longest(rows, own_name)
    if own is None:
        return None
    note = _best_other([row for row in rows if row.length == own.length], own_name, shown)
    return Number(f"passkeys found at {count(own.length)} tokens", share(own.value, own.trials), note)


def _needle(run: Run, shown: Shown, own_name: str) -> Number | None:
    rows = run.of("needle", "accuracy")
    longest = _longest(rows, own_name)
    if longest is None:
        return None
    cells = {
        name: [row for row in rows if row.length == longest.length and row.scaling == name]
        for name in dict.fromkeys(row.scaling for row in rows)
    }
    shares = {name: pooled(group) for name, group in cells.items() if group}
    others = {name: found for name, found in shares.items() if name != own_name}
    note = f"{count(shares[own_name][1])} trials over all depths"
    if others:
        best = max(others, key=lambda name: others[name][0])
        note += f"; best of the others: {shown[best].label} {share(*others[best])}"
    return Number(f"needles found at {count(longest.length)} tokens", share(*shares[own_name]), note)


def _ruler(run: Run, shown: Shown, own_name: str) -> Number | None:
    rows = [row for row in run.of("ruler", "score") if row.detail.get("task") == "mean"]
    own = _longest(rows, own_name)
    if own is None:
        return None
    effective = [row for row in run.of("ruler", "effective_length") if row.scaling == own_name]
    notes = [
        f"effective length, {row.detail.get('rule')}: {count(round(row.value)) if row.value else 'none'}"
        for row in effective
    ]
    notes += [_best_other([row for row in rows if row.length == own.length], own_name, shown, shown_value)]
    value = with_error(own.value, own.stderr, own.trials)
    return Number(f"RULER's mean score at {count(own.length)} tokens", value, "; ".join(filter(None, notes)))


def _agreement(run: Run, own_name: str) -> Number | None:
    row = next((row for row in run.of("retention", "top1_agreement") if row.scaling == own_name), None)
    if row is None:
        return None
    stderr = None if row.stderr is None else 100 * row.stderr
    value = with_error(100 * row.value, stderr, row.trials, " %")
    return Number(f"same next token as the original, {count(row.length)} tokens", value, f"{count(row.trials)} texts")


def _search_loss(run: Run, shown: Shown) -> Number | None:
    """The loss on the search texts, only where nothing was measured on others: the result was chosen on these."""
    if run.trace is None or run.trace.result is None or run.rows:
        return None
    baseline = run.trace.best_baseline
    note = f"best of the others: {shown[baseline[0]].label} {baseline[1]:.4f}" if baseline is not None else ""
    label = f"loss on the search texts at {count(run.trace.target_length)} tokens"
    return Number(label, Cell(f"{run.trace.result:.4f}"), note)


def _cost(run: Run) -> Number | None:
    if run.trace is None:
        return None
    texts = f"{count(run.trace.evaluations)} evaluations; a forward counts once per token, a backward twice"
    if not run.trace.counted:
        return Number("cost of the search", Cell(count(run.trace.evaluations)), "evaluations")
    return Number("token passes of the search", Cell(amount(run.trace.token_passes)), texts)


def _proof(run: Run) -> Number | None:
    if run.extension is None or not run.extension.proofs:
        return None
    proofs = run.extension.proofs
    agreement = Cell(f"{100 * min(proof.top1_agreement for proof in proofs):.5g} %")
    worst = max(proofs, key=lambda proof: proof.divergence or 0.0)
    if worst.divergence is not None:  # a runtime that rounds: how far the distributions are apart says more
        without = "" if worst.divergence_without is None else f"; {worst.divergence_without:.2g} without the factors"
        note = f"Kullback-Leibler divergence{without}; same next token {agreement.text} of the time"
        return Number(f"{worst.runtime} from the searched model, nats", Cell(f"{worst.divergence:.2g}"), note)
    largest = max(proof.max_logit_difference for proof in proofs)
    runtime = "plain transformers" if proofs[0].runtime == "transformers" else proofs[0].runtime
    note = f"reloaded with {runtime}; logits differ by at most {largest:.1e}"
    return Number("same next token in the exported checkpoint", agreement, note)


def _longest(rows: Sequence[EvalRow], name: str) -> EvalRow | None:
    return max((row for row in rows if row.scaling == name), key=lambda row: row.length, default=None)


def _best_other(rows: Sequence[EvalRow], own_name: str, shown: Shown, show: Show = shown_share) -> str:
    others = [row for row in rows if row.scaling != own_name and math.isfinite(row.value)]
    if not others:
        return ""
    best = max(others, key=lambda row: row.value)
    return f"best of the others: {shown[best.scaling].label} {show(best)}"
