"""Ship the run of `recipes/tiny-512x.yaml` as the built-in model `tiny-512x`: its weights, windows and a card.

    python scripts/ship_tiny_512x.py --run runs/tiny-512x --out src/longrope/assets/tiny-512x

The scaling lies beside the config: no config can state so many windows, and `longrope` reads it from there. The card's
numbers are those of the run's own evaluation stages.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

from longrope.evaluation.results import EvalRow, load_evaluation
from longrope.lengths import format_length
from longrope.rope.scaling import RopeScaling

SUITES = {"perplexity": ("perplexity", 1), "passkey": ("accuracy", 100), "needle": ("accuracy", 100)}


def cell(rows: list[EvalRow], suite: str, length: int) -> str:
    metric, percent = SUITES[suite]
    own = [r for r in rows if (r.suite, r.metric, r.length, r.scaling) == (suite, metric, length, "longrope")]
    own = [row for row in own if "from" not in row.detail]
    if not own:
        return "–"
    if len(own) == 1:
        return f"{percent * own[0].value:.1f} ± {percent * (own[0].stderr or 0):.1f}"
    trials = sum(row.trials for row in own)  # a needle suite's rows are depths
    value = sum(row.value * row.trials for row in own) / trials
    return f"{percent * value:.1f} ± {percent * math.sqrt(value * (1 - value) / trials):.1f}"


def card(run: Path, scaling: RopeScaling) -> str:
    rows = [row for file in sorted(run.glob("*-evaluate/eval.json")) for row in load_evaluation(file).rows]
    lengths = sorted({row.length for row in rows})
    identity = json.loads((run / "recipe.json").read_text("utf-8"))
    seconds = sum(json.loads(file.read_text("utf-8"))["seconds"] for file in run.glob("*/stage.json"))
    table = "\n".join(
        f"| {format_length(length)} | " + " | ".join(cell(rows, suite, length) for suite in SUITES) + " |"
        for length in lengths
    )
    windows = ", ".join(format_length(window.max_length) for window in scaling.windows)
    return f"""---
library_name: longrope
license: apache-2.0
language: en
---
# The embedded model at 512 times its window

[The embedded model](../tiny/README.md) (1.7 million parameters, 256 tokens), taken to {scaling.target_length:,} tokens
by `{identity["command"]}`: searches to 8k and 16k, fine-tuning at both, second
searches to 32k, 64k and 128k without training, recovery of short windows. All stages took {seconds / 60:.0f} minutes
on two cores of an x86-64 CPU, shared with other work (torch {identity["versions"]["torch"]}, transformers
{identity["versions"]["transformers"]}). It is a test bed, not a model to talk to.

`scaling.json` beside the config holds {len(scaling.windows)} windows ({windows}); texts take the smallest that is long
enough. `config.json` is still that of the original RoPE: open it with longrope, as in
`longrope eval tiny-512x --suite passkey --lengths 512,4k,16k`.

Measured on books that neither search nor training has seen (passkeys in the suite's repeated sentences), ± the standard
error:

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
    scaling = RopeScaling.load(args.run / "scaling.json")
    weights = sorted(args.run.glob("*-finetune-*"))[-1] / "checkpoint"
    args.out.mkdir(parents=True, exist_ok=True)
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copyfile(weights / name, args.out / name)
        (args.out / name).chmod(0o644)  # safetensors writes 0600, which a wheel would carry
    scaling.save(args.out / "scaling.json")
    (args.out / "README.md").write_text(card(args.run, scaling), "utf-8")
    print(card(args.run, scaling))


if __name__ == "__main__":
    main()
