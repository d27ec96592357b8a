"""What a terminal shows of a running search: the best loss, the baselines, evaluations and the time left."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress as Bar

from longrope.cli.common import messages
from longrope.cli.tensorboard import Scalars
from longrope.run_files import SEARCH_LOG

if TYPE_CHECKING:
    from longrope.search.loop import Progress


class SearchWatch:
    """Follows one search on a progress bar and in `scalars`, and knows the best loss when it is interrupted."""

    def __init__(self, bar: Bar, scalars: Scalars | None = None) -> None:
        self._bar = bar
        self._scalars = scalars or Scalars()
        self._task = bar.add_task("preparing", total=None, note="")
        self._baseline: tuple[str, float] | None = None
        self._latest: Progress | None = None

    def start(self, evaluations: int, baselines: dict[str, float]) -> None:
        """The number of evaluations to come, and the baselines' losses, which stay above the bar."""
        self._scalars.start(evaluations, baselines)
        finite = {name: loss for name, loss in baselines.items() if math.isfinite(loss)}
        ranked = sorted(finite, key=finite.__getitem__)
        if ranked:
            self._baseline = (ranked[0], finite[ranked[0]])
        if ranked and self._bar.console.is_terminal:
            self._bar.console.print("baselines: " + ", ".join(f"{name} {finite[name]:.4f}" for name in ranked))
        self._bar.update(self._task, description="search", total=evaluations)

    def update(self, progress: Progress) -> None:
        self._latest = progress
        self._scalars.update(progress)
        self._bar.update(self._task, completed=progress.evaluations, note=self._note(progress))

    @contextmanager
    def interruptible(self, out: Path) -> Iterator[None]:
        """On Ctrl-C, say what is left behind in `out`: the best so far and the command that goes on."""
        try:
            yield
        except KeyboardInterrupt:
            self._bar.stop()
            if not (out / SEARCH_LOG).exists():
                messages.print("interrupted before the first evaluation; nothing was written")
                raise
            done = self._latest
            if done is not None:
                messages.print(f"interrupted after {done.evaluations} evaluations; {self._note(done)}")
            messages.print(f"the log is complete up to here; continue with: {resume_command()}")
            raise

    def _note(self, progress: Progress) -> str:
        note = f"best loss {progress.best_loss:.4f}"
        if self._baseline is not None:
            note += f" ({self._baseline[0]} {self._baseline[1]:.4f})"
        return note


def resume_command() -> str:
    """The command that continues this run."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return shlex.join(["longrope", *arguments, "--resume"])
