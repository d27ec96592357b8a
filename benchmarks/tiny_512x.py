"""Tables and the figure of docs/results.md, from evaluation files of the runs that it names.

    python benchmarks/tiny_512x.py LABEL=eval.json … --out benchmarks/results/tiny_512x.json \\
        --figure docs/images/tiny-512x.png

Every file is one that `longrope eval` or the evaluate stage of a recipe wrote; a label stands before the names of the
scalings in it. Perplexity by length and what was retrieved are drawn for scalings that were measured at four lengths or
more. `--out` gets every row used; the tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from longrope.evaluation.results import EvalResults, EvalRow
from longrope.units import format_length

METRICS = {
    ("perplexity", "perplexity"): "Perplexity",
    ("passkey", "accuracy"): "Passkeys found, %",
    ("needle", "accuracy"): "Needles found, %",
}


def rows_of(argument: str) -> list[tuple[str, EvalRow]]:
    """`label scaling` and the row, for whole texts and all depths."""
    label, _, path = argument.partition("=")
    found = EvalResults.load(Path(path)).rows
    kept = [row for row in found if (row.suite, row.metric) in METRICS and "from" not in row.detail]
    return [(f"{label}, {row.scaling}" if label else row.scaling, row) for row in over_depths(kept)]


def over_depths(rows: list[EvalRow]) -> list[EvalRow]:
    """The rows, those of one needle suite at all depths as one."""
    needles: dict[tuple[str, int], list[EvalRow]] = {}
    for row in rows:
        if row.suite == "needle":
            needles.setdefault((row.scaling, row.length), []).append(row)
    together = [row for row in rows if row.suite != "needle"]
    for group in needles.values():
        trials = sum(row.trials for row in group)
        value = sum(row.value * row.trials for row in group) / trials
        error = math.sqrt(value * (1 - value) / trials)
        together.append(replace(group[0], value=value, stderr=error, trials=trials, detail={}))
    return together


def table(rows: list[tuple[str, EvalRow]], suite: str) -> list[str]:
    """Markdown: a line for each name, a column for each length."""
    own = [(name, row) for name, row in rows if row.suite == suite]
    lengths = sorted({row.length for _, row in own})
    cells = {(name, row.length): row for name, row in own}
    percent = 100 if suite != "perplexity" else 1
    lines = ["| | " + " | ".join(map(format_length, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name in dict.fromkeys(name for name, _ in own):
        shown = []
        for length in lengths:
            row = cells.get((name, length))
            shown.append("" if row is None else f"{percent * row.value:.1f} ± {percent * (row.stderr or 0):.1f}")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def draw(rows: list[tuple[str, EvalRow]], path: Path) -> None:
    suites = [suite for suite, _ in METRICS if any(row.suite == suite for _, row in rows)]
    figure, axes = plt.subplots(1, len(suites), figsize=(5 * len(suites), 4), squeeze=False)
    for axis, suite in zip(axes[0], suites, strict=True):
        for name in dict.fromkeys(name for name, _ in rows):
            own = sorted(
                (row.length, row.value, row.stderr or 0) for n, row in rows if n == name and row.suite == suite
            )
            if len(own) < 4:
                continue
            percent = 100 if suite != "perplexity" else 1
            lengths, values, errors = zip(*own, strict=True)
            axis.errorbar(
                lengths, [percent * v for v in values], [percent * e for e in errors], marker="o", capsize=2, label=name
            )
        axis.set_xscale("log", base=2)
        ticks = sorted({row.length for _, row in rows if row.suite == suite})
        axis.set_xticks(ticks, [format_length(length) for length in ticks], rotation=45)
        axis.set_title(next(title for (name, _), title in METRICS.items() if name == suite))
        axis.set_xlabel("tokens")
        axis.set_ylim(bottom=0, top=None if suite == "perplexity" else 103)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="LABEL=FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    rows = [entry for argument in args.files for entry in rows_of(argument)]
    for (suite, _), title in METRICS.items():
        if any(row.suite == suite for _, row in rows):
            print(f"**{title}**\n", *table(rows, suite), "", sep="\n")
    kept = [{"name": name, **asdict(row)} for name, row in rows]
    args.out.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    if args.figure is not None:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
