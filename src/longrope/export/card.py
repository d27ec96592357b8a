"""The model card of an export: what was done, how, the evidence, the limits, and how to serve it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longrope.evaluation.results import EvalRow
from longrope.export.forms import PHI3, UNIFIED, Expression
from longrope.export.notes import notes_on
from longrope.export.serve import Serving
from longrope.export.verify import Verification
from longrope.lengths import format_length
from longrope.provenance import command_line, versions
from longrope.rope.scaling import RopeScaling


def model_card(
    model_name: str,
    config_class: str,
    scaling: RopeScaling,
    expression: Expression,
    verification: Verification,
    losses: Sequence[str],
    evidence: Sequence[EvalRow],
    servings: Sequence[Serving],
) -> str:
    """Markdown with a Hugging Face front matter. `servings` name the folder PATH, and the model by its public name."""
    title = public_name(model_name)
    geometry, target = scaling.geometry, scaling.target_length
    original = geometry.original_length
    windows = "\n".join(
        f"| ≤ {window.max_length} | {window.factors[0]:g} … {window.factors[-1]:g} | {window.start_tokens} "
        f"| {window.attention_factor:g} |"
        for window in scaling.windows
    )
    base = f"base_model: {model_name}\n" if model_name == title and "/" in title else ""
    limits = "\n".join(f"- {note}" for note in notes_on(expression))
    sections = "\n\n".join(_section(serving) for serving in servings)
    lost = "\n".join(f"- {loss}" for loss in losses) or "- Nothing: transformers expresses this scaling exactly."
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"""---
library_name: transformers
{base}tags:
- longrope
- long-context
---
# {title} with a context window of {format_length(target)} tokens

The rotary position embedding of `{title}` ({config_class}) was rescaled from {original} to {target} tokens
({target / original:g}×) with [longrope](https://arxiv.org/abs/2402.13753). {_weights(expression)}

| sequence length | rescale factors λ (first … last pair) | start tokens | attention factor |
|---|---|---|---|
{windows}

Rotary dimension {geometry.rotary_dim}, base {geometry.base:g}. All numbers and their provenance: `scaling.json`.

## How
Method: {scaling.provenance.get("method", "not recorded")}. Command: `{command_line()}`. Versions: {used}.

## Evidence
{_evidence(evidence, expression)}
Reloaded with plain transformers and compared with this scaling installed in the source's weights: largest relative
frequency error {verification.max_frequency_error:.1e}, largest logit difference
{verification.max_logit_error_short:.1e} inside and {verification.max_logit_error_long:.1e} beyond the first window.

## Limits and what was lost
{lost}
{limits}

## Serve
{sections}
"""


def public_name(model_name: str) -> str:
    """A hub name as it is; a folder's own name, not where it lay on one disk."""
    return Path(model_name).resolve().name if Path(model_name).exists() else model_name


def _weights(expression: Expression) -> str:
    text = "The weights are the source's, byte for byte"
    if expression.form == PHI3:
        text = (
            "The weights are the source's, bit for bit, stacked as Phi-3 has them (`qkv_proj`, `gate_up_proj`): the "
            "same function in the class that most runtimes give LongRoPE"
        )
    return f"{text}." if expression.query_scale == 1.0 else f"{text}, except those of the queries (see the limits)."


def _section(serving: Serving) -> str:
    commands = "\n".join(serving.commands)
    block = f"```\n{commands}\n```\n" if commands else "Not possible.\n"
    return f"**{serving.runtime}**\n{block}" + "\n".join(f"- {note}" for note in serving.notes)


def _evidence(rows: Sequence[EvalRow], expression: Expression) -> str:
    groups: dict[tuple[str, str], list[EvalRow]] = {}
    for row in rows:
        if row.detail in ({}, {"task": "mean"}):  # not the parts of a number
            groups.setdefault((row.suite, row.metric), []).append(row)
    if not groups:
        return "Nothing was measured with this export. `longrope eval` does.\n"
    text = "".join(_table(", ".join(dict.fromkeys(group)), measured) for group, measured in groups.items())
    if expression.form == UNIFIED:
        text += f"Measured with both regimes: up to {expression.switch} tokens it does not hold for this folder.\n"
    return text


def _table(title: str, rows: Sequence[EvalRow]) -> str:
    lengths = sorted({row.length for row in rows})
    names = list(dict.fromkeys(row.scaling for row in rows))
    trials = max(row.trials for row in rows)
    cells = {(row.scaling, row.length): row for row in rows}
    text = f"{title.capitalize()}, by length in tokens ({trials} trials, ± the standard error over them):\n\n"
    text += "| scaling | " + " | ".join(map(str, lengths)) + " |\n|---|" + "---|" * len(lengths) + "\n"
    for name in names:
        values = [_cell(cells.get((name, length))) for length in lengths]
        text += f"| {name} | " + " | ".join(values) + " |\n"
    return text + "\n"


def _cell(row: EvalRow | None) -> str:
    if row is None:
        return "–"
    digits = 2 if row.value >= 2 else 3  # shares and accuracies are at most 1
    return f"{row.value:.{digits}f}" + (f" ± {row.stderr:.{digits}f}" if row.stderr is not None else "")
