"""Evaluations of a search: windows in, losses and gradients out, computed here or replayed from the log.

A search method is a plain function over `evaluate(requests) -> results` (`Evaluate`). `SerialEvaluator` computes in
this process, `ray_evaluator.RayEvaluator` in many; `LoggedEvaluator` is the `Evaluate` that a method gets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longrope.callbacks import Callbacks, SearchProgress
from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.log import LogRow, SearchLog

if TYPE_CHECKING:  # Ray's driver starts without models
    from longrope.search.objective import SampledObjective

SEARCH, VALIDATION, OTHER = "search", "validation", "other"
"""The splits: texts that are searched on, texts that decide between results, and texts of the other objective."""


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """A request for the loss of `window`, and with `gradient` also for its gradient.

    `split` and `samples` choose the texts (all of the split where None). `row` is what the log records: equal requests
    have the same row, bit for bit.
    """

    window: Window
    row: dict[str, Any]
    split: str = SEARCH
    samples: tuple[int, ...] | None = None
    gradient: bool = False

    @property
    def key(self) -> tuple[Window, str, tuple[int, ...] | None, bool]:
        """The fields that decide the result: requests with the same key are computed once."""
        return self.window, self.split, self.samples, self.gradient


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The mean loss in nats per token, and of a gradient request d loss/d(λ_0 … λ_{D−1}, m)."""

    loss: float
    gradient: tuple[float, ...] | None = None


Evaluate = Callable[[Sequence[EvalRequest]], list[EvalResult]]
"""The evaluations of a batch of requests, in its order."""
EvaluateEach = Callable[[Sequence[EvalRequest]], Iterator[EvalResult]]
"""Like `Evaluate`, but each result comes as soon as it and those before it are known."""


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """The result of a search method: the best window and its loss on all search samples, in nats per token.

    `chosen_seeds`: of a method with seeds, the one that each stage started from. `ranked`: of an evolution, all
    candidates with a finite loss, best first, and `to_window`, what makes a window of one.
    """

    window: Window
    loss: float
    chosen_seeds: tuple[str, ...] = ()
    ranked: tuple[tuple[Any, float], ...] = ()
    to_window: Callable[[Any], Window] | None = field(default=None, compare=False)


OnBest = Callable[[Window, float], None]
"""Called by a search method with each new best window and the loss that it was chosen by."""


def ignore(window: Window, loss: float) -> None:
    """The `OnBest` that does nothing."""


def loss_request(window: Window, split: str, samples: tuple[int, ...] | None = None) -> EvalRequest:
    """The request for the loss of `window` on `samples` of `split` (None: all)."""
    return EvalRequest(window, _row(window, split, samples), split, samples)


def gradient_request(window: Window, sample: int) -> EvalRequest:
    """The request for loss and gradient of `window` on one search sample."""
    return EvalRequest(window, _row(window, SEARCH, (sample,)), SEARCH, (sample,), gradient=True)


def both_splits(window: Window) -> list[EvalRequest]:
    """Requests for the loss of `window` on the validation and on the search samples, for `mean_loss`."""
    return [loss_request(window, VALIDATION), loss_request(window, SEARCH)]


def mean_loss(results: Sequence[EvalResult]) -> float:
    """The mean of the losses that `both_splits` asked for; infinite where one is not finite.

    A few texts cannot tell results that lie thousandths of a nat apart. Both splits together prefer a result that has
    gained more on the search samples than it loses on the samples that it never saw.
    """
    return math.fsum(rank(result.loss) for result in results) / len(results)


def rank(loss: float) -> float:
    """`loss` for comparisons: NaN and both infinities are worse than every number."""
    return loss if math.isfinite(loss) else math.inf


def distinct(requests: Sequence[EvalRequest], known: set[Hashable] | None = None) -> list[EvalRequest]:
    """The requests that differ from those before them and from the keys `known`: the ones that are computed.

    `known` gets the keys of these requests.
    """
    known = set() if known is None else known
    new = []
    for request in requests:
        if request.key not in known:
            known.add(request.key)
            new.append(request)
    return new


class SerialEvaluator:
    """Computes one request after the other in this process.

    `objectives` maps (split, window length) to the objective over the texts of that split and length.
    """

    def __init__(self, objectives: Mapping[tuple[str, int], SampledObjective]) -> None:
        self.objectives = objectives

    def __call__(self, requests: Sequence[EvalRequest]) -> Iterator[EvalResult]:
        """The results in order, each computed when it is asked for."""
        return map(self.result, requests)

    def result(self, request: EvalRequest) -> EvalResult:
        """The result of one request."""
        objective = self._objective(request)
        if request.gradient:
            return EvalResult(*objective.loss_and_gradient(request.window, request.samples))
        return EvalResult(objective.loss(request.window, request.samples))

    def token_passes(self, request: EvalRequest) -> int:
        """Tokens that `request` sends through the model: a forward counts 1 per token, a backward 2."""
        objective = self._objective(request)
        rows = objective.count if request.samples is None else len(request.samples)
        return rows * objective.length * (3 if request.gradient else 1)

    def _objective(self, request: EvalRequest) -> SampledObjective:
        return self.objectives[request.split, request.window.max_length]


class LoggedEvaluator:
    """The `Evaluate` of a search with a log: it replays the results that the log has, and computes and logs the others,
    each as soon as it is known. A search that is resumed sends the same requests, so that its end is bit-identical to
    that of a search that ran through.

    A request that was evaluated before is logged again but not computed: closed forms coincide, and a search evaluates
    its result twice. Only the evaluations inside `search` are reported to callbacks.

    Raises LongRopeError when the log holds another request than the search makes.
    """

    def __init__(self, evaluate: EvaluateEach, log: SearchLog) -> None:
        self._evaluate, self._log = evaluate, log
        self._replay = list(log.rows)
        self._count = 0  # requests so far
        self._generation = 0  # batches so far
        self._known: dict[Hashable, EvalResult] = {}
        self._callbacks: Callbacks | None = None
        self._requests: list[EvalRequest] = []
        self._target_length: int | None = None
        self._best_loss, self._validates = math.inf, False
        self._shorter: int | None = None  # the length of the best window where it is not the target's
        self._search_loss: float | None = None

    def __call__(self, requests: Sequence[EvalRequest]) -> list[EvalResult]:
        replayed = self._replay[self._count : self._count + len(requests)]
        for request, row in zip(requests, replayed, strict=False):
            if json.loads(json.dumps(request.row)) != row.request:
                raise LongRopeError(
                    f"{self._log.path}: evaluation {row.index} is not the one this search would make; the log was "
                    "edited or made by another version",
                    code="other-run",
                    hint="start anew with another `output_dir`",
                )
        results = []
        for request, row in zip(requests, replayed, strict=False):
            results.append(EvalResult(row.loss, row.gradient))
            self._add(request, results[-1], replayed=True)
        fresh = requests[len(replayed) :]
        missing = distinct([request for request in fresh if request.key not in self._known])
        computed = zip(missing, self._evaluate(missing), strict=True)
        for request in fresh:
            if request.key not in self._known:
                self._known[request.key] = next(computed)[1]
            results.append(self._known[request.key])
            self._log.append(LogRow(self._count, self._generation, request.row, results[-1].loss, results[-1].gradient))
            self._add(request, results[-1], replayed=False)
        next(computed, None)  # raises ValueError where there are more results than requests
        self._generation += 1
        return results

    @contextmanager
    def search(self, callbacks: Callbacks, target_length: int | None = None) -> Iterator[list[EvalRequest]]:
        """Report every evaluation in the `with` block to `callbacks`. Yields the list that gets their requests.

        `target_length`: tokens of the window that is searched for, where shorter ones may come before it.
        """
        self._callbacks, self._requests, self._target_length = callbacks, [], target_length
        try:
            yield self._requests
        finally:
            self._callbacks = None

    def report_best(self, window: Window, loss: float) -> None:
        """The `OnBest` of the search method: `loss` is reported to callbacks from now on."""
        self._best_loss = loss
        known = self._known.get(loss_request(window, SEARCH).key)
        self._search_loss = None if known is None or known.loss == loss else known.loss
        self._shorter = self._length_below_target(window)

    def finish(self) -> None:
        """Raise LongRopeError when the log holds more than the search evaluated."""
        if self._count < len(self._replay):
            raise LongRopeError(
                f"{self._log.path} holds {len(self._replay)} evaluations, this search ends after {self._count}: the "
                "log was edited or made by another version",
                code="other-run",
                hint="start anew with another `output_dir`",
            )

    def _add(self, request: EvalRequest, result: EvalResult, *, replayed: bool) -> None:
        self._count += 1
        self._known[request.key] = result
        if self._callbacks is None:
            return
        self._requests.append(request)
        # A method reports its best at the end of a batch, and a generation can take hours. A method that validates
        # does not choose by the losses on its search samples.
        self._validates = self._validates or request.split == VALIDATION
        if request.samples is None and not self._validates and rank(result.loss) < self._best_loss:
            self._best_loss, self._shorter = result.loss, self._length_below_target(request.window)
        self._callbacks.on_search_progress(
            SearchProgress(len(self._requests), self._best_loss, replayed, self._shorter, self._search_loss)
        )

    def _length_below_target(self, window: Window) -> int | None:
        return None if self._target_length in (None, window.max_length) else window.max_length


def _row(window: Window, split: str, samples: tuple[int, ...] | None) -> dict[str, object]:
    return {
        **({"start_tokens": window.start_tokens} if window.start_tokens else {}),
        "length": window.max_length,
        "factors": list(window.factors),
        "attention_factor": window.attention_factor,
        "split": split,
        "samples": None if samples is None else list(samples),
    }
