"""Progress of jobs as log lines of the logger `longrope`: what a job in Python has where it is given no callbacks.

    import logging
    logging.basicConfig(level=logging.INFO)

shows them: the first result at once, then a line a minute at most.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping

from longrope.callbacks import Callbacks, SearchProgress, TrainProgress

log = logging.getLogger("longrope")
EVERY = 60.0
"""Seconds between two lines of one stage."""


class LoggedProgress(Callbacks):
    """Logs what a job does at level INFO. `clock`: seconds, from any beginning."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._next = clock, -math.inf
        self._count, self._done = 0, 0

    def on_stage(self, stage: str, number: int = 1, count: int = 1, finished: bool = False) -> None:
        log.info("stage %d of %d, %s%s", number, count, stage, ": finished before" if finished else "")

    def on_note(self, note: str) -> None:
        log.info("%s", note)

    def on_device(self, where: str) -> None:
        log.info("%s", where)

    def on_search_start(self, evaluations: int, baselines: Mapping[str, float]) -> None:
        self._begin(evaluations)
        finite = {name: loss for name, loss in baselines.items() if math.isfinite(loss)}
        best = min(finite, key=finite.__getitem__, default=None)
        known = "" if best is None else f"; best baseline: {best}, loss {finite[best]:.4f}"
        log.info("search: at most %d evaluations%s", evaluations, known)

    def on_search_progress(self, progress: SearchProgress) -> None:
        if not progress.replayed:
            loss = "none yet" if math.isinf(progress.best_loss) else f"{progress.best_loss:.4f}"
            self._line(f"search: {progress.evaluations} of {self._count} evaluations at most, best loss {loss}")

    def on_search_end(self, method: str, verdict: str) -> None:
        log.info("%s: %s", method, verdict)

    def on_recover_length(self, length: int) -> None:
        log.info("recovering the window of %d tokens", length)

    def on_train_start(self, steps: int, first: int) -> None:
        self._begin(steps)
        log.info("train: %d steps%s", steps, f", {first} of them done before" if first else "")

    def on_train_progress(self, progress: TrainProgress) -> None:
        rate = f"{progress.tokens_per_second:,.0f} tokens/s"
        self._line(f"train: {progress.step} of {self._count} steps, loss {progress.loss:.4f}, {rate}")

    def on_eval_start(self, steps: int) -> None:
        self._begin(steps)
        log.info("evaluate: %d samples", steps)

    def on_eval_step(self) -> None:
        self._done += 1
        self._line(f"evaluate: {self._done} of {self._count} samples")

    def _begin(self, count: int) -> None:
        self._count, self._done, self._next = count, 0, -math.inf

    def _line(self, text: str) -> None:
        """Log `text`, unless the last line of this stage is less than EVERY seconds old."""
        now = self._clock()
        if now >= self._next:
            self._next = now + EVERY
            log.info("%s", text)
