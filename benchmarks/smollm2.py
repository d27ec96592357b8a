"""SmolLM2-135M-Instruct, which somebody else trained, from 8,192 to 16,384 tokens: searches, comparison, figure.

    python benchmarks/smollm2.py commands --books held-out/      # what `run` does, in order
    python benchmarks/smollm2.py run --books held-out/           # hours on a CPU; goes on where it was stopped
    python benchmarks/smollm2.py run --books held-out/ --more    # then needles as the objective, fine-tuning, 32k
    python benchmarks/smollm2.py tables                          # benchmarks/results/smollm2.{json,md}, the figure
    python benchmarks/smollm2.py page --books held-out/          # text after 12,288 tokens, with and without a scaling

`--books` is a folder of books as .txt that no search has seen; each is one text of 16,384 tokens. Every command is one
of the command line, and leaves its result in `--output` (runs/smollm2) at once.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from longrope.data.sources import read_all
from longrope.evaluation.results import EvalResults, EvalRow, mean_and_stderr
from longrope.models.config import LoadOptions
from longrope.models.generation.generate import generate
from longrope.models.loading import open_model
from longrope.provenance import record
from longrope.rope.scaling import RopeScaling
from longrope.storage import write_json_atomic

HERE = Path(__file__).resolve().parent
FETCH = HERE.parent / "scripts/smollm2.py"
FIGURE = HERE.parent / "docs/images/smollm2.png"
LENGTH = "16k"
SEARCHES = {
    "gradient": "--method gradient --steps 4 --no-continuation",
    "evolution": "--method longrope --population 16 --iterations 3",
}
FINETUNING = (
    "--length 16k --mix pieces:0.3,long:0.7 --steps 20 --batch 1 --warmup 2 --learning-rate 1e-5 --save-every 2 --bf16 "
    "--attn-implementation blocked --data book:an-american-tragedy --data book:les-miserables"
)
LOAD = "--dtype bfloat16 --attn-implementation blocked"
CLOSED_FORMS = "none,yarn,ntk,ntk-critical,pi"
NAMES = {
    "none": "no scaling",
    "pi": "PI",
    "ntk": "NTK-aware",
    "ntk-critical": "NTK by critical dimension",
    "yarn": "YaRN",
    "evolution": "LongRoPE's evolution",
    "gradient": "longrope, gradient",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = {
    "none": "#000000",
    "pi": "#CC79A7",
    "ntk": "#E69F00",
    "ntk-critical": "#56B4E9",
    "yarn": "#0072B2",
    "evolution": "#D55E00",
    "gradient": "#009E73",
}


@dataclass(frozen=True)
class Stage:
    """One command of longrope and the file that it ends with."""

    end: Path
    words: list[str]
    started: Path  # what a stopped run has left, from which --resume goes on


def searched(model: str, out: Path, name: str, length: str, options: str) -> Stage:
    """A search on one text of the shipped book."""
    texts = f"--target-length {length} --samples 1 --data book:an-american-tragedy"
    words = ["search", model, *shlex.split(f"{texts} {options} {LOAD}"), "-o", str(out / name)]
    return Stage(out / name / "scaling.json", words, out / name)


def compared(model: str, books: Path, out: Path, name: str, length: str, *options: str) -> Stage:
    """Perplexity at `length` and inside the trained window, on a text of each book."""
    end = out / f"perplexity-{name}.json"
    texts = ["--samples", str(len(list(books.glob("*.txt")))), "--data", str(books)]
    words = ["eval", model, "--lengths", f"{length},8k", *texts, *options, *LOAD.split(), "-o", str(end)]
    return Stage(end, words, end.with_suffix(".cells.jsonl"))


def stages(model: str, books: Path, out: Path) -> Iterator[Stage]:
    """All commands in order: each search, then its comparison on a text of each book; needles last."""
    for name, options in SEARCHES.items():
        yield searched(model, out, name, LENGTH, options)
        against = ["--against", CLOSED_FORMS] if name == "gradient" else []
        yield compared(model, books, out, name, LENGTH, "--scaling", str(out / name / "scaling.json"), *against)
    end = out / "needles.json"
    words = ["eval", model, *f"--suite needle --trials 2 --depths 5 --needles 5 --lengths {LENGTH},8k".split()]
    words += ["--data", str(books), "--scaling", str(out / "gradient/scaling.json")]
    words += ["--against", "none,yarn", *LOAD.split(), "-o", str(end)]
    yield Stage(end, words, end.with_suffix(".cells.jsonl"))


def more_stages(model: str, books: Path, out: Path) -> Iterator[Stage]:
    """The stages for a faster machine or a night: a search by needles, a short fine-tuning, four times the window."""
    gradient, trained = SEARCHES["gradient"], out / "trained"
    yield searched(model, out, "gradient-needle", LENGTH, f"--objective needle {gradient}")
    scaling = ["--scaling", str(out / "gradient-needle/scaling.json")]
    yield compared(model, books, out, "gradient-needle", LENGTH, *scaling)
    words = ["finetune", model, "--scaling", str(out / "gradient/scaling.json"), *FINETUNING.split()]
    yield Stage(trained / "checkpoint/config.json", [*words, "-o", str(trained)], trained)
    yield compared(str(trained), books, out, "trained", LENGTH)
    yield searched(model, out, "gradient-32k", "32k", gradient)
    scaling = ["--scaling", str(out / "gradient-32k/scaling.json"), "--against", CLOSED_FORMS]
    yield compared(model, books, out, "gradient-32k", "32k", *scaling)


def run(model: str, books: Path, out: Path, *, more: bool = False) -> None:
    """Every stage whose result is not there."""
    out.mkdir(parents=True, exist_ok=True)
    for stage in [*stages(model, books, out), *(more_stages(model, books, out) if more else ())]:
        if not stage.end.exists():
            resume = ["--resume"] if stage.started.exists() else []
            command = [sys.executable, "-m", "longrope", *stage.words, *resume]
            print(shlex.join(["longrope", *command[3:]]), flush=True)
            subprocess.run(command, check=True)


@dataclass
class Measured:
    """The perplexities of one method by length, and its losses by (length, from, to)."""

    by_length: dict[int, EvalRow] = field(default_factory=dict)
    by_position: dict[tuple[int, int, int], EvalRow] = field(default_factory=dict)


def read_perplexities(out: Path) -> tuple[dict[str, Measured], dict[str, Any]]:
    """method -> what was measured of it, and the provenance of the comparison with the closed forms."""
    found: dict[str, Measured] = {}
    provenance: dict[str, Any] = {}
    for searched in (name for name in SEARCHES if (out / f"perplexity-{name}.json").exists()):
        results = EvalResults.load(out / f"perplexity-{searched}.json")
        provenance[searched] = results.provenance
        for row in results.rows:
            own = found.setdefault(row.scaling if row.scaling in CLOSED_FORMS.split(",") else searched, Measured())
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


def perplexity_table(found: Mapping[str, Measured], length: int, original: int) -> list[str]:
    """Lines of Markdown: a row for each method."""
    lines = [
        f"| | {original:,} tokens | {length:,} tokens | of these the last {length - original:,} | to YaRN, nats |",
        "|---|---|---|---|---|",
    ]
    for name in (name for name in NAMES if name in found):
        own = found[name]
        last, whole = own.by_position[length, original, length], own.by_length[length]
        cells = [f"{row.value:.2f} ± {row.stderr or 0.0:.2f}" for row in (own.by_length[original], whole)]
        cells.append(f"{math.exp(last.value):.2f} ± {math.exp(last.value) * (last.stderr or 0.0):.2f}")
        cells.append(against(whole, found["yarn"].by_length[length]))
        lines.append(f"| {' | '.join([NAMES[name], *cells])} |")
    return lines


def needle_table(path: Path) -> list[str]:
    """Lines of Markdown: needles found and the log-probability of a token of the answer, by method and length."""
    rows = json.loads(path.read_text())["results"]
    methods = list(dict.fromkeys(row["scaling"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    heads = [f"{length:,}: {what}" for length in lengths for what in ("found", "log p of the answer")]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for method in methods:
        cells = []
        for length in lengths:
            here = [row for row in rows if (row["scaling"], row["length"]) == (method, length)]
            hits = [row["value"] for row in here if row["metric"] == "accuracy" and "depth" in row["detail"]]
            logs = [row["value"] for row in here if row["metric"] == "answer_logprob" and "depth" in row["detail"]]
            cells += [f"{100 * statistics.fmean(hits):.0f} %", f"{statistics.fmean(logs):.2f}".replace("-", "−")]
        lines.append(f"| {' | '.join([NAMES.get(method, NAMES['gradient']), *cells])} |")
    return lines


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
    lines = perplexity_table(found, length, original)
    if (out / "needles.json").exists():
        lines += ["", *needle_table(out / "needles.json")]
    scalings = {name: RopeScaling.load(out / name / "scaling.json") for name in COLORS if (out / name).is_dir()}
    result = {
        "provenance": provenance,
        "rows": {
            name: [row.to_json() for row in (*own.by_length.values(), *own.by_position.values())]
            for name, own in found.items()
        },
        "scalings": {name: json.loads(scaling.to_json()) for name, scaling in scalings.items()},
    }
    write_json_atomic(HERE / "results/smollm2.json", result)
    (HERE / "results/smollm2.md").write_text("\n".join(lines) + "\n")
    figure(found, length, original)
    print("\n".join(lines))


def page(model: str, books: Path, out: Path, tokens: int = 12288, count: int = 200) -> None:
    """Text after `tokens` tokens of the first book, without a scaling and with the gradient's: the same prompt, seed,
    temperature and nucleus."""
    loaded = open_model(model, None, LoadOptions(dtype="bfloat16", attn_implementation="blocked"))
    document = read_all([sorted(books.glob("*.txt"))[0]])[0]
    middle = len(document.text) // 2
    ids = loaded.tokenizer(document.text[middle : middle + 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    geometry = loaded.geometry
    scalings = {
        "none": RopeScaling.single(geometry, 2 * geometry.original_length, [1.0] * geometry.pairs),
        "gradient": RopeScaling.load(out / "gradient/scaling.json"),
    }
    pages = {}
    for name, scaling in scalings.items():
        text = generate(
            loaded.model, ids, scaling, max_new_tokens=count, do_sample=True, temperature=0.7, top_p=0.9, seed=0
        )
        pages[name] = loaded.tokenizer.decode(text[0, tokens:], skip_special_tokens=True)
        print(f"--- {name}\n{pages[name]}\n", flush=True)
    end = loaded.tokenizer.decode(ids[0, -60:])
    result = {"document": document.name, "prompt_tokens": tokens, "prompt_end": end, "pages": pages}
    write_json_atomic(HERE / "results/smollm2_page.json", result | record())


def main() -> None:
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["commands", "run", "tables", "page"])
    parser.add_argument("--books", type=Path, help="a folder of books as .txt")
    parser.add_argument("--more", action="store_true", help="with run: the stages that need a faster machine, too")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/smollm2"))
    given = parser.parse_args()
    if given.what == "tables":
        tables(given.output)
        return
    if given.books is None or not list(given.books.glob("*.txt")):
        parser.error("expected --books with a folder of .txt files")
    model = subprocess.run([sys.executable, str(FETCH)], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    if given.what == "commands":
        name = "SmolLM2-135M-Instruct.gguf"
        more = more_stages(name, given.books, given.output) if given.more else ()
        for stage in [*stages(name, given.books, given.output), *more]:
            print(shlex.join(["longrope", *stage.words]))
    elif given.what == "run":
        run(model, given.books, given.output, more=given.more)
    else:
        page(model, given.books, given.output)


if __name__ == "__main__":
    main()
