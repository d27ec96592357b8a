"""Every search method on the embedded model, side by side: loss, held-out perplexity, held-out retrieval, and cost.

    python benchmarks/search_methods.py --out runs/methods                    # 8×, about half an hour on 2 cores
    python benchmarks/search_methods.py --out runs/methods --only "gradient;gradient-needle"

It writes one run folder per method, `results.json` with versions and command, and `results.md`, the table. Not a test:
nothing depends on the times.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from longrope.data.needles import draw_needles
from longrope.data.sources import read_all
from longrope.data.tokens import tokenize
from longrope.evaluation.contenders import Contender, closed_form_contender
from longrope.evaluation.perplexity import perplexity
from longrope.models.install import Installed, install, uninstall
from longrope.models.scoring import last_logits
from longrope.pipeline.options import SearchOptions
from longrope.pipeline.search import search
from longrope.pipeline.subject import Subject, open_model, prepare_samples, sources_or_books
from longrope.provenance import record
from longrope.rope.scaling import RopeScaling, Window

TRIALS = 100
RUNS = {
    "longrope, m = 1": SearchOptions(attention_factor="1", population=64, iterations=8, samples=4),
    "longrope": SearchOptions(population=64, iterations=8, samples=4),
    "gradient, m = 1": SearchOptions(method="gradient", attention_factor="1", samples=4),
    "gradient": SearchOptions(method="gradient", samples=4),
    "gradient, one jump": SearchOptions(method="gradient", samples=4, continuation=False),
    "gradient, every pair": SearchOptions(method="gradient", samples=4, knots=0),
    "gradient, m learnt": SearchOptions(method="gradient", samples=4, learn_attention_factor=True),
    "gradient-needle": SearchOptions(method="gradient", objective="needle", samples=6),
    "gradient-needle, one jump": SearchOptions(method="gradient", objective="needle", samples=6, continuation=False),
    "gradient-needle, m learnt": SearchOptions(
        method="gradient", objective="needle", samples=6, learn_attention_factor=True
    ),
    "longrope2": SearchOptions(method="longrope2", population=32, iterations=4, samples=6),
}
CLOSED_FORMS = ("none", "pi", "ntk", "ntk-critical", "yarn")


def retrieval(subject: Subject, installed: Installed, window: Window, sources: list[str], seed: int) -> float:
    """Share of held-out needle prompts of the window's length whose answer is greedily completed without an error."""
    documents = tokenize(read_all(sources), subject.tokenizer)
    samples = draw_needles(documents, subject.tokenizer, length=window.max_length, count=TRIALS, seed=seed, digits=5)
    hits = 0
    with installed.using(window), torch.inference_mode():
        for row, answer in zip(samples.ids, samples.answer_tokens, strict=True):
            predicted = last_logits(installed.model, row[None, :-1], answer).argmax(-1)[0]
            hits += bool((predicted == row[-answer:]).all())
    return hits / TRIALS


def measure(subject: Subject, target: int, windows: dict[str, Window], seed: int) -> dict[str, dict[str, Any]]:
    """Held-out perplexity at L and L', and retrieval at L', of each named window."""
    length = subject.geometry.original_length
    sources = sources_or_books(subject.name, [], "evaluation")
    samples = prepare_samples(subject, read_all(sources), length=target, count=20, seed=seed)
    installed = install(subject.model, RopeScaling.original(subject.geometry))
    found = {}
    for name, window in windows.items():
        m = window.attention_factor
        short = Window(length, (1.0,) * subject.geometry.pairs, 0, m) if name not in CLOSED_FORMS else window

        def choose(n: int, short: Window = short, window: Window = window) -> Window:
            return short if n <= length else window

        rows = perplexity(installed, samples, [length, target], Contender(name, choose))
        found[name] = {
            "attention_factor": m,
            "perplexity": {row.length: [row.value, row.stderr] for row in rows},
            "retrieval": retrieval(subject, installed, window, sources, seed),
        }
    uninstall(subject.model)
    return found


def table(results: dict[str, dict[str, Any]], length: int, target: int) -> str:
    lines = [
        f"| factors | m | loss on the search samples | token passes | seconds | perplexity at {length} | "
        f"perplexity at {target} | retrieval at {target} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        short, long = (row["perplexity"][str(n)] for n in (length, target))
        search_loss = f"{row['loss']:.4f} ({row['objective']})" if "loss" in row else "–"
        passes = f"{row['token_passes']:,}" if "loss" in row else "–"
        seconds = f"{row['seconds']:.0f}" if "loss" in row else "–"
        stderr = math.sqrt(row["retrieval"] * (1 - row["retrieval"]) / TRIALS)
        lines.append(
            f"| {name} | {row['attention_factor']:.3g} | {search_loss} | {passes} | {seconds} "
            f"| {short[0]:.1f} ± {short[1]:.1f} | {long[0]:.1f} ± {long[1]:.1f} "
            f"| {100 * row['retrieval']:.0f} ± {100 * stderr:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--target-length", type=int, default=2048)
    parser.add_argument("--only", default="", help="names of runs, separated by semicolons")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    subject = open_model(args.model)
    target, length = args.target_length, subject.geometry.original_length
    wanted = [name.strip() for name in args.only.split(";")] if args.only else list(RUNS)
    windows = {name: closed_form_contender(name, subject.geometry, target).window(target) for name in CLOSED_FORMS}
    costs: dict[str, dict[str, Any]] = {}
    for name in wanted:
        began = time.time()
        done = search(subject, target, [], args.out / name.replace(" ", "-").replace(",", ""), RUNS[name])
        windows[name] = done.scaling.windows[-1]
        costs[name] = {
            "loss": done.best_loss,
            "objective": done.objective,
            "token_passes": done.token_passes,
            "evaluations": done.evaluations,
            "critical_dim": done.critical_dim,
            "seconds": time.time() - began,
        }
        print(f"{name}: {json.dumps(costs[name])}", flush=True)
    measured = measure(subject, target, windows, seed=1)
    results = json.loads(json.dumps({name: costs.get(name, {}) | row for name, row in measured.items()}))
    report = {"results": results, "threads": torch.get_num_threads(), "target_length": target, **record()}
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "results.md").write_text(table(results, length, target))
    print(table(results, length, target))


if __name__ == "__main__":
    main()
