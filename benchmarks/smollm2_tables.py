"""Tables and the figure of what `smollm2.py` has left: benchmarks/results/smollm2.{json,md}, docs/images/smollm2.png.

python benchmarks/smollm2_tables.py --runs runs/smollm2
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from longrope.evaluation.results import EvalResults, EvalRow, mean_and_stderr
from longrope.rope.scaling import RopeScaling
from longrope.storage import write_json_atomic

HERE = Path(__file__).resolve().parent
FIGURE = HERE.parent / "docs/images/smollm2.png"
CLOSED_FORMS = ("none", "pi", "ntk", "ntk-critical", "yarn")
RUNS = ("gradient", "gradient-fixed", "evolution", "gradient-needle", "trained")
"""The files of perplexities at 16,384 tokens, by the method that is no closed form; `gradient-fixed` is of commit
`ff069aa`, whose searches began at fixed starts."""
RUNS_32K = ("closed-32k", "ramp-32k", "gradient-32k")
"""Those at 32,768 tokens."""
NAMES = {
    "none": "no scaling",
    "pi": "PI",
    "ntk": "NTK-aware",
    "ntk-critical": "NTK by critical dimension",
    "yarn": "YaRN",
    "evolution": "LongRoPE's evolution",
    "ramp": "longrope, the start of its search",
    "gradient": "longrope, gradient",
    "gradient-fixed": "longrope, gradient from fixed starts",
    "gradient-needle": "longrope, gradient by needles",
    "trained": "gradient, then 10 steps of fine-tuning",
}
# Of the methods in the figure: Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = {
    "none": "#000000",
    "pi": "#CC79A7",
    "ntk": "#E69F00",
    "ntk-critical": "#56B4E9",
    "yarn": "#0072B2",
    "evolution": "#D55E00",
    "gradient": "#009E73",
}


@dataclass
class Measured:
    """The perplexities of one method by length, and its losses by (length, from, to)."""

    by_length: dict[int, EvalRow] = field(default_factory=dict)
    by_position: dict[tuple[int, int, int], EvalRow] = field(default_factory=dict)


def read_perplexities(out: Path, runs: tuple[str, ...] = RUNS) -> tuple[dict[str, Measured], dict[str, Any]]:
    """method -> what was measured of it, and run -> the provenance of the file."""
    found: dict[str, Measured] = {}
    provenance: dict[str, Any] = {}
    for run in runs:
        if not (out / f"perplexity-{run}.json").exists():
            continue
        results = EvalResults.load(out / f"perplexity-{run}.json")
        provenance[run] = results.provenance
        for row in results.rows:
            own = found.setdefault(row.scaling if row.scaling in CLOSED_FORMS else run.removesuffix("-32k"), Measured())
            if row.metric == "perplexity":
                own.by_length[row.length] = row
            else:
                own.by_position[row.length, row.detail["from"], row.detail["to"]] = row
    return found, provenance


def against(row: EvalRow, other: EvalRow) -> str:
    """The mean difference to another method on the same texts in nats, ± its standard error."""
    ours, theirs = row.losses or {}, other.losses or {}
    if row == other or ours.keys() != theirs.keys():
        return "–"
    mean, error = mean_and_stderr([ours[text] - theirs[text] for text in ours])
    return f"{mean:+.4f} ± {error:.4f}".replace("-", "−")


def plus_minus(row: EvalRow, *, exponential: bool = False) -> str:
    """Mean ± standard error, of a mean loss as perplexity with `exponential`."""
    value, error = row.value, row.stderr or 0.0
    if exponential:
        value, error = math.exp(value), math.exp(value) * error
    return f"{value:.2f} ± {error:.2f}"


def perplexity_table(found: Mapping[str, Measured], length: int, shorter: tuple[int, ...] = ()) -> list[str]:
    """Lines of Markdown: a row for each method that was measured at `length`; of its text the second half, too."""
    heads = [*(f"{short:,} tokens" for short in shorter), f"{length:,} tokens"]
    heads += [f"of these the last {length // 2:,}", "to YaRN, nats"]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in (name for name in NAMES if name in found and length in found[name].by_length):
        own = found[name]
        cells = [plus_minus(own.by_length[one]) for one in (*shorter, length)]
        cells.append(plus_minus(own.by_position[length, length // 2, length], exponential=True))
        cells.append(against(own.by_length[length], found["yarn"].by_length[length]))
        lines.append(f"| {' | '.join([NAMES[name], *cells])} |")
    return lines


def retrieval_table(
    out: Path, suite: str, ends: tuple[str, ...] = ("", "-gradient-fixed", "-gradient-needle")
) -> list[str]:
    """Lines of Markdown: what was found of the `suite`, and the log-probability of a token of the answer where it was
    taken, by method and length; none where nothing was measured."""
    rows: dict[str, list[EvalRow]] = {}
    for end in ends:
        run = end.removeprefix("-").removesuffix("-32k") or "gradient"
        if not (file := out / f"{suite}{end}.json").exists():
            continue
        for row in EvalResults.load(file).rows:
            if suite != "needles" or "depth" in row.detail:
                rows.setdefault(row.scaling if row.scaling in CLOSED_FORMS else run, []).append(row)
    if not rows:
        return []
    every = [row for own in rows.values() for row in own]
    columns = [
        (length, metric)
        for length in sorted({row.length for row in every})
        for metric in ("accuracy", "answer_logprob")
        if any(row.metric == metric for row in every)
    ]
    heads = [f"{length:,}: {'found' if metric == 'accuracy' else 'log p of the answer'}" for length, metric in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for method in (name for name in NAMES if name in rows):
        cells = []
        for column in columns:
            value = statistics.fmean(row.value for row in rows[method] if (row.length, row.metric) == column)
            shown = f"{100 * value:.0f} %" if column[1] == "accuracy" else f"{value:.2f}"
            cells.append(shown.replace("-", "−"))
        lines.append(f"| {' | '.join([NAMES[method], *cells])} |")
    return lines


def rows_of(found: Mapping[str, Measured]) -> dict[str, list[dict[str, Any]]]:
    """method -> all its rows, for JSON."""
    return {
        name: [row.to_json() for row in (*own.by_length.values(), *own.by_position.values())]
        for name, own in found.items()
    }


def figure(found: Mapping[str, Measured], length: int, original: int) -> None:
    """Perplexity by position in texts of `length` tokens, and the difference to YaRN on each text."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    shown, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), gridspec_kw={"width_ratios": [1.3, 1]})
    for name, color in COLORS.items():
        if name not in found:
            continue
        places = sorted(place for place in found[name].by_position if place[0] == length and place[1] >= 128)
        losses = [found[name].by_position[place].value for place in places]
        middles = [math.sqrt(begin * end) for _, begin, end in places]
        left.plot(middles, [math.exp(loss) for loss in losses], marker="o", markersize=3, color=color,
                  linewidth=2 if name == "gradient" else 1.2, label=NAMES[name])  # fmt: skip
    left.axvline(original, color="#999999", linewidth=1, linestyle=":")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_ylim(20, 200)
    left.text(original * 0.95, 21, "trained window", ha="right", color="#666666")
    ticks = [2**power for power in range(8, 15)]
    left.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    left.set_yticks([20, 30, 50, 100, 200], ["20", "30", "50", "100", "200"])
    left.yaxis.set_minor_formatter("")
    left.set_xlabel("position in the text, tokens")
    left.set_title("perplexity by position", loc="left")
    left.grid(alpha=0.25, linewidth=0.5)
    left.legend(frameon=False, loc="upper left", fontsize=8)
    yarn = found["yarn"].by_length[length].losses or {}
    close = [name for name in COLORS if name in found and name not in ("none", "pi", "yarn")]
    for row, name in enumerate(close):
        losses_of = found[name].by_length[length].losses or {}
        apart = [losses_of[text] - loss for text, loss in yarn.items()]
        right.plot(apart, [row] * len(apart), "o", markersize=5, alpha=0.6, color=COLORS[name], markeredgewidth=0)
        right.plot([sum(apart) / len(apart)] * 2, [row - 0.25, row + 0.25], color=COLORS[name], linewidth=2)
    right.axvline(0, color=COLORS["yarn"], linewidth=1.2)
    right.set_yticks(range(len(close)), [NAMES[name] for name in close])
    right.set_ylim(-0.6, len(close) - 0.4)
    right.set_xlabel(f"nats per token, {len(yarn)} texts of {length:,} tokens and their mean")
    right.set_title("difference to YaRN (lower is better)", loc="left")
    right.grid(alpha=0.25, linewidth=0.5, axis="x")
    shown.tight_layout()
    shown.savefig(FIGURE, dpi=130)


def tables(out: Path) -> None:
    """Write the JSON, the Markdown and the figure of what `run` has left in `out`."""
    length, original = 16384, 8192
    found, provenance = read_perplexities(out)
    longer, provenance_32k = read_perplexities(out, RUNS_32K)
    parts = [perplexity_table(found, length, (original,))]
    parts += [retrieval_table(out, suite) for suite in ("needles", "passkeys")]
    parts += [perplexity_table(longer, 2 * length, (2048, original))] if longer else []
    parts += [retrieval_table(out, "passkeys", ("-ramp-32k",))]
    lines = "\n\n".join("\n".join(part) for part in parts if part).splitlines()
    searches = (name for name in (*RUNS, *RUNS_32K) if (out / name / "scaling.json").exists())
    scalings = {name: RopeScaling.load(out / name / "scaling.json") for name in searches}
    result = {
        "provenance": provenance | provenance_32k,
        "rows": rows_of(found),
        "rows_32k": rows_of(longer),
        "scalings": {name: json.loads(scaling.to_json()) for name, scaling in scalings.items()},
    }
    write_json_atomic(HERE / "results/smollm2.json", result)
    (HERE / "results/smollm2.md").write_text("\n".join(lines) + "\n")
    figure(found, length, original)
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"), help="the --output of smollm2.py")
    tables(parser.parse_args().runs)
