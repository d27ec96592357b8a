"""The warnings of a report: limits of runtimes, losses, missing measurements, limited evidence.

Every warning follows from the run's files; none is general advice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longrope.evaluation.results import EvalRow
from longrope.evaluation.verdict import Measured, alike, best_by_length, headline_cells
from longrope.report.collect import Run
from longrope.report.numbers import FEW_TRIALS, MARK, count, listed, per_cent
from longrope.report.styles import Shown
from longrope.report.summary import method_of, original_row
from longrope.report.tables import shown_value
from longrope.rope.closed_forms import su_attention_factor
from longrope.rope.hf_config import unsupported_by_transformers
from longrope.rope.scaling import RopeScaling
from longrope.search.verdict import ALIKE, search_verdict

SUITES = {
    "perplexity": "perplexity by length",
    "position": "loss by position",
    "passkey": "passkey retrieval",
    "needle": "needles by depth and length",
    "ruler": "RULER's tasks",
    "retention": "short-context quality",
}
"""The measurements of a full report. `position` stands for the rows of metric `nll`."""
_ANSWERS = {
    "passkey": "finds fewer passkeys:",
    "needle": "finds fewer needles:",
    "ruler": "has a lower mean score of RULER:",
}
_LIGHT_DIFFERENCE = 1e-3  # of attention factors


@dataclass(frozen=True, slots=True)
class WarningGroup:
    """Warnings under one heading."""

    heading: str
    items: tuple[str, ...]


def warnings(run: Run, shown: Shown) -> list[WarningGroup]:
    """All warnings of a run; headings without any are left out."""
    lost = [f"The exported checkpoint lost {loss}." for loss in run.extension.losses] if run.extension else []
    groups = [
        WarningGroup("Limits of the runtimes", tuple(_runtimes(run.scaling) if run.scaling else ())),
        WarningGroup("Losses", (*lost, *_worse(run, shown))),
        WarningGroup("Not measured", tuple(_not_measured(run))),
        WarningGroup("Limited evidence", (*_warned(run), *_few(run))),
    ]
    return [group for group in groups if group.items]


def measured(run: Run, suite: str) -> bool:
    """True if `run` has rows of a key of SUITES."""
    if suite == "position":
        return any(row.metric == "nll" for row in run.rows)
    return any(row.suite == suite and row.metric != "nll" for row in run.rows)


def _runtimes(scaling: RopeScaling) -> list[str]:
    original, target = scaling.geometry.original_length, scaling.target_length
    short, long = scaling.windows[0], scaling.windows[-1]
    items = [
        f"transformers, and every runtime that reads its checkpoints, drops {loss}."
        for loss in unsupported_by_transformers(scaling)
    ]
    if any(window.start_tokens for window in scaling.windows):
        items.append("No runtime but longrope itself keeps start tokens at their original angles.")
    default = su_attention_factor(scaling.geometry, target)
    if abs(long.attention_factor - default) > _LIGHT_DIFFERENCE:
        items.append(
            f"MLX and ExLlama compute an attention factor of {default:.4g} from the lengths whatever the checkpoint "
            f"says; this scaling has {long.attention_factor:.4g}. vLLM and SGLang need its short_mscale and "
            "long_mscale, which longrope export writes."
        )
    if short.factors != long.factors:
        items.append(
            f"The factors change beyond {count(short.max_length)} tokens. vLLM and llama.cpp choose one set for a "
            "whole engine or context, ExLlama when it loads, and MLX always takes the long ones: short texts then run "
            "on the long factors. transformers chooses for each forward pass, and its generate keeps keys that were "
            "cached under the short factors when a text grows past them (all classes but Phi-3)."
        )
    if target / original > 1 and short.attention_factor != 1.0:
        items.append(
            f"Texts of up to {count(short.max_length)} tokens also get the attention factor "
            f"{short.attention_factor:.4g}, so they are not exactly what the original model makes of them."
        )
    return items


def _worse(run: Run, shown: Shown) -> list[str]:
    """The lengths at which the run's own scaling is worse than the original model, or than another method.

    A difference within its standard error, by which the verdict calls two methods alike, is said to be one.
    """
    own_name, rows = method_of(run), run.of("perplexity", "perplexity")
    items = []
    trace = run.trace
    if trace is not None and trace.result is not None and trace.best_baseline is not None:
        name, loss = trace.best_baseline
        gain = search_verdict(trace.result, trace.baselines).gain
        if gain is None or gain <= ALIKE:
            items.append(
                f"The search gained nothing over {shown[name].label} on its own texts: {trace.result:.4f} nats per "
                f"token, {shown[name].label} {loss:.4f}."
            )
    beaten = []
    for own in (row for row in rows if row.scaling == own_name):
        better = [row for row in rows if row.length == own.length and row.scaling != own_name and row.value < own.value]
        better.sort(key=lambda row: row.value)
        original = original_row(run, rows, own.length)
        if run.original_length is not None and own.length <= run.original_length and original in better:
            within = ", which is within the standard error of the difference" if _within_error(own, original) else ""
            items.append(
                f"At {count(own.length)} tokens, inside the original window, perplexity is "
                f"{per_cent(own.value, original.value)} against the original model "
                f"({shown_value(own)} and {shown_value(original)}){within}."
            )
            better.remove(original)
        beaten += [_lower(own, better, shown)] if better else []
    return [*items, *_lost_answers(run, shown, own_name), *beaten]


def _lower(own: EvalRow, better: Sequence[EvalRow], shown: Shown) -> str:
    """The methods with a lower perplexity than `own`, and apart those whose difference is within its standard error."""

    def names(within: bool) -> str:
        rows = [row for row in better if _within_error(own, row) == within]
        return listed([f"{shown[row.scaling].label} ({shown_value(row)})" for row in rows]) if rows else ""

    lower, alike_names = names(within=False), names(within=True)
    says = f"At {count(own.length)} tokens perplexity is lower with {lower or alike_names}"
    if not lower:
        return f"{says}, which is within the standard error of the difference: no difference was shown."
    return (
        f"{says}; within the standard error of the difference also with {alike_names}." if alike_names else f"{says}."
    )


def _within_error(first: EvalRow, second: EvalRow) -> bool:
    return alike(Measured.of(first), Measured.of(second))


def _lost_answers(run: Run, shown: Shown, own_name: str) -> list[str]:
    """The lengths at which another method finds more passkeys or needles than the run's own scaling, or scores higher,
    by more than the standard error of the difference.
    """
    items = []
    for suite, says in _ANSWERS.items():
        cells = headline_cells(run.rows, suite)
        for length, ranking in best_by_length(cells, suite).items():
            own = cells.get(own_name, {}).get(length)
            if own is None or own_name in ranking.winners:
                continue
            value = f"{own.value:.1f}" if suite == "ruler" else f"{100 * own.value:.0f} %"
            best = f"{ranking.value:.1f}" if suite == "ruler" else f"{100 * ranking.value:.0f} %"
            name, other = shown[own_name].label, shown[ranking.best].label
            items.append(f"At {count(length)} tokens {name} {says} {value}, with {other} {best}.")
    searched = run.scaling.provenance.get("objective") if run.scaling is not None else None
    if items and searched == "perplexity":
        items.append("The search was driven by perplexity, which does not ask for answers; --objective needle does.")
    return items


def _not_measured(run: Run) -> list[str]:
    missing = [name for suite, name in SUITES.items() if not measured(run, suite)]
    items = [f"{listed(missing)[0].upper()}{listed(missing)[1:]}."] if missing else []
    for longest, suites in _reached(run).items():
        items.append(f"Beyond {count(longest)} tokens: {listed(suites)}.")
    if run.scaling is not None and run.extension is None:
        items.append("The logits of an exported checkpoint.")
    return items


def _reached(run: Run) -> dict[int, list[str]]:
    """Longest length measured -> the suites that go no further, where the scaling does."""
    reached: dict[int, list[str]] = {}
    target = run.scaling.target_length if run.scaling is not None else 0
    for suite in ("perplexity", "passkey", "needle", "ruler"):
        longest = max((row.length for row in run.of(suite)), default=target)
        if longest < target:
            reached.setdefault(longest, []).append(SUITES[suite])
    return reached


def _few(run: Run) -> list[str]:
    trials: dict[str, list[int]] = {}
    for row in run.rows:
        if row.trials < FEW_TRIALS and row.metric != "effective_length":
            trials.setdefault("position" if row.metric == "nll" else row.suite, []).append(row.trials)
    parts = [
        f"{SUITES.get(suite, suite)} ({min(found)}{f' to {max(found)}' if max(found) > min(found) else ''})"
        for suite, found in trials.items()
    ]
    if not parts:
        return []
    return [f"Numbers marked {MARK} come from fewer than {FEW_TRIALS} trials: {listed(parts)}."]


def _warned(run: Run) -> list[str]:
    """The warnings that evaluations recorded, such as documents that the search or training has seen."""
    return [
        f"{file}: {str(warning).rstrip('.')}."
        for file, evaluation in run.evaluations.items()
        for warning in evaluation.settings.get("warnings") or ()
    ]


def comparability(runs: Sequence[Run]) -> list[str]:
    """The reasons why numbers of several runs may not compare."""
    settings = [evaluation.settings for run in runs for evaluation in run.evaluations.values()]
    items = []
    if len({str(one["model_fingerprint"]) for one in settings if "model_fingerprint" in one}) > 1:
        items.append("The runs were measured on different models.")
    if different := _different_samples(settings):
        items.append(f"The runs were measured on different texts: {listed(different)}. Their numbers do not compare.")
    searched = {str(run.trace.header.get("objective")) for run in runs if run.trace is not None}
    if len(searched) > 1:
        items.append(f"Search losses do not compare: the objectives differ ({listed(sorted(searched))}).")
    return items


def _different_samples(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Suites whose samples differ somewhere: `samples_sha256` maps suite, task and length to a hash."""
    hashes: dict[str, set[str]] = {}
    for one in settings:
        samples = one.get("samples_sha256")
        for key, digest in samples.items() if isinstance(samples, dict) else ():
            hashes.setdefault(str(key), set()).add(str(digest))
    return list(dict.fromkeys(key.partition(" ")[0] for key, digests in hashes.items() if len(digests) > 1))
