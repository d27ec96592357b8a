"""The progress of a job on a terminal, in the log of `--verbose` and in TensorBoard, and how to go on after Ctrl-C."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from longrope.callbacks import Callbacks, SearchProgress, TrainProgress
from longrope.cli.common import log, messages
from longrope.errors import LongRopeError
from longrope.run_files import SEARCH_LOG

if TYPE_CHECKING:
    from longrope.evaluation.results import EvalRow

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
    TextColumn("{task.fields[note]}"),
)


class Display(Callbacks):
    """A progress bar for what runs now, and log lines. `stage_lines`: every stage is announced by a line of its own.

    `best` and `training` say, when the job is interrupted, how far it came.
    """

    def __init__(self, bar: Progress, scalars: Scalars | None = None, *, stage_lines: bool = False) -> None:
        self._bar, self._scalars, self._stage_lines = bar, scalars or Scalars(), stage_lines
        self._task: TaskID = bar.add_task("preparing", total=None, note="")
        self._baseline = ""
        self.best = ""
        self.training = False

    def on_stage(self, stage: str, number: int = 1, count: int = 1, finished: bool = False) -> None:
        line = f"{number}/{count} {stage}{': finished before' if finished else ''}"
        if self._stage_lines:
            messages.print(line)
        log.info("%s", line)
        self._restart(stage, None)

    def on_note(self, note: str) -> None:
        messages.print(note)
        log.info("%s", note)

    def on_search_start(self, evaluations: int, baselines: Mapping[str, float]) -> None:
        self._scalars.on_search_start(evaluations, baselines)
        finite = {name: loss for name, loss in baselines.items() if math.isfinite(loss)}
        ranked = sorted(finite, key=finite.__getitem__)
        line = "baselines: " + ", ".join(f"{name} {finite[name]:.4f}" for name in ranked)
        self._baseline = f" ({ranked[0]} {finite[ranked[0]]:.4f})" if ranked else ""
        if ranked and self._bar.console.is_terminal:
            self._bar.console.print(line)
        log.info("search of at most %d evaluations; %s", evaluations, line)
        self._restart("search", evaluations)

    def on_search_progress(self, progress: SearchProgress) -> None:
        self._scalars.on_search_progress(progress)
        note = f"best loss {progress.best_loss:.4f}{self._baseline}"
        self.best = f"interrupted after {progress.evaluations} evaluations; {note}"
        log.info("evaluation %d: %s", progress.evaluations, note)
        self._bar.update(self._task, completed=progress.evaluations, note=note)

    def on_recover_length(self, length: int) -> None:
        log.info("recover %d tokens", length)
        self._bar.update(self._task, description=f"recover {length}")

    def on_train_start(self, steps: int, first: int) -> None:
        self.training = True
        log.info("training: %d steps, %d done", steps, first)
        self._restart("train", steps, completed=first)

    def on_train_progress(self, progress: TrainProgress | Any) -> None:
        note = f"loss {progress.loss:.4f}, {progress.tokens_per_second:,.0f} tokens/s"
        log.info("step %d: %s", progress.step, note)
        self._bar.update(self._task, completed=progress.step, note=note)

    def on_eval_start(self, steps: int) -> None:
        log.info("evaluation of %d samples", steps)
        self._restart("evaluate", steps)

    def on_eval_step(self) -> None:
        self._bar.advance(self._task)

    def _restart(self, what: str, total: int | None, completed: int = 0) -> None:
        self._bar.reset(self._task, description=what, total=total, completed=completed, note="")

    # Messages after Ctrl-C.

    def after_search(self, out: Path) -> str:
        """The message after an interrupted search into the folder `out`."""
        if not (out / SEARCH_LOG).exists():
            return "interrupted before the first evaluation; nothing was written"
        best = f"{self.best}\n" if self.best else ""
        return f"{best}the log is complete up to here; continue with: {resume_command()}"

    def after_evaluation(self, log: Path | None) -> str:
        """The message after an interrupted evaluation that keeps finished tasks in `log`."""
        if log is None or not log.exists():
            return ""
        return f"finished tasks are kept in {log}; continue with: {resume_command()}"

    def after_training(self) -> str:
        """The message after an interrupted fine-tuning run."""
        return f"interrupted; continue from the last checkpoint with: {resume_command()}" if self.training else ""


class Scalars(Callbacks):
    """Writes progress to TensorBoard; to nothing without a writer.

    `search/best_loss` by evaluation, each baseline as a level line `baseline/NAME` over the same steps, and perplexity
    as `perplexity/NAME` by length in tokens.
    """

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    def on_search_start(self, evaluations: int, baselines: Mapping[str, float]) -> None:
        for name, loss in baselines.items():
            for step in (0, evaluations):
                self._add(f"baseline/{name}", loss, step)

    def on_search_progress(self, progress: SearchProgress) -> None:
        self._add("search/best_loss", progress.best_loss, progress.evaluations)

    def measured(self, rows: Sequence[EvalRow]) -> None:
        for row in rows:
            if row.metric == "perplexity":
                self._add(f"perplexity/{row.scaling}", row.value, row.length)

    def _add(self, name: str, value: float, step: int) -> None:
        if self._writer is not None and math.isfinite(value):
            self._writer.add_scalar(name, value, step)


@contextmanager
def scalars_in(log_dir: Path | None) -> Iterator[Scalars]:
    """Scalars into `log_dir`; nothing is written where that is None. Written scalars stay when a run is stopped."""
    if log_dir is None:
        yield Scalars()
        return
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(str(log_dir))
    except OSError as error:
        raise LongRopeError(
            f"cannot write to `log_dir` {log_dir}: {error.strerror}", code="output-not-writable"
        ) from error
    try:
        yield Scalars(writer)
    finally:
        writer.close()


@contextmanager
def progress(
    interrupted: Callable[[Display], str], scalars: Scalars | None = None, *, stage_lines: bool = False
) -> Iterator[Display]:
    """Callbacks that show a job on standard error; no bar where that is not a terminal.

    On Ctrl-C, the message of `interrupted` is printed: the files left behind and the command to go on.
    """
    shown = messages.is_terminal and not messages.quiet
    with Progress(*COLUMNS, console=messages, transient=True, disable=not shown) as bar:
        display = Display(bar, scalars, stage_lines=stage_lines)
        try:
            yield display
        except KeyboardInterrupt:
            bar.stop()
            if note := interrupted(display):
                messages.print(note)
            raise


def resume_command() -> str:
    """The command that continues this run."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return shlex.join(["longrope", *arguments, "--resume"])
