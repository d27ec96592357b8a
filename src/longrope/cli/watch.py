"""What a terminal shows of a running search: the best loss, the best baseline, evaluations and the time left."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress as Bar

from longrope.cli.common import messages

if TYPE_CHECKING:
    from longrope.search.run import Progress


class SearchWatch:
    """Follows one search on a progress bar, and knows the best loss when it is interrupted."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("preparing", total=None, note="")
        self._baseline: tuple[str, float] | None = None
        self._latest: Progress | None = None

    def start(self, evaluations: int, baselines: dict[str, float]) -> None:
        finite = {name: loss for name, loss in baselines.items() if loss == loss}
        if finite:
            name = min(finite, key=finite.__getitem__)
            self._baseline = (name, finite[name])
        self._bar.update(self._task, description="search", total=evaluations)

    def update(self, progress: Progress) -> None:
        self._latest = progress
        self._bar.update(self._task, completed=progress.evaluations, note=self._note(progress))

    @contextmanager
    def interruptible(self, out: Path) -> Iterator[None]:
        """On Ctrl-C, say what is left behind in `out`: the best so far and the command that goes on."""
        try:
            yield
        except KeyboardInterrupt:
            from longrope.pipeline.search import LOG

            self._bar.stop()
            if not (out / LOG).exists():
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
