"""The gradient search cut down: how near it comes to the released evolution's loss for 1/60 of its token passes.

    python benchmarks/short_gradient.py --ratios 4,8 --seeds 0,1,2,3,4,5 --texts 3 --steps 16

On the embedded model, by perplexity, with the texts of `search_cost.py`: the best start by a compass search over ramps,
of which the best few are compared on `--texts` texts, then Adam with one text a step and no validation. Printed: the
search loss less that of the released evolution of the same texts (`results/search_cost*.json`), and its share of the
passes. Not a test: nothing depends on the times.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from longrope.models.apply import scaled
from longrope.models.config import LoadOptions
from longrope.models.loading import LoadedModel, open_model
from longrope.models.texts import sources_or_books
from longrope.rope.closed_forms import yarn
from longrope.rope.scaling import RopeScaling
from longrope.search.config import SearchConfig
from longrope.search.evaluator import (
    SEARCH,
    EvalRequest,
    EvalResult,
    SerialEvaluator,
    gradient_request,
    loss_request,
)
from longrope.search.knots import KnotParametrisation, phase_scale
from longrope.search.methods import build
from longrope.search.search_data import objectives_over, prepare_texts
from longrope.search.start import Bounds, WindowStage, pick_start

RESULTS = Path(__file__).resolve().parent / "results"
SAMPLES, EVALUATIONS = 3, 1344  # of the released evolution
_BETAS, _EPSILON = (0.8, 0.97), 1e-12


def released_losses() -> dict[tuple[int, int], float]:
    """(ratio, seed) -> the search loss that the released evolution by perplexity ended with."""
    cells = [
        cell
        for name in ("search_cost.json", "search_cost_fresh.json")
        for cell in json.loads((RESULTS / name).read_text("utf-8"))["cells"]
    ]
    kept = [cell for cell in cells if (cell["method"], cell["objective"]) == ("released", "perplexity")]
    return {(cell["ratio"], cell["seed"]): cell["search_loss"] for cell in kept}


class Counted:
    """Evaluates requests one by one, each once, and counts the token passes."""

    def __init__(self, evaluator: SerialEvaluator) -> None:
        self._evaluator, self._known = evaluator, dict[str, EvalResult]()
        self.token_passes = 0

    def __call__(self, request: EvalRequest) -> EvalResult:
        key = repr(request)
        if key not in self._known:
            self.token_passes += self._evaluator.token_passes(request)
            (self._known[key],) = self._evaluator([request])
        return self._known[key]

    def batch(self, requests: Sequence[EvalRequest]) -> list[EvalResult]:
        return list(map(self, requests))


def search(loaded: LoadedModel, ratio: int, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """The loss on the search texts, and the token passes as a share of the released evolution's."""
    geometry, bounds = loaded.geometry, Bounds()
    target = ratio * geometry.original_length
    config = SearchConfig(method="gradient", continuation=False, samples=SAMPLES, seed=seed)
    texts = prepare_texts(loaded, sources_or_books(loaded.name, [], "search"), target, config)
    with scaled(loaded.model, RopeScaling.original(geometry)) as handle:
        objectives = objectives_over(handle, texts)
        factor = build(loaded, objectives, target, config).attention_factor
        evaluate = Counted(SerialEvaluator(objectives))
        stage = WindowStage(
            length=target, seeds={}, samples=SAMPLES, ramp=partial(yarn, geometry, target, truncate=False)
        )
        _, start = pick_start(evaluate.batch, stage, {}, factor, args.texts, bounds)
        space = KnotParametrisation(start, phase_scale(geometry), geometry.pairs, bounds.largest)
        point, first, second = (np.zeros(space.knots) for _ in range(3))
        rng, order = np.random.default_rng(seed), np.zeros(0, dtype=np.int64)
        for step in range(1, args.steps + 1):
            place = (step - 1) % SAMPLES
            order = rng.permutation(SAMPLES) if place == 0 else order
            window = bounds.window(target, space.factors(point), factor)
            result = evaluate(gradient_request(window, int(order[place])))
            assert result.gradient is not None
            gradient = space.vjp(np.asarray(window.factors), np.array(result.gradient[:-1]))
            first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
            second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient**2
            mean, variance = first / (1 - _BETAS[0] ** step), second / (1 - _BETAS[1] ** step)
            rate = args.rate * (0.55 + 0.45 * math.cos(math.pi * (step - 1) / args.steps))
            point = space.numbers(space.factors(point - rate * mean / (np.sqrt(variance) + _EPSILON)))
        loss = evaluate(loss_request(bounds.window(target, space.factors(point), factor), SEARCH)).loss
    return loss, evaluate.token_passes / (EVALUATIONS * SAMPLES * target)


def numbers(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=numbers, default=[4, 8])
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--texts", type=int, default=3, help="that choose the start")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.1)
    args = parser.parse_args()
    loaded, released = open_model("tiny", options=LoadOptions(dtype="bfloat16")), released_losses()
    for ratio in args.ratios:
        found = [(*search(loaded, ratio, seed, args), released[ratio, seed]) for seed in args.seeds]
        apart = [loss - reference for loss, _, reference in found]
        share = statistics.fmean(part for _, part, _ in found)
        print(f"{ratio}x", *(f"{one:+.4f}" for one in apart), f"mean {statistics.fmean(apart):+.4f}, 1/{1 / share:.0f}")


if __name__ == "__main__":
    main()
