"""SmolLM2-135M-Instruct, which somebody else trained, from 8,192 to 16,384 and 32,768 tokens: searches and comparisons.

    python benchmarks/smollm2.py commands --books held-out/      # what `run` does, in order
    python benchmarks/smollm2.py run --books held-out/           # hours on a CPU; goes on where it was stopped
    python benchmarks/smollm2.py run --books held-out/ --more    # then 32k, and CMA-ES after the gradient
    python benchmarks/smollm2.py ramp --books held-out/          # the search to 32k without its gradient steps
    python benchmarks/smollm2.py page --books held-out/          # text after 12,288 tokens, with and without a scaling
    python benchmarks/smollm2_tables.py                          # benchmarks/results/smollm2.{json,md}, the figure

`--books` is a folder of books as .txt that no search has seen; each is one text of 16,384 tokens. Every command is one
of the command line, and leaves its result in `--output` (runs/smollm2) at once.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longrope.data.sources import read_all
from longrope.models.config import LoadOptions
from longrope.models.generation.generate import generate
from longrope.models.loading import open_model
from longrope.provenance import record
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from longrope.search.log import read_log
from longrope.storage import write_json_atomic

HERE = Path(__file__).resolve().parent
FETCH = HERE.parent / "scripts/smollm2.py"
LENGTH = "16k"
GRADIENT = "--method gradient --steps 4 --no-continuation"
SEARCHES = {
    "gradient": GRADIENT,
    "evolution": "--method longrope --population 16 --iterations 3",
    "gradient-needle": f"--objective needle {GRADIENT}",
}
FINETUNING = (
    "--length 16k --mix pieces:0.3,long:0.7 --steps 10 --batch 1 --warmup 2 --learning-rate 2e-5 --save-every 2 --bf16 "
    "--attn-implementation blocked --data book:an-american-tragedy --data book:les-miserables"
)
LOAD = "--dtype bfloat16 --attn-implementation blocked"
CLOSED_FORMS = "none,yarn,ntk,ntk-critical,pi"
NEEDLES = "--suite needle --trials 2 --depths 5 --needles 5"
PASSKEYS_ALONE = "--suite passkey "  # which need no texts
PASSKEYS = f"{PASSKEYS_ALONE}--trials 5"


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


def measured(model: str, books: Path, out: Path, name: str, options: str, scaling: str | None = None) -> Stage:
    """`longrope eval` of these options on the books, with the scaling that the search of this name found."""
    end = out / f"{name}.json"
    texts = [] if PASSKEYS_ALONE in options else ["--data", str(books)]
    words = ["eval", model, *shlex.split(options), *texts]
    words += ["--scaling", str(out / scaling / "scaling.json")] if scaling else []
    return Stage(end, [*words, *LOAD.split(), "-o", str(end)], end.with_suffix(".cells.jsonl"))


def stages(model: str, books: Path, out: Path) -> Iterator[Stage]:
    """All commands in order: each search and its comparison on a text of each book, retrieval, fine-tuning."""
    texts = f"--lengths {LENGTH},8k --samples {len(list(books.glob('*.txt')))}"
    for name, options in SEARCHES.items():
        yield searched(model, out, name, LENGTH, options)
        against = f" --against {CLOSED_FORMS}" if name == "gradient" else ""
        yield measured(model, books, out, f"perplexity-{name}", texts + against, name)
    for suite, options in (("needles", NEEDLES), ("passkeys", PASSKEYS)):
        yield measured(model, books, out, suite, f"{options} --against none,yarn --lengths {LENGTH},8k", "gradient")
        name = f"{suite}-gradient-needle"
        yield measured(model, books, out, name, f"{options} --lengths {LENGTH},8k", "gradient-needle")
    trained = out / "trained"
    words = ["finetune", model, "--scaling", str(out / "gradient/scaling.json"), *FINETUNING.split()]
    yield Stage(trained / "checkpoint/config.json", [*words, "-o", str(trained)], trained)
    yield measured(str(trained), books, out, "perplexity-trained", texts)


def more_stages(model: str, books: Path, out: Path) -> Iterator[Stage]:
    """Four times the window; then CMA-ES after the gradient, for a faster machine or a night."""
    texts = "--lengths 32k,8k,2k --samples 2"
    closed = f"{texts} --target-length 32k --against {CLOSED_FORMS}"
    yield measured(model, books, out, "perplexity-closed-32k", closed)
    yield searched(model, out, "gradient-32k", "32k", GRADIENT)
    yield measured(model, books, out, "perplexity-gradient-32k", texts, "gradient-32k")
    yield searched(model, out, "hybrid", LENGTH, "--method hybrid --steps 4 --no-continuation")
    texts = f"--lengths {LENGTH},8k --samples {len(list(books.glob('*.txt')))}"
    yield measured(model, books, out, "perplexity-hybrid", texts, "hybrid")


def ramp_stages(model: str, books: Path, out: Path) -> Iterator[Stage]:
    """What is measured of the best start of the search to four times the window, without its gradient steps."""
    yield measured(model, books, out, "perplexity-ramp-32k", "--lengths 32k,8k,2k --samples 2", "ramp-32k")
    passkeys = f"{PASSKEYS_ALONE}--trials 3 --lengths 32k --against yarn,none"
    yield measured(model, books, out, "passkeys-ramp-32k", passkeys, "ramp-32k")


def run(wanted: Iterable[Stage], out: Path) -> None:
    """Every stage whose result is not there."""
    out.mkdir(parents=True, exist_ok=True)
    for stage in wanted:
        if not stage.end.exists():
            resume = ["--resume"] if stage.started.exists() else []
            command = [sys.executable, "-m", "longrope", *stage.words, *resume]
            print(shlex.join(["longrope", *command[3:]]), flush=True)
            subprocess.run(command, check=True)


def best_ramp(out: Path) -> None:
    """Write `ramp-32k/scaling.json`: the best start so far of the search to 32,768 tokens, ended or not."""
    header, rows = read_log(out / "gradient-32k/search.jsonl")
    tried = [row for row in rows if row.request.get("samples") == [0] and row.gradient is None]
    best = min(tried, key=lambda row: row.loss)
    scaling = RopeScaling.extended(
        RopeGeometry(**header["geometry"]),
        header["target_length"],
        best.request["factors"],
        attention_factor=best.request["attention_factor"],
        provenance={"search": header, "starts": len(tried), "loss": best.loss, **record()},
    )
    (out / "ramp-32k").mkdir(exist_ok=True)
    scaling.save(out / "ramp-32k/scaling.json")
    print(f"the best of {len(tried)} starts: {best.loss:.4f} nats per token")


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
    parser.add_argument("what", choices=["commands", "run", "ramp", "page"])
    parser.add_argument("--books", type=Path, help="a folder of books as .txt")
    parser.add_argument("--more", action="store_true", help="the stages that need a faster machine, too")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/smollm2"))
    given = parser.parse_args()
    if given.books is None or not list(given.books.glob("*.txt")):
        parser.error("expected --books with a folder of .txt files")
    model = subprocess.run([sys.executable, str(FETCH)], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    subject = model if given.what != "commands" else "SmolLM2-135M-Instruct.gguf", given.books, given.output
    wanted = [*stages(*subject), *(more_stages(*subject) if given.more else ())]
    if given.what == "commands":
        for stage in wanted:
            print(shlex.join(["longrope", *stage.words]))
    elif given.what == "run":
        run(wanted, given.output)
    elif given.what == "ramp":
        best_ramp(given.output)
        run(ramp_stages(*subject), given.output)
    else:
        page(*subject)


if __name__ == "__main__":
    main()
