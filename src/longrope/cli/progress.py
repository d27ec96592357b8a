"""The progress of a job: a bar on a terminal, else a log line at least once a minute; and how to go on after Ctrl-C."""

from __future__ import annotations

import math
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from longrope.callbacks import Callbacks, SearchProgress, TrainProgress
from longrope.cli.common import is_verbose, log, messages
from longrope.cli.scalars import Scalars, scalars_in
from longrope.cli.stopping import stop_after_step, stop_at_once
from longrope.cli.verb import split_names
from longrope.quantities import format_duration, format_rate
from longrope.run_files import SEARCH_LOG
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.evaluation.results import EvalRow

EVERY = 60.0
"""Seconds between two log lines without a terminal, whether something has happened or not."""


class TimeColumn(ProgressColumn):
    """The time that has passed and the time that is left, in words."""

    def render(self, task: Task) -> Text:
        passed = f"{format_duration(task.elapsed or 0.0)} elapsed"
        left = "" if task.time_remaining is None else f", {format_duration(task.time_remaining)} left"
        return Text(passed + left)


def job_bar(console: Console, **options: Any) -> Progress:
    """A bar as wide as `console`; its speed is that of the last 1,000 steps, however long they take."""
    return Progress(*COLUMNS, console=console, expand=True, speed_estimate_period=math.inf, **options)


COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
    MofNCompleteColumn(),
    TimeColumn(table_column=Column(no_wrap=True)),
    TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
)


class Lines:
    """The progress of a job as log lines on standard error, for Slurm, nohup and pipes.

    The first step of every part of a job gives a line at once; after that there is one every `every` seconds, even
    where a single step takes longer, with the rate and the time left. `shown=False`: no lines.
    """

    def __init__(self, shown: bool = True, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self._shown, self._every, self._clock = shown, every, clock
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._what, self._unit, self._total, self._note = "", "", 0, ""
        self._done = self._first = 0
        self._begun = self._last = clock()
        self._steps = False

    def begin(self, what: str, unit: str = "", total: int = 0, done: int = 0) -> None:
        """A part of the job begins, of `total` steps of which `done` were done before; without `unit`, one without
        steps."""
        with self._lock:
            self._what, self._unit, self._total, self._note = what, unit, total, ""
            self._done = self._first = done
            self._begun = self._last = self._clock()
            self._steps = False

    def step(self, done: int, note: str = "", *, replayed: bool = False) -> None:
        """`done` steps are done; `replayed`: without work, from the log of an earlier run."""
        with self._lock:
            self._done, self._note = done, note
            if replayed:
                self._first, self._begun = done, self._clock()
            elif not self._steps or self._clock() - self._last >= self._every:
                self._steps = True
                self._print()

    def watch(self) -> None:
        """Print a line whenever none was printed for `every` seconds, until `close`."""
        while not self._closed.wait(min(1.0, self._every)):
            with self._lock:
                if self._what and self._clock() - self._last >= self._every:
                    self._print()

    def close(self) -> None:
        """No further lines."""
        self._closed.set()

    def _print(self) -> None:
        self._last = self._clock()
        if self._shown:
            messages.print(f"{time.strftime('%H:%M:%S')} {self.line()}")

    def line(self) -> str:
        """`search: 40 of 138 evaluations, 2.3 a second, best loss 4.1313, 43 s left`."""
        passed, steps = self._clock() - self._begun, self._done - self._first
        if not self._unit:
            return f"{self._what}: {format_duration(passed)} elapsed"
        parts = [f"{self._what}: {self._done} of {self._total} {self._unit}"]
        if steps and passed > 0:
            parts.append(format_rate(steps / passed))
        parts += [self._note] if self._note else []
        if not steps:
            parts.append(f"{format_duration(passed)} elapsed")
        elif self._total > self._done:
            parts.append(f"{format_duration((self._total - self._done) * passed / steps)} left")
        return ", ".join(parts)


class Stoppable(Callbacks):
    """For a process that shows nothing: a stop is noted, and the process goes on until the first one stops."""

    def stop_requested(self) -> bool:
        return stop_after_step()


class Display(Stoppable):
    """A progress bar for what runs now, or `lines`. `stage_lines`: every stage is announced by a line of its own.

    `best` and `training` say, when the job is interrupted, how far it came.
    """

    def __init__(
        self,
        bar: Progress,
        scalars: Scalars | None = None,
        *,
        stage_lines: bool = False,
        lines: Lines | None = None,
    ) -> None:
        self._bar, self._scalars, self._stage_lines = bar, scalars or Scalars(), stage_lines
        self._lines, self._measured = lines or Lines(shown=False), 0
        self._task: TaskID = bar.add_task("preparing", total=None, note="")
        self._baseline = ""
        self._where, self._said = "", ""
        self.best = ""
        self.training = False

    def on_stage(self, stage: str, number: int = 1, count: int = 1, finished: bool = False) -> None:
        stop_at_once()
        line = f"{number}/{count} {stage}{': finished before' if finished else ''}"
        if self._stage_lines:
            messages.print(line)
        log.info("%s", line)
        self._lines.begin(stage)
        self._restart(stage, None)

    def on_note(self, note: str) -> None:
        messages.print(note)
        log.info("%s", note)

    def on_device(self, where: str) -> None:
        log.info("%s", where)
        self._where = where

    def _say_where(self) -> None:
        """Print where the job computes, with its first step: a job that is refused there has one line, the error."""
        if self._where != self._said:
            self._said = self._where
            if not is_verbose():  # there it is logged
                messages.print(self._where)

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
        self._lines.begin("search", "evaluations at most", evaluations)

    def on_search_progress(self, progress: SearchProgress) -> None:
        self._scalars.on_search_progress(progress)
        if not progress.replayed:
            self._say_where()
        note = self._best_loss(progress)
        self.best = f"interrupted after {progress.evaluations} evaluations; {note}"
        log.info("evaluation %d: %s", progress.evaluations, note)
        self._bar.update(self._task, completed=progress.evaluations, note=note.replace("best loss", "best"))
        self._lines.step(progress.evaluations, note, replayed=progress.replayed)

    def _best_loss(self, progress: SearchProgress) -> str:
        """The best loss: at the target with the best baseline, of a shorter window with its length alone."""
        if not math.isfinite(progress.best_loss):
            return f"no best loss yet{self._baseline}"
        if progress.length is not None:
            return f"best loss {progress.best_loss:.4f} at {format_length(progress.length)} tokens"
        loss = progress.best_loss if progress.search_loss is None else progress.search_loss
        return f"best loss {loss:.4f}{self._baseline}"

    def on_recover_length(self, length: int) -> None:
        log.info("recover %d tokens", length)
        self._bar.update(self._task, description=f"recover {length}")

    def on_train_start(self, steps: int, first: int) -> None:
        self.training = True
        log.info("training: %d steps, %d done", steps, first)
        self._restart("train", steps, completed=first)
        self._lines.begin("train", "steps", steps, first)

    def on_train_progress(self, progress: TrainProgress | Any) -> None:
        self._say_where()
        note = f"loss {progress.loss:.4f}, {progress.tokens_per_second:,.0f} tokens/s"
        log.info("step %d: %s", progress.step, note)
        self._bar.update(self._task, completed=progress.step, note=note)
        self._lines.step(progress.step, note)

    def on_eval_start(self, steps: int) -> None:
        log.info("evaluation of %d samples", steps)
        self._restart("evaluate", steps)
        self._measured = 0
        self._lines.begin("evaluate", "samples", steps)

    def on_eval_step(self) -> None:
        self._say_where()
        self._measured += 1
        self._bar.advance(self._task)
        self._lines.step(self._measured)

    def measured(self, rows: Sequence[EvalRow]) -> None:
        """The results of an evaluation, for the scalars."""
        self._scalars.measured(rows)

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


@contextmanager
def progress(
    interrupted: Callable[[Display], str],
    log_dir: Path | None = None,
    report_to: str = "",
    *,
    stage_lines: bool = False,
) -> Iterator[Display]:
    """Callbacks that show a job on standard error: a bar on a terminal, log lines without one.

    Scalars go to TensorBoard's `log_dir` and to the trackers of `report_to`.

    On Ctrl-C, the message of `interrupted` is printed: the files left behind and the command to go on.
    """
    shown = messages.is_terminal and not messages.quiet
    lines = Lines(shown=not messages.is_terminal and not is_verbose())  # with --verbose every step is logged
    watch = threading.Thread(target=lines.watch, daemon=True)
    with (
        scalars_in(log_dir, split_names(report_to or None, "report_to")) as scalars,
        job_bar(messages, disable=not shown, transient=True) as bar,
    ):
        display = Display(bar, scalars, stage_lines=stage_lines, lines=lines)
        watch.start()
        try:
            yield display
        except KeyboardInterrupt:
            bar.stop()
            lines.close()
            if note := interrupted(display):
                messages.print(note)
            raise
        finally:
            lines.close()
            watch.join()


def resume_command() -> str:
    """The command that continues this run."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    processes: Any = sys.modules.get("longrope.models.processes")  # imported by jobs that know several
    return ("" if processes is None else processes.launcher()) + shlex.join(["longrope", *arguments, "--resume"])
