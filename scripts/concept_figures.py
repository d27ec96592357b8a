"""Draw the figure of the README and docs/concepts.md: periods and rescale factors of Llama-3-8B's rotary pairs.

    python scripts/concept_figures.py

It computes closed forms and reads the published LongRoPE2 table; no model is loaded.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import longrope as lr

OUT = Path(__file__).parents[1] / "docs/images/concepts.png"
GEOMETRY = lr.RopeGeometry(rotary_dim=128, base=500_000, original_length=8192)
TARGET = 131_072


def main() -> None:
    """Write the figure: two panels side by side."""
    pair, critical = np.arange(GEOMETRY.pairs), GEOMETRY.critical_dim()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=150, layout="constrained")
    left.semilogy(pair, GEOMETRY.periods, color="#1f5fbf", lw=2)
    for length, name in ((GEOMETRY.original_length, "L = 8,192"), (TARGET, "L' = 131,072")):
        left.axhline(length, color="#888", lw=1, ls="--")
        left.annotate(name, (0, length), xytext=(2, 3), textcoords="offset points", fontsize=9, color="#444")
    left.set(title="Period of every rotary pair", xlabel="rotary pair, fastest first", ylabel="tokens per turn")
    left.annotate("turned fully\nin training", (critical * 0.45, 12), ha="center", fontsize=9)
    left.annotate("never finished\na turn in training", (critical + 14, 12), ha="center", fontsize=9)

    published = lr.preset("longrope2_llama3_8b_128k").windows[-1].factors
    curves = {
        "PI": lr.pi(GEOMETRY, TARGET).windows[-1].factors,
        "NTK-aware": lr.ntk(GEOMETRY, TARGET).windows[-1].factors,
        "YaRN": lr.yarn(GEOMETRY, TARGET).windows[-1].factors,
        "LongRoPE2, published": published,
    }
    for (name, factors), style in zip(curves.items(), ("#999", "#e08a00", "#2a9d5c", "#c2185b"), strict=True):
        right.plot(pair, factors, label=name, color=style, lw=2 if name != "PI" else 1.2)
    right.set(title="Rescale factor λ of every pair, 16×", xlabel="rotary pair", ylabel="λ", ylim=(0, 27))
    right.legend(frameon=False, fontsize=9, loc="upper left")
    for axes in (left, right):
        axes.axvline(critical, color="#c2185b", lw=1, ls=":")
        axes.spines[["top", "right"]].set_visible(False)
    right.annotate(
        "critical dimension", (critical, 0.6), xytext=(4, 0), textcoords="offset points", fontsize=9, color="#c2185b"
    )
    figure.savefig(OUT, metadata={"Software": None})


if __name__ == "__main__":
    main()
