"""What a terminal shows of a running search: the best loss, the best baseline, evaluations and the time left."""

from __future__ import annotations

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

    def say_interrupted(self, resume: str) -> None:
        """What Ctrl-C leaves behind: the best so far and the command that goes on."""
        if self._latest is None:
            messages.print("interrupted before the first evaluation; nothing is lost", markup=False)
            return
        messages.print(
            f"interrupted after {self._latest.evaluations} evaluations; the log is complete up to here. "
            f"{self._note(self._latest)}\ncontinue with: {resume}",
            markup=False,
        )

    def _note(self, progress: Progress) -> str:
        note = f"best loss {progress.best_loss:.4f}"
        if self._baseline is not None:
            note += f" ({self._baseline[0]} {self._baseline[1]:.4f})"
        return note
