"""What stretched factors find and cost: needles and perplexity of a fine-tuned run beyond what it was trained for.

    python benchmarks/second_factors.py runs/tiny-512x-whole-rows/03-finetune-8k --length 32k --documents 10 \\
        --forms second-yarn:8,second-yarn:2,second-ntk-critical

`--forms` are second forms (`rope/progressive.py`), `second-yarn:B` with another β_fast; all have the attention factor
continued, times `--attention`. Needles are one to a document, at five depths, in the books of `--data`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from longrope.data.sources import read_all
from longrope.data.tokens import tokenize
from longrope.evaluation.needle import draw_grid, grid_depths, measure_needles
from longrope.models.apply import apply_scaling
from longrope.models.config import LoadOptions
from longrope.models.loading import open_model
from longrope.models.scoring import token_nll
from longrope.models.texts import prepare_samples, sources_or_books
from longrope.rope.baselines import Method
from longrope.rope.progressive import SECOND_FORMS, continued_attention_factor, second_yarn
from longrope.rope.scaling import RopeScaling, Window
from longrope.units import parse_length

DEPTHS = 5


def stretched(carried: RopeScaling, form: str, length: int, attention: float) -> Window:
    name, _, beta = form.partition(":")
    last, reach = carried.windows[-1], carried.target_length
    if beta:
        factors = second_yarn(carried.geometry, last.factors, reach, length, beta_fast=float(beta))
    else:
        factors = SECOND_FORMS[name](carried.geometry, last.factors, reach, length)
    m = continued_attention_factor(last.attention_factor, reach, length) * attention
    return Window(length, tuple(factors.tolist()), attention_factor=m)


def mean(rows: Sequence[float]) -> float:
    return sum(rows) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--length", type=parse_length, required=True)
    parser.add_argument("--forms", default="second-yarn,second-yarn:8,second-yarn:2,second-ntk-critical")
    parser.add_argument("--attention", type=float, default=1.0)
    parser.add_argument("--documents", type=int, default=10, help="a multiple of 5")
    parser.add_argument("--data", action="append", default=[])
    args = parser.parse_args()
    loaded = open_model(args.run, options=LoadOptions(dtype="bfloat16"))
    if loaded.checkpoint_scaling is None:
        parser.error(f"expected the run of a fine-tuning, found {args.run}, which carries no scaling")
    documents = read_all(sources_or_books("tiny", args.data, "search"))
    grid = draw_grid(
        tokenize(documents, loaded.tokenizer),
        loaded.tokenizer,
        length=args.length,
        depths=grid_depths(DEPTHS),
        trials=args.documents // DEPTHS,
        per_document=1,
        seed=3,
    )
    text = prepare_samples(loaded, documents, length=args.length, count=1, seed=5).ids
    scaled = apply_scaling(loaded.model, loaded.checkpoint_scaling)
    for form in args.forms.split(","):
        window = stretched(loaded.checkpoint_scaling, form, args.length, args.attention)
        scaling = loaded.checkpoint_scaling.with_window(window)
        rows = measure_needles(scaled, loaded.tokenizer, grid, Method(form, scaling.window_for))
        found = mean([row.value for row in rows if row.metric == "accuracy"])
        loss = -mean([row.value for row in rows if row.metric == "answer_logprob"])
        with torch.inference_mode(), scaled.using(window) as model:
            perplexity = float(token_nll(model, text).mean().exp())
        print(
            f"{form}: m {window.attention_factor:.3f}, {100 * found:.0f} % of {args.documents} needles, "
            f"{loss:.2f} nats an answer token, perplexity {perplexity:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
