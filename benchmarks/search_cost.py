"""What a search costs and gives: loss against token passes, for every method, both objectives and several ratios.

    python benchmarks/search_cost.py --out runs/cost                     # every cell; hours on 2 cores
    python benchmarks/search_cost.py --out runs/cost --methods 'gradient;hybrid' --ratios 4 --seeds 0
    python benchmarks/search_cost.py --out runs/below --population 32 --iterations 20 --ratios 4,8 --seeds 0 \
        --methods 'yarn;longrope2;longrope2, yarn below;longrope2, ramp below;ramps alone'   # a quarter
    python benchmarks/search_cost_tables.py --cells runs/cost/cells --out benchmarks/results   # tables of what is there

A cell is one (objective, ratio, method, seed). It leaves `cells/NAME.json`; a finished cell is not run again, and one
that was stopped goes on from its log. A forward counts one token pass per token, a backward two. Everything runs in
bfloat16 by default, as searches on GPUs do. Not a test: nothing depends on the times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from released_evolution import ReleasedSpace

from longrope.data.needles import draw_needles
from longrope.data.sources import read_all
from longrope.data.tokens import tokenize
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.config import LoadOptions
from longrope.models.loading import LoadedModel, open_model
from longrope.models.scaled import ScaledModel
from longrope.models.scoring import last_logits
from longrope.models.texts import prepare_samples, sources_or_books
from longrope.provenance import record
from longrope.rope.closed_forms import CLOSED_FORMS, pair_that_turns, yarn
from longrope.rope.geometry import FloatArray, RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.config import EVOLUTION, SearchConfig
from longrope.search.evaluator import (
    SEARCH,
    EvalRequest,
    EvalResult,
    Evaluate,
    LoggedEvaluator,
    OnBest,
    SearchOutcome,
    SerialEvaluator,
    distinct,
    loss_request,
)
from longrope.search.evolution import Evolution, EvolutionSettings, evolution_search
from longrope.search.log import SearchLog
from longrope.search.methods import PreparedSearch, build, identity
from longrope.search.objective import PerplexityObjective
from longrope.search.search_data import objectives_over, prepare_texts
from longrope.storage import json_ready, write_json_atomic

SAMPLES = 3  # texts that a candidate is scored on
TRIALS = 100  # held-out needles
TEXTS = 20  # held-out texts
METHODS: dict[str, dict[str, Any]] = {
    "released": {"method": "longrope"},  # April 2024: its space and seed are exchanged below
    "released, main": {"method": "longrope"},
    "longrope": {"method": "longrope"},
    "longrope2": {"method": "longrope2"},
    "longrope, raced": {"method": "longrope", "racing": True},
    "longrope2, raced": {"method": "longrope2", "racing": True},
    "gradient": {"method": "gradient"},
    "gradient, only continued": {"method": "gradient"},  # later stages start from the last one's result alone
    "gradient, one jump": {"method": "gradient", "continuation": False},
    "gradient, 12 steps": {"method": "gradient", "continuation": False, "steps": 12},  # about 1/65 of `released`
    "hybrid": {"method": "hybrid"},
    "hybrid, one jump": {"method": "hybrid", "continuation": False},
    "cma": {"method": "cma"},
    "cma, every pair": {"method": "cma", "knots": 0},
    "longrope2, yarn below": {"method": "longrope2", "below": "yarn"},
    "longrope2, ramp below": {"method": "longrope2", "below": "ramp"},
    "ramps alone": {"method": "cma"},  # no search: the best of `ramp_grid` on all search texts
}


class Recorder:
    """Counts the token passes of a search, and notes each new best window with those spent until then."""

    def __init__(self, evaluate: LoggedEvaluator, evaluator: SerialEvaluator) -> None:
        self._evaluate, self._evaluator = evaluate, evaluator
        self._known: set[Hashable] = set()
        self.token_passes, self.evaluations = 0, 0
        self.trace: list[tuple[int, Window]] = []

    def __call__(self, requests: Sequence[EvalRequest]) -> list[EvalResult]:
        results = self._evaluate(requests)
        self.token_passes += sum(map(self._evaluator.token_passes, distinct(requests, self._known)))
        self.evaluations += len(requests)
        return results

    def on_best(self, window: Window, loss: float) -> None:
        if not self.trace or self.trace[-1][1] != window:
            self.trace.append((self.token_passes, window))


def run_cell(
    loaded: LoadedModel, objective: str, ratio: int, method: str, seed: int, out: Path, budget: dict[str, int]
) -> dict[str, Any]:
    """One search from its start, or from its log, to its end, and what it found measured on held-out books.

    `budget`: population and iterations of an evolution, where they are not the paper's.
    """
    target = ratio * loaded.geometry.original_length
    own = METHODS[method] | (budget if METHODS[method]["method"] in EVOLUTION else {})
    options = SearchConfig(objective=objective, samples=SAMPLES, seed=seed, **own)
    texts = prepare_texts(loaded, sources_or_books(loaded.name, [], "search"), target, options)
    scaled = apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    try:
        objectives = objectives_over(scaled, texts)
        prepared = build(loaded, objectives, target, options)
        header = identity(prepared, loaded, texts, target, options)
        header |= {"benchmark": method, "dtype": str(loaded.model.dtype)}
        if method.startswith("released"):
            prepared = _released(loaded, prepared, target, seed, sweep=method == "released")
        if method == "gradient, only continued":
            prepared = _only_continued(prepared)
        if method == "ramps alone":
            prepared = replace(prepared, run=partial(_best_ramp, loaded, target, prepared.attention_factor))
        evaluator = SerialEvaluator(objectives)
        path = out / "search.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        began = time.time()
        with (SearchLog.resume if path.exists() else SearchLog.create)(path, header) as log:
            recorder = Recorder(LoggedEvaluator(evaluator, log), evaluator)
            outcome = prepared.run(recorder, on_best=recorder.on_best)
        seconds = time.time() - began
        window, loss = outcome.window, outcome.loss
        searched = objectives["search", target]
        trace = [[passes, searched.loss(point)] for passes, point in _thinned(recorder.trace, target)]
        return {
            "objective": objective,
            "ratio": ratio,
            "method": method,
            "seed": seed,
            "search_loss": loss,
            "evaluations": recorder.evaluations,
            "token_passes": recorder.token_passes,
            "seconds": seconds,
            "trace": trace,
            "chosen_seeds": list(outcome.chosen_seeds),
            "window": {"factors": window.factors, "attention_factor": window.attention_factor},
            "held_out": held_out(loaded, scaled, window),
        }
    finally:
        remove_scaling(loaded.model)


def closed_form_cell(loaded: LoadedModel, objective: str, ratio: int, name: str, seed: int) -> dict[str, Any]:
    """A closed form on the same search samples and held-out books."""
    target = ratio * loaded.geometry.original_length
    options = SearchConfig(objective=objective, samples=SAMPLES, seed=seed)
    texts = prepare_texts(loaded, sources_or_books(loaded.name, [], "search"), target, options)
    factors, attention_factor = CLOSED_FORMS[name](loaded.geometry, target)
    window = Window(target, tuple(factors.tolist()), 0, attention_factor)
    scaled = apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    try:
        objectives = objectives_over(scaled, texts)
        return {
            "objective": objective,
            "ratio": ratio,
            "method": name,
            "seed": seed,
            "search_loss": objectives["search", target].loss(window),
            "held_out": held_out(loaded, scaled, window),
        }
    finally:
        remove_scaling(loaded.model)


def _released(loaded: LoadedModel, prepared: PreparedSearch, target: int, seed: int, *, sweep: bool) -> PreparedSearch:
    """The search with the released code's space and only seed."""
    geometry = loaded.geometry
    space = ReleasedSpace(target / geometry.original_length, sweep)
    optimizer = Evolution(space, [space.snap(yarn(geometry, target))], EvolutionSettings(seed=seed))
    run = partial(
        evolution_search,
        optimizer=optimizer,
        to_window=lambda candidate: candidate.window(target, prepared.attention_factor),
    )
    return replace(prepared, run=run)


def _only_continued(prepared: PreparedSearch) -> PreparedSearch:
    """The search without closed forms and ramps among the starts of any stage but the first."""
    assert isinstance(prepared.run, partial)
    first, *later = prepared.run.keywords["stages"]
    bare = [replace(stage, seeds={}, ramp=None) for stage in later]
    return replace(prepared, run=partial(prepared.run, stages=[first, *bare]))


def _best_ramp(
    loaded: LoadedModel, target: int, attention_factor: float, evaluate: Evaluate, *, on_best: OnBest
) -> SearchOutcome:
    """The ramp with the lowest loss on all search texts."""
    windows = {
        name: Window(target, tuple(factors.tolist()), 0, attention_factor)
        for name, factors in ramp_grid(loaded.geometry, target).items()
    }
    results = evaluate([loss_request(window, SEARCH) for window in windows.values()])
    losses = {name: result.loss for name, result in zip(windows, results, strict=True)}
    name = min(losses, key=losses.__getitem__)
    on_best(windows[name], losses[name])
    return SearchOutcome(windows[name], losses[name], (name,))


def ramp_grid(geometry: RopeGeometry, length: int) -> dict[str, FloatArray]:
    """Sixteen ramps of 1/λ, each once, by the names of the pairs between which they run: (D,) each.

    From the pair that turns 16, 8, 4 or 2 times in L to the one that turns 1.5, 1, 0.6 or 0.4 times.
    """
    found: dict[str, FloatArray] = {}
    for slow, fast in itertools.product((1.5, 1.0, 0.6, 0.4), (16.0, 8.0, 4.0, 2.0)):
        low, high = (pair_that_turns(geometry, turns, geometry.original_length) for turns in (fast, slow))
        factors = yarn(geometry, length, beta_fast=fast, beta_slow=slow, truncate=False)
        if not any(np.array_equal(factors, other) for other in found.values()):
            found[f"ramp {max(low, 0.0):.1f} to {max(high, 0.0):.1f}"] = factors
    return found


def _thinned(trace: Sequence[tuple[int, Window]], target: int, points: int = 24) -> list[tuple[int, Window]]:
    """At most `points` of the windows of the target length, evenly spaced in the logarithm of the token passes.

    Every one is scored for the trace; what is read from it as first reached may be reached up to a quarter earlier.
    """
    whole = [entry for entry in trace if entry[1].max_length == target]
    if len(whole) <= points:
        return whole
    low, high = math.log(whole[0][0]), math.log(whole[-1][0])
    wanted = [low + (high - low) * step / (points - 1) for step in range(points)]
    chosen = {min(range(len(whole)), key=lambda i: abs(math.log(whole[i][0]) - at)) for at in wanted}
    return [whole[i] for i in sorted(chosen)]


def held_out(loaded: LoadedModel, scaled: ScaledModel, window: Window) -> dict[str, float]:
    """At the window's length, with standard errors: the mean NLL over held-out texts, and of held-out needles the exact
    retrieval and the NLL of the answers' tokens.

    Retrieval is 0 or 1 where a model is far from or sure of its answer; the NLL says how far.
    """
    sources = read_all(sources_or_books(loaded.name, [], "evaluation"))
    texts = prepare_samples(loaded, sources, length=window.max_length, count=TEXTS, seed=1)
    nlls = torch.stack([nll.double().mean() for nll in PerplexityObjective(scaled, texts).nlls(window)])
    needles = draw_needles(
        tokenize(sources, loaded.tokenizer), loaded.tokenizer, length=window.max_length, count=TRIALS, seed=1
    )
    hits, answers = 0, torch.zeros(TRIALS, dtype=torch.float64)
    with scaled.using(window), torch.inference_mode():
        for place, (row, count) in enumerate(zip(needles.ids, needles.answer_tokens, strict=True)):
            logits, answer = last_logits(scaled.model, row[None, :-1], count)[0], row[-count:]
            hits += bool((logits.argmax(-1) == answer).all())
            answers[place] = torch.nn.functional.cross_entropy(logits.double(), answer)
    share = hits / TRIALS
    return {
        "nll": float(nlls.mean()),
        "nll_stderr": float(nlls.std() / math.sqrt(TEXTS)),
        "retrieval": share,
        "retrieval_stderr": math.sqrt(share * (1 - share) / TRIALS),
        "answer_nll": float(answers.mean()),
        "answer_nll_stderr": float(answers.std() / math.sqrt(TRIALS)),
    }


def measure_again(loaded: LoadedModel, path: Path) -> None:
    """Measure a finished cell's factors on held-out books, where that was done before all of it was recorded."""
    cell = json.loads(path.read_text("utf-8"))
    if "answer_nll" in cell["held_out"]:
        return
    target = cell["ratio"] * loaded.geometry.original_length
    if "window" in cell:
        window = Window(target, tuple(cell["window"]["factors"]), 0, cell["window"]["attention_factor"])
    else:
        factors, attention_factor = CLOSED_FORMS[cell["method"]](loaded.geometry, target)
        window = Window(target, tuple(factors.tolist()), 0, attention_factor)
    scaled = apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    try:
        measured = held_out(loaded, scaled, window)
    finally:
        remove_scaling(loaded.model)
    print(path.stem, {name: measured[name] - value for name, value in cell["held_out"].items()}, flush=True)
    write_json_atomic(path, json_ready(cell | {"held_out": measured}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", default=";".join(["yarn", *METHODS]), help="separated by semicolons")
    parser.add_argument("--objectives", default="perplexity,needle")
    parser.add_argument("--ratios", default="4,8,16")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--population", type=int, help="of the evolutions, in place of the paper's 64")
    parser.add_argument("--iterations", type=int, help="of the evolutions, in place of the paper's 40")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--again", action="store_true", help="measure finished cells that lack a number again")
    args = parser.parse_args()
    loaded = open_model(args.model, options=LoadOptions(dtype=args.dtype))
    cells = args.out / "cells"
    given = {"population": args.population, "iterations": args.iterations}
    budget = {name: value for name, value in given.items() if value is not None}
    for ratio in map(int, args.ratios.split(",")):
        for seed in map(int, args.seeds.split(",")):
            for objective in args.objectives.split(","):
                for method in args.methods.split(";"):
                    name = f"{objective}-{ratio}x-{method.replace(', ', '-').replace(' ', '-')}-{seed}"
                    if (cells / f"{name}.json").exists():
                        if args.again:
                            measure_again(loaded, cells / f"{name}.json")
                        continue
                    if method in CLOSED_FORMS:
                        cell = closed_form_cell(loaded, objective, ratio, method, seed)
                    else:
                        cell = run_cell(loaded, objective, ratio, method, seed, args.out / name, budget)
                    cells.mkdir(parents=True, exist_ok=True)
                    settings = {"threads": torch.get_num_threads(), "dtype": args.dtype, "samples": SAMPLES} | budget
                    write_json_atomic(cells / f"{name}.json", json_ready(cell) | {"settings": settings, **record()})
                    print(name, json.dumps({key: cell[key] for key in ("search_loss", "held_out")}), flush=True)


if __name__ == "__main__":
    main()
