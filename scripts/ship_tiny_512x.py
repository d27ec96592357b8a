"""Ship the run of `recipes/tiny-512x.yaml` as the built-in model `tiny-512x`: its weights, windows and a card.

    python scripts/ship_tiny_512x.py --run runs/tiny-512x --out src/longrope/assets/tiny-512x \
        --scaling runs/tiny-512x/07-search-128k/scaling.json \
        --measured runs/tiny-512x/short.json runs/tiny-512x/needles-256.json

The scaling lies beside the config: no config can state so many windows, and `longrope` reads it from there. The card's
numbers are those of the run's own evaluation stages, and where another scaling than the run's last one is shipped and
has another window, those that `--measured` has for it (docs/results.md has the commands).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

from longrope.evaluation.results import EvalResults, EvalRow
from longrope.rope.scaling import RopeScaling
from longrope.units import format_length

SUITES = {"perplexity": ("perplexity", 1), "passkey": ("accuracy", 100), "needle": ("accuracy", 100)}


def cell(rows: list[EvalRow], suite: str, length: int) -> str:
    metric, percent = SUITES[suite]
    own = [row for row in rows if (row.suite, row.metric, row.length) == (suite, metric, length)]
    own = [row for row in own if "from" not in row.detail]
    if not own:
        return "–"
    if len(own) == 1:
        return f"{percent * own[0].value:.1f} ± {percent * (own[0].stderr or 0):.1f}"
    trials = sum(row.trials for row in own)  # a needle suite's rows are depths
    value = sum(row.value * row.trials for row in own) / trials
    return f"{percent * value:.1f} ± {percent * math.sqrt(value * (1 - value) / trials):.1f}"


def rows_of(run: Path, shipped: Path, measured: list[Path]) -> list[EvalRow]:
    """What was measured under the shipped scaling: by the run where its last one has the same window."""
    scaling, last = RopeScaling.load(shipped), RopeScaling.load(run / "scaling.json")
    own = [row for file in sorted(run.glob("*-evaluate/eval.json")) for row in EvalResults.load(file).rows]
    own = [row for row in own if scaling.window_for(row.length) == last.window_for(row.length)]
    more = [row for file in measured for row in EvalResults.load(file).rows if row.scaling == str(shipped)]
    return [row for row in own if row.scaling == "longrope"] + more


def card(run: Path, scaling: RopeScaling, rows: list[EvalRow]) -> str:
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
searches to 32k, 64k and 128k without training. All stages and measurements took {seconds / 60:.0f} minutes
on two cores of an x86-64 CPU, shared with other work (torch {identity["versions"]["torch"]}, transformers
{identity["versions"]["transformers"]}). It is a test bed, not a model to talk to.

`scaling.json` beside the config holds {len(scaling.windows)} windows ({windows}); texts take the smallest that is long
enough. `config.json` is still that of the original RoPE: open it with longrope, as in
`longrope eval tiny-512x --suite passkey --lengths 512,4k,16k`.

Measured on books that neither search nor training has seen (passkeys in the suite's repeated sentences), ± the standard
error; perplexity of 60 texts at 256 and 512 tokens, of 2 texts beyond:

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
    parser.add_argument("--scaling", type=Path, help="another than the run's last one")
    parser.add_argument("--measured", type=Path, nargs="*", default=[], help="evaluations under --scaling")
    args = parser.parse_args()
    shipped = args.scaling or args.run / "scaling.json"
    scaling = RopeScaling.load(shipped)
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
    text = card(args.run, scaling, rows_of(args.run, shipped, args.measured))
    (args.out / "README.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
