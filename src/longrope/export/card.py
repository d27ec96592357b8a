"""The model card of an export: what was done, how, the evidence, the limits, and how to serve it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longrope.evaluation.results import EvalRow
from longrope.export.verify import Verification
from longrope.lengths import format_length
from longrope.provenance import command_line, versions
from longrope.rope.scaling import RopeScaling


def model_card(
    model_name: str,
    config_class: str,
    scaling: RopeScaling,
    verification: Verification,
    losses: Sequence[str],
    evidence: Sequence[EvalRow],
) -> str:
    """Markdown with a Hugging Face front matter."""
    title = model_name if not Path(model_name).exists() else Path(model_name).name  # not where it lay on one disk
    geometry, target = scaling.geometry, scaling.target_length
    original = geometry.original_length
    windows = "\n".join(
        f"| ≤ {window.max_length} | {window.factors[0]:g} … {window.factors[-1]:g} | {window.start_tokens} "
        f"| {window.attention_factor:g} |"
        for window in scaling.windows
    )
    lost = "\n".join(f"- {loss}" for loss in losses) or "- Nothing: transformers expresses this scaling exactly."
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    method = scaling.provenance.get("method", "not recorded")
    return f"""---
library_name: transformers
tags:
- longrope
- long-context
---
# {title} with a context window of {format_length(target)} tokens

The rotary position embedding of `{title}` ({config_class}) was rescaled from {original} to {target} tokens
({target / original:g}×) with [longrope](https://arxiv.org/abs/2402.13753). The weights are the source's, byte for byte.

| sequence length | rescale factors λ (first … last pair) | start tokens | attention factor |
|---|---|---|---|
{windows}

Rotary dimension {geometry.rotary_dim}, base {geometry.base:g}. All numbers and their provenance: `scaling.json`.

## How
Method: {method}. Command: `{command_line()}`. Versions: {used}.

## Evidence
{_evidence(evidence)}
Reloaded with plain transformers and compared with this scaling installed in the same weights: largest relative
frequency error {verification.max_frequency_error:.1e}, largest logit difference
{verification.max_logit_error_short:.1e} inside and {verification.max_logit_error_long:.1e} beyond the first window.

## Limits and what was lost
{lost}
- transformers chooses the factors by the longest position of a forward pass: a short text batched with a long one
  gets the long factors. `generate` keeps keys cached under the old factors when a text grows past {original} tokens;
  only the Phi-3 classes recompute them. Start with a prompt beyond {original} tokens, or use `use_cache=False` across
  the switch.
- vLLM and llama.cpp choose one set of factors for a whole engine or context, not per text. vLLM ignores
  `attention_factor` and takes `short_mscale` and `long_mscale`, which are written here with the same value.

## Serve
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
`vllm serve PATH --max-model-len {target}` (without `--max-model-len`, vLLM stops at {original}).
"""


def _evidence(rows: Sequence[EvalRow]) -> str:
    if not rows:
        return "Nothing was measured with this export. `longrope eval` does.\n"
    lengths = sorted({row.length for row in rows})
    names = list(dict.fromkeys(row.scaling for row in rows))
    trials = max(row.trials for row in rows)
    cells = {(row.scaling, row.length): row for row in rows}
    head = f"Perplexity on {trials} held-out samples, ± the standard error over them:\n\n"
    table = "| scaling | " + " | ".join(map(str, lengths)) + " |\n|---|" + "---|" * len(lengths) + "\n"
    for name in names:
        values = [_cell(cells.get((name, length))) for length in lengths]
        table += f"| {name} | " + " | ".join(values) + " |\n"
    return head + table + "\n"


def _cell(row: EvalRow | None) -> str:
    if row is None:
        return "–"
    return f"{row.value:.2f}" + (f" ± {row.stderr:.2f}" if row.stderr is not None else "")
