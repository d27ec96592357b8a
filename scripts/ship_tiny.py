"""Measure a model made by `train_tiny.py` and ship it: float16 weights, tokenizer, training record and model card.

    python scripts/ship_tiny.py --model runs/tiny --books HELD_OUT_DIR --out src/longrope/assets/tiny

The card shows that the model is a fair test bed: its perplexity falls inside its window and rises steeply beyond it,
and it retrieves. All numbers in it are measured here, on books that it was not trained on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from train_tiny import NEEDLES, WINDOW, Rows, frequent_words, retrieval
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrope.data.samples import draw_samples, require_disjoint
from longrope.data.sources import read_documents
from longrope.data.tokens import bos_of, tokenize
from longrope.evaluation.perplexity import measure_perplexity
from longrope.models.apply import apply_scaling, geometry_of, remove_scaling
from longrope.rope.baselines import closed_form_method
from longrope.rope.scaling import RopeScaling

LENGTHS = (64, 128, 256, 512, 1024, 2048)
TRIALS = 200


def measure(folder: Path, books: Path, record: dict) -> dict:
    """Perplexity by length on one sample of every book, and retrieval by kind of needle and depth."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = read_documents(books)
    require_disjoint(record["data_sha256"].values(), documents)
    tokenized = tokenize(documents, tokenizer)
    samples = draw_samples(
        tokenized, length=max(LENGTHS), count=2 * len(documents), seed=0, bos_token_id=bos_of(tokenizer)
    )
    geometry = geometry_of(model)
    scaled = apply_scaling(model, RopeScaling.original(geometry))
    table = {
        name: measure_perplexity(scaled, samples, LENGTHS, closed_form_method(name, geometry, max(LENGTHS)))
        for name in ("none", "yarn")
    }
    remove_scaling(model)
    words = frequent_words(sorted(books.glob("*.txt")))
    texts = [np.asarray(document.ids) for document in tokenized]
    needles = [retrieval(model, Rows(tokenizer, texts, words, seed=1), TRIALS, kind) for kind in range(len(NEEDLES))]
    return {
        "samples": len(samples.origins),
        "books": len(documents),
        "perplexity": {name: {row.length: [row.value, row.stderr] for row in rows} for name, rows in table.items()},
        "retrieval": needles,
    }


def card(record: dict, found: dict) -> str:
    """The model card: what it is, how it was made, and the measurements that make it a test bed."""
    stages = {row["stage"]: row for row in record["log"]}
    copying, mixture, polish = (stages[name] for name in ("copying", "mixture", "polish"))
    commands = "`, then `".join(record["commands"])
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{value:.2f} ± {error:.2f}" for value, error in cells.values()) + " |"
        for name, cells in found["perplexity"].items()
    )
    needles = "\n".join(
        f"| `{statement.strip()}` | {100 * result['retrieval']:.1f} % | {result['digit_nll']:.3f} |"
        for (statement, _, _), result in zip(NEEDLES, found["retrieval"], strict=True)
    )
    return f"""---
library_name: transformers
license: apache-2.0
language: en
---
# The embedded model

A Llama with {record["parameters"]:,} parameters and a context window of {WINDOW} tokens: 3 layers, hidden size 192,
3 heads of 64, rope base 10,000, tied embeddings, a byte-level BPE of 2,048 tokens that splits digits. It is a test bed
for context extension that runs on a CPU, not a model to talk to.

## How it was made
`{commands}` (AdamW, bf16 autocast), then `scripts/ship_tiny.py` (float16 weights, this card). {record["tokens_seen"]:,}
tokens in {record["seconds"] / 60:.0f} minutes on {record["hardware"]}, shared with other work. Last losses: copying
{copying["loss"]} nats after {copying["step"]} steps, mixture {mixture["loss"]} after {mixture["step"]}, polish
{polish["loss"]} after {polish["step"]}. `training.json` has the settings, versions, the whole loss log and the SHA-256
of all {len(record["data_sha256"])} public-domain books.

## A fair test bed
Measured on {found["books"]} books by authors it was not trained on: perplexity of the first N tokens of
{found["samples"]} samples, ± the standard error over samples. It falls inside the window and rises steeply beyond it.

| scaling | {" | ".join(map(str, LENGTHS))} |
|---|{"---|" * len(LENGTHS)}
{rows}

It retrieves: a five-digit number stated somewhere in {WINDOW} tokens of book text is completed exactly at the end
(greedy), {TRIALS} trials over all depths, new keys and numbers each time.

| statement | exact | nats per digit |
|---|---|---|
{needles}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that train_tiny.py wrote")
    parser.add_argument("--books", type=Path, required=True, help="folder of held-out .txt files")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    record = json.loads((args.model / "training.json").read_text("utf-8"))
    # Where the books lay on one machine is nobody's business.
    record["commands"] = [re.sub(r"--books \S+", "--books BOOKS", command) for command in record["commands"]]
    args.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.to(torch.float16).save_pretrained(args.out)
    for file in args.model.glob("tokenizer*"):
        shutil.copyfile(file, args.out / file.name)
    for file in args.out.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which a wheel would carry
    # Measured as shipped: float16 weights, float32 arithmetic.
    found = measure(args.out, args.books, record)
    (args.out / "training.json").write_text(json.dumps(record | {"measured": found}, indent=1) + "\n", "utf-8")
    (args.out / "README.md").write_text(card(record, found), "utf-8")
    print(card(record, found))


if __name__ == "__main__":
    main()
