"""Tables and a figure of the cells that `search_cost.py` left.

    python benchmarks/search_cost_tables.py --cells runs/cost/cells \\
        --out benchmarks/results --figure docs/images/search-cost.png

It writes `search_cost.json` (every cell) and `search_cost.md`; `--name` names them otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ORDER = (
    "yarn",
    "released",
    "released, main",
    "longrope",
    "longrope, raced",
    "longrope2",
    "longrope2, raced",
    "cma",
    "cma, every pair",
    "gradient",
    "gradient, one jump",
    "gradient, only continued",
    "hybrid",
    "hybrid, one jump",
)
NAMES = {
    "yarn": "YaRN",
    "released": "released evolution, April 2024",
    "released, main": "released evolution, main branch",
    "longrope": "LongRoPE",
    "longrope2": "LongRoPE2",
    "cma": "CMA-ES",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart; dashes tell variants of one method.
STYLES = {
    "released": ("#000000", "-"),
    "released, main": ("#000000", "--"),
    "longrope": ("#0072B2", "-"),
    "longrope, raced": ("#0072B2", "--"),
    "longrope2": ("#56B4E9", "-"),
    "longrope2, raced": ("#56B4E9", "--"),
    "cma": ("#E69F00", "-"),
    "cma, every pair": ("#E69F00", "--"),
    "gradient": ("#009E73", "-"),
    "gradient, one jump": ("#009E73", "--"),
    "hybrid": ("#D55E00", "-"),
    "hybrid, one jump": ("#D55E00", "--"),
}
Cell = dict[str, Any]


def name_of(method: str) -> str:
    first, _, rest = method.partition(", ")
    return NAMES.get(first, first) + (f", {rest}" if rest else "")


def reached(cell: Cell, goal: float) -> int | None:
    """Token passes until the search loss was at most `goal`; None where it never was."""
    return next((passes for passes, loss in cell["trace"] if loss <= goal), None)


def mean(values: Sequence[float], digits: int) -> str:
    """Mean and, where there are several seeds, the range."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(cells: Sequence[Cell], objective: str, ratio: int) -> list[str]:
    here = [cell for cell in cells if (cell["objective"], cell["ratio"]) == (objective, ratio)]
    released = {cell["seed"]: cell for cell in here if cell["method"] == "released"}
    answers = all("answer_nll" in cell["held_out"] for cell in here)  # cells may be older than that measure
    lines = [
        f"**{objective}, {ratio}×**",
        "",
        "| method | seeds | search loss | token passes | of the released | to its final loss | held-out loss "
        "| retrieval |" + (" answer loss |" if answers else ""),
        "|---|---|---|---|---|---|---|---|" + ("---|" if answers else ""),
    ]
    for method in ORDER:
        own = [cell for cell in here if cell["method"] == method]
        if not own:
            continue
        passes = [cell["token_passes"] for cell in own if "token_passes" in cell]
        shares = [
            released[c["seed"]]["token_passes"] / c["token_passes"] for c in own if passes and c["seed"] in released
        ]
        goals = [
            (released[cell["seed"]]["token_passes"], reached(cell, released[cell["seed"]]["search_loss"]))
            for cell in own
            if passes and cell["seed"] in released
        ]
        met = [whole / spent for whole, spent in goals if spent is not None]
        held = [cell["held_out"] for cell in own]
        compared = bool(goals) and method != "released"
        cells_of_row = [
            name_of(method),
            str(len(own)),
            mean([cell["search_loss"] for cell in own], 4),
            f"{round(statistics.mean(passes)):,}" if passes else "–",
            f"1/{statistics.mean(shares):.0f}" if compared else "–",
            f"{f'1/{statistics.median(met):.0f}' if met else 'never'} ({len(met)} of {len(goals)})"
            if compared
            else "–",
            mean([row["nll"] for row in held], 4),
            f"{mean([100 * row['retrieval'] for row in held], 0)} %",
        ]
        if answers:
            cells_of_row.append(mean([row["answer_nll"] for row in held], 2))
        lines.append(f"| {' | '.join(cells_of_row)} |")
    return [*lines, ""]


def figure(cells: Sequence[Cell], path: Path) -> None:
    """Search loss against token passes; a column for each ratio, a row for each objective."""
    objectives = [name for name in ("perplexity", "needle") if any(cell["objective"] == name for cell in cells)]
    ratios = sorted({cell["ratio"] for cell in cells if cell.get("trace")})
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    shown, axes = plt.subplots(
        len(objectives), len(ratios), figsize=(3.6 * len(ratios), 3.1 * len(objectives)), squeeze=False
    )
    drawn: dict[str, Any] = {}
    for row, objective in enumerate(objectives):
        for column, ratio in enumerate(ratios):
            axis = axes[row][column]
            here = [c for c in cells if (c["objective"], c["ratio"]) == (objective, ratio)]
            seeds = {c["seed"] for c in here if c["method"] in STYLES and c.get("trace")}
            seed = min(seeds, default=0)  # one seed: losses on other samples lie elsewhere
            floor = [c["search_loss"] for c in here if c["method"] == "yarn" and c["seed"] == seed]
            for level in floor:
                drawn.setdefault("YaRN", axis.axhline(level, color="#999999", linewidth=1, linestyle=":"))
            for method in filter(STYLES.get, ORDER):
                for cell in here:
                    if cell["method"] != method or cell["seed"] != seed or not cell.get("trace"):
                        continue
                    color, dashes = STYLES[method]
                    points = [*cell["trace"], [cell["token_passes"], cell["search_loss"]]]
                    (line,) = axis.plot(
                        [p for p, _ in points], [loss for _, loss in points], color=color, linestyle=dashes,
                        linewidth=1.5, drawstyle="steps-post",
                        zorder=3 if method.startswith("gradient") else 2,  # which the hybrid follows, until it goes on
                    )  # fmt: skip
                    axis.plot(*points[-1], marker="o", color=color, markersize=4)
                    drawn.setdefault(name_of(method), line)
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter("")
            axis.set_title(f"{objective}, {ratio}×", loc="left")
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.set_xlabel("token passes" if row == len(objectives) - 1 else "")
            axis.set_ylabel("loss on the search samples, nats" if column == 0 else "")
    shown.legend(drawn.values(), drawn.keys(), loc="lower center", ncol=2 * len(ratios) - 1, frameon=False)
    shown.tight_layout(rect=(0, 0.13, 1, 1))
    shown.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="search_cost")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    cells = [json.loads(path.read_text()) for path in sorted(args.cells.glob("*.json"))]
    lines = []
    for objective in ("perplexity", "needle"):
        for ratio in sorted({cell["ratio"] for cell in cells if cell.get("trace")}):
            lines += table(cells, objective, ratio)
    (args.out / f"{args.name}.md").write_text("\n".join(lines))
    kept = [dict(cell) for cell in cells]
    common = kept[0].get("versions") if kept else None
    for cell in kept:
        for key in ("versions", "command"):
            if cell.get(key) == common or key == "command":
                cell.pop(key, None)
    (args.out / f"{args.name}.json").write_text(json.dumps({"versions": common, "cells": kept}, indent=1) + "\n")
    if args.figure:
        figure(cells, args.figure)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
