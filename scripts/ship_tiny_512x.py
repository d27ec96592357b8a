"""Ship the run of `recipes/tiny-512x.yaml` as the built-in model `tiny-512x`: its exported checkpoint, and a card.

    python scripts/ship_tiny_512x.py --run runs/tiny-512x --out src/longrope/assets/tiny-512x

The card's numbers are those of the run's own evaluation stages; `training.json` has the settings of every stage, what
it came to, and the hashes of what it read and wrote, of a fine-tuning also that of its rows.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

from longrope.evaluation.results import EvalResults, EvalRow
from longrope.rope.scaling import RopeScaling
from longrope.units import format_length

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SUITES = {"perplexity": ("perplexity", 1), "passkey": ("accuracy", 100), "needle": ("accuracy", 100)}
OWN = "longrope"


def cell(rows: list[EvalRow], suite: str, length: int) -> str:
    """Mean ± standard error, with the number of texts; those of a needle suite's depths together."""
    metric, percent = SUITES[suite]
    own = [row for row in rows if (row.suite, row.metric, row.length) == (suite, metric, length)]
    if not own:
        return "–"
    trials = sum(row.trials for row in own)
    value = sum(row.value * row.trials for row in own) / trials
    error = (own[0].stderr or 0) if len(own) == 1 else math.sqrt(value * (1 - value) / trials)
    return f"{percent * value:.1f} ± {percent * error:.1f} ({trials})"


def measured(run: Path) -> list[EvalRow]:
    """The rows of the run's evaluations about whole texts under its own scaling."""
    rows = [row for file in sorted(run.glob("*-evaluate/eval.json")) for row in EvalResults.load(file).rows]
    return [row for row in rows if row.scaling == OWN and "from" not in row.detail]


def record_of(run: Path) -> dict[str, Any]:
    """The settings of every stage of the run, its result, and the rows that a fine-tuning read."""
    record = json.loads((run / "recipe.json").read_text("utf-8"))
    for name, stage in record["stages"].items():
        stage["result"] = json.loads((run / name / "stage.json").read_text("utf-8"))
        if (summary := run / name / "finetune.json").is_file():
            stage["rows_sha256"] = json.loads(summary.read_text("utf-8"))["identity"]["rows_sha256"]
    return dict(record)


def minutes(record: dict[str, Any], *kinds: str) -> float:
    """The minutes that stages of these kinds took."""
    return sum(float(stage["result"]["seconds"]) for stage in record["stages"].values() if stage["stage"] in kinds) / 60


def card(record: dict[str, Any], scaling: RopeScaling, rows: list[EvalRow]) -> str:
    """The card in Markdown."""
    tuned = [stage for stage in record["stages"].values() if stage["stage"] == "finetune"]
    steps = "; ".join(
        f"{stage['settings']['steps']} steps of {stage['settings']['batch']} rows of "
        f"{format_length(stage['settings']['length'])} up to {format_length(stage['settings']['skip_to'])}"
        for stage in tuned
    )
    making, measuring = minutes(record, "search", "finetune"), minutes(record, "evaluate")
    tokens = sum(count for stage in tuned for count in stage["result"]["tokens"].values())
    (window,) = scaling.windows
    table = "\n".join(
        f"| {format_length(length)} | " + " | ".join(cell(rows, suite, length) for suite in SUITES) + " |"
        for length in sorted({row.length for row in rows})
    )
    return f"""---
library_name: transformers
license: apache-2.0
language: en
---
# The embedded model at 512 times its window

[The embedded model](../tiny/README.md) (1.7 million parameters, 256 tokens), taken to {scaling.target_length:,} tokens
by `recipes/tiny-512x.yaml`: searches and fine-tunings in turn, with rows whose positions skip ahead.
{steps}; {tokens / 1e6:.1f} million tokens.
Searches and training took {making:.0f} minutes on two cores of an x86-64 CPU, the measurements
{measuring:.0f} (torch {record["versions"]["torch"]}, transformers {record["versions"]["transformers"]}).
It is a test bed, not a model to talk to.

It has one window, with one set of factors and the attention factor {window.attention_factor:.4f} at every length, which
`config.json` states: transformers, vLLM and SGLang apply it as it is, and so does
`longrope eval tiny-512x --suite passkey --lengths 512,4k,16k`. `training.json` has every stage's settings and results,
and the hashes of what it read and wrote.

Measured on books that neither search nor training has seen (passkeys in the suite's repeated sentences), ± the standard
error, with the number of texts:

| tokens | perplexity | passkeys found, % | needles found, % |
|---|---|---|---|
{table}

It was trained on statements and questions of the forms that the passkey and needle suites use, with other keys, numbers
and texts (`scripts/retrieval_texts.py`).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    exported = sorted(args.run.glob("*-export"))[-1] / "checkpoint"
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(exported / name, args.out / name)
        (args.out / name).chmod(0o644)  # safetensors writes 0600, which a wheel would carry
    record = record_of(args.run)
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    text = card(record, RopeScaling.load(args.run / "scaling.json"), measured(args.run))
    (args.out / "README.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
