"""Stage b: SmolLM2-135M-Instruct from its window of 8,192 tokens to 65,536, on books that no search has seen.

Gradient searches by perplexity and by needles, then perplexity and needles by length of both and of the closed forms.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ledger import Ledger

import longrope as lr
from longrope.models.loading import LoadedModel, open_model

SEARCH_BOOK = "book:an-american-tragedy"
HELD_OUT = ["book:les-miserables", "book:the-diary-of-samuel-pepys"]
BASELINES = ("none", "pi", "ntk", "ntk-critical", "dynamic-ntk", "yarn")
OBJECTIVES = ("perplexity", "needle")
STEPS, SAMPLES, HELD_OUT_SAMPLES = 8, 2, 3
NEEDLES, FEW_NEEDLES = {"trials": 6, "depths": 5}, {"trials": 1, "depths": 2}


def search(loaded: LoadedModel, objective: str, target: int, folder: Path, small: bool) -> dict[str, Any]:
    config = lr.SearchConfig(
        method="gradient", objective=objective, steps=2 if small else STEPS, samples=1 if small else SAMPLES
    )
    found = lr.search_scaling(
        loaded, target_length=target, data=SEARCH_BOOK, config=config, output_dir=folder, resume=True
    )
    kept = ("best_loss", "baselines", "evaluations", "token_passes", "chosen_seeds")
    return {name: found.provenance[name] for name in kept if name in found.provenance} | {
        "factors": list(found.windows[-1].factors),
        "attention_factor": found.windows[-1].attention_factor,
    }


def run(arguments: argparse.Namespace, seconds: float) -> None:
    ledger = Ledger(arguments, "smollm2", seconds)
    model = "tiny" if arguments.small else arguments.model
    dtype = "float32" if arguments.small else "bfloat16"
    loaded = open_model(model, options=lr.LoadOptions(device=arguments.device, dtype=dtype))
    original = loaded.geometry.original_length
    target = (4 if arguments.small else 8) * original
    lengths = [length for length in (original, 2 * original, 4 * original, 8 * original) if length <= target]
    found: dict[str, Path] = {}
    for objective in OBJECTIVES:
        folder = arguments.output / "searches" / objective

        def searched(objective: str = objective, folder: Path = folder) -> dict[str, Any]:
            return search(loaded, objective, target, folder, arguments.small)

        if ledger.measure(f"search by {objective}", searched) is not None and (folder / "scaling.json").is_file():
            found[objective] = folder / "scaling.json"
    for length in lengths:
        for suite in ("perplexity", "needle"):
            # One method at a time, so that what was measured is kept whatever comes next.
            for method in (*found, *BASELINES):

                def evaluated(length: int = length, suite: str = suite, method: str = method) -> dict[str, Any]:
                    if suite == "perplexity":
                        config = lr.EvalConfig(samples=1 if arguments.small else HELD_OUT_SAMPLES)
                    else:
                        config = lr.EvalConfig(**(FEW_NEEDLES if arguments.small else NEEDLES))
                    done = lr.evaluate(
                        loaded,
                        data=HELD_OUT,
                        lengths=length,
                        suites=suite,
                        scaling=found.get(method),
                        scaling_name=method if method in found else None,
                        baselines=() if method in found else [method],
                        target_length=None if method in found or method == "none" else target,
                        config=config,
                    )
                    rows = [row for row in done.rows if row.scaling == method]
                    if suite == "perplexity":
                        rows = [row for row in rows if row.metric == "perplexity"]
                    return {
                        "results": [
                            {"metric": row.metric, "value": row.value, "stderr": row.stderr, "trials": row.trials}
                            | row.detail
                            for row in rows
                        ],
                    }

                ledger.measure(f"{suite} at {length}, {method}", evaluated)
