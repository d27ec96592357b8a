"""Scalars of a job for TensorBoard, Weights & Biases and Trackio: the losses of a search, and perplexity by length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from longrope.callbacks import Callbacks, SearchProgress
from longrope.errors import LongRopeError, one_line

if TYPE_CHECKING:
    from longrope.evaluation.results import EvalRow

PROJECT = "longrope"


class Writer(Protocol):
    """A place that scalars are written to."""

    def levels(self, values: Mapping[str, float], last_step: int) -> None:
        """Values that hold from step 0 to `last_step`."""

    def add(self, name: str, value: float, step: int) -> None:
        """One value at a step."""

    def close(self) -> None:
        """Finish: what was written is kept."""


class TensorBoardWriter:
    """TensorBoard's event files in a folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise LongRopeError(
                f"cannot write to `log_dir` {folder}: {error.strerror}", code="output-not-writable"
            ) from error

    def levels(self, values: Mapping[str, float], last_step: int) -> None:
        for name, value in values.items():
            for step in (0, last_step):
                self.add(name, value, step)

    def add(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class TrackerWriter:
    """A run of Weights & Biases or Trackio. Their steps never go back, so levels are written beside every value."""

    def __init__(self, name: str) -> None:
        self._tracker = import_module(name)
        self._levels: dict[str, float] = {}
        try:
            self._tracker.init(project=PROJECT)
        except Exception as error:  # of the tracker's own kinds: no account, no network
            raise LongRopeError(
                f"{name} of `report_to` does not start: {one_line(error)}",
                code="no-tracker",
                hint=f"log in to {name}, or leave it out",
            ) from error

    def levels(self, values: Mapping[str, float], last_step: int) -> None:
        self._levels = dict(values)

    def add(self, name: str, value: float, step: int) -> None:
        if name.startswith("perplexity/"):  # its steps are lengths, not evaluations
            self._tracker.log({f"{name}/{step}": value})
        else:
            self._tracker.log({name: value} | self._levels, step=step)

    def close(self) -> None:
        self._tracker.finish()


class Scalars(Callbacks):
    """Writes progress to every one of its writers.

    `search/best_loss` on the search texts at the target length, by evaluation, each baseline as a level line
    `baseline/NAME` over the same steps, `search/best_loss_at_N` of windows of N tokens that come before the target, and
    perplexity as `perplexity/NAME` by length in tokens.
    """

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self._writers = writers

    def on_search_start(self, evaluations: int, baselines: Mapping[str, float]) -> None:
        levels = {f"baseline/{name}": loss for name, loss in baselines.items() if math.isfinite(loss)}
        for writer in self._writers:
            writer.levels(levels, evaluations)

    def on_search_progress(self, progress: SearchProgress) -> None:
        if progress.length is not None:
            self._add(f"search/best_loss_at_{progress.length}", progress.best_loss, progress.evaluations)
            return
        loss = progress.best_loss if progress.search_loss is None else progress.search_loss
        self._add("search/best_loss", loss, progress.evaluations)

    def measured(self, rows: Sequence[EvalRow]) -> None:
        for row in rows:
            if row.metric == "perplexity":
                self._add(f"perplexity/{row.scaling}", row.value, row.length)

    def _add(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):
            for writer in self._writers:
                writer.add(name, value, step)


@contextmanager
def scalars_in(log_dir: Path | None, trackers: Sequence[str] = ()) -> Iterator[Scalars]:
    """Scalars into TensorBoard's `log_dir`, if given, and into `trackers`. They stay when a run is stopped."""
    with ExitStack() as stack:
        writers: list[Writer] = []
        if log_dir is not None:
            writers.append(TensorBoardWriter(log_dir))
            stack.callback(writers[-1].close)
        for name in trackers:
            writers.append(TrackerWriter(name))
            stack.callback(writers[-1].close)
        yield Scalars(writers)
