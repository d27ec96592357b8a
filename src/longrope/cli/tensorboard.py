"""`--log-dir`: the progress of a search as TensorBoard scalars, where tensorboard is installed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longrope.errors import LongRopeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longrope.evaluation.results import EvalRow
    from longrope.search.loop import Progress


def _require_tensorboard(log_dir: Path | None) -> Path | None:
    """Refuse the option before any work where it cannot be honoured."""
    if log_dir is not None and find_spec("tensorboard") is None:
        raise LongRopeError('--log-dir needs TensorBoard, which is not installed: pip install "tensorboard"')
    return log_dir


LogDir = Annotated[
    Path | None,
    typer.Option("--log-dir", help="Write TensorBoard scalars to this folder.", callback=_require_tensorboard),
]


class Scalars:
    """Writes what a display hears to TensorBoard; to nothing without a writer.

    `search/best_loss` by evaluation, each baseline as a level line `baseline/NAME` over the same steps, and perplexity
    as `perplexity/NAME` by length in tokens.
    """

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    def start(self, evaluations: int, baselines: dict[str, float]) -> None:
        for name, loss in baselines.items():
            for step in (0, evaluations):
                self._add(f"baseline/{name}", loss, step)

    def update(self, progress: Progress) -> None:
        self._add("search/best_loss", progress.best_loss, progress.evaluations)

    def measured(self, rows: Sequence[EvalRow]) -> None:
        for row in rows:
            if row.metric == "perplexity":
                self._add(f"perplexity/{row.scaling}", row.value, row.length)

    def _add(self, name: str, value: float, step: int) -> None:
        if self._writer is not None and math.isfinite(value):
            self._writer.add_scalar(name, value, step)


@contextmanager
def scalars(log_dir: Path | None) -> Iterator[Scalars]:
    """Scalars into `log_dir`; nothing is written where that is None. What was written stays when a run is stopped."""
    if log_dir is None:
        yield Scalars()
        return
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(str(log_dir))
    except OSError as error:
        raise LongRopeError(f"cannot write to --log-dir {log_dir}: {error.strerror}") from error
    try:
        yield Scalars(writer)
    finally:
        writer.close()
