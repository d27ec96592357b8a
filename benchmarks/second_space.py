"""The second search in its two spaces: multiples of the trained factors, as the authors ran it, and absolute factors.

    python benchmarks/second_space.py runs/tiny-512x-whole-rows/04-finetune-16k --out runs/second-space --length 32k \
        --seeds 0,1,2

MODEL, the folder of a fine-tuning, is searched for a longer window by LongRoPE's evolution (`--method gradient` for
another), without training, once in each space with the same texts. A cell is one (space, seed); it leaves
`cells/NAME.json`, a finished cell is not run again. Each result is then measured on two held-out texts and on needles
in them. Not a test: nothing depends on the times.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from longrope.data.needles import draw_needles
from longrope.data.sources import read_all
from longrope.data.tokens import tokenize
from longrope.models.apply import scaled
from longrope.models.config import LoadOptions
from longrope.models.loading import LoadedModel, open_model
from longrope.models.texts import prepare_samples, sources_or_books
from longrope.provenance import record
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.config import EVOLUTION, SearchConfig
from longrope.search.evaluator import LoggedEvaluator, SearchOutcome, SerialEvaluator
from longrope.search.log import SearchLog
from longrope.search.methods import build, identity
from longrope.search.objective import NeedleObjective, PerplexityObjective
from longrope.search.search_data import objectives_over, prepare_texts
from longrope.storage import json_ready, write_json_atomic
from longrope.units import parse_length


def held_out(loaded: LoadedModel, window: Window, count: int) -> dict[str, list[float]]:
    """Nats a token of each held-out text, and of the answers about each hidden number."""
    sources = read_all(sources_or_books("tiny", [], "evaluation"))
    texts = prepare_samples(loaded, sources, length=window.max_length, count=count, seed=1)
    documents = tokenize(sources, loaded.tokenizer)
    needles = draw_needles(documents, loaded.tokenizer, length=window.max_length, count=count, seed=1)
    with scaled(loaded.model, RopeScaling.original(loaded.geometry)) as handle, torch.inference_mode():
        plain = [float(nll.double().mean()) for nll in PerplexityObjective(handle, texts).nlls(window)]
        answers = [float(nll.double().mean()) for nll in NeedleObjective(handle, needles).nlls(window)]
    return {"nll": plain, "answer_nll": answers}


def run(loaded: LoadedModel, target: int, config: SearchConfig, folder: Path) -> SearchOutcome:
    """The search from its start, or from its log, without the baselines that the command evaluates."""
    texts = prepare_texts(loaded, sources_or_books("tiny", [], "search"), target, config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "search.jsonl"
    with scaled(loaded.model, RopeScaling.original(loaded.geometry)) as handle:
        objectives = objectives_over(handle, texts)
        prepared = build(loaded, objectives, target, config)
        header = identity(prepared, loaded, texts, target, config)
        with (SearchLog.resume if path.exists() else SearchLog.create)(path, header) as log:
            return prepared.run(LoggedEvaluator(SerialEvaluator(objectives), log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--length", default="32k")
    parser.add_argument("--method", default="longrope")
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--texts", type=int, default=2, help="held-out texts, and needles")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    loaded = open_model(args.model, options=LoadOptions(dtype="bfloat16"))
    evolves = args.method in EVOLUTION
    budget: dict[str, Any] = {"population": args.population, "iterations": args.iterations} if evolves else {}
    budget |= {} if evolves else {"steps": args.steps, "continuation": False}
    cells = args.out / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    for seed in map(int, args.seeds.split(",")):
        for space in ("relative", "absolute"):
            name = f"{args.method}-{args.length}-{space}-{seed}"
            if (cells / f"{name}.json").exists():
                continue
            config = SearchConfig(method=args.method, space=space, samples=args.samples, seed=seed, **budget)
            outcome = run(loaded, parse_length(args.length), config, args.out / name)
            cell = {
                "space": space,
                "seed": seed,
                "search_loss": outcome.loss,
                "evaluations": len(outcome.ranked),
                "window": {"factors": outcome.window.factors, "attention_factor": outcome.window.attention_factor},
                "held_out": held_out(loaded, outcome.window, args.texts),
            }
            write_json_atomic(cells / f"{name}.json", json_ready(cell) | {"options": config.model_dump(), **record()})
            print(name, json.dumps({key: cell[key] for key in ("search_loss", "evaluations", "held_out")}), flush=True)


if __name__ == "__main__":
    main()
