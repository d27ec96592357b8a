"""Progress of long jobs: one class of callbacks for searches, fine-tuning, evaluations, recipes and `extend`.

Every job takes `callbacks`; subclass `Callbacks` and override the methods that a display or a logger needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """The state of a search after an evaluation; losses in nats per token."""

    evaluations: int
    best_loss: float
    """The loss that the best window so far was chosen by; infinity before there is one."""
    replayed: bool
    """True if the result came from the log of an interrupted run."""
    length: int | None = None
    """The length in tokens of that window where it is shorter than the target of the search, so that its loss does not
    compare with those of the baselines; None at the target."""
    search_loss: float | None = None
    """The loss of that window on the search texts alone, which compares with those of the baselines; None where
    `best_loss` is that loss."""


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """The state of a fine-tuning run after an optimizer step; `loss` in nats per token."""

    step: int
    loss: float
    tokens_per_second: float


class Stopped(KeyboardInterrupt):
    """The job was asked to stop, by a signal or a time limit, and can be resumed; the message says by what."""


class Callbacks:
    """Methods that a job calls while it works. In this base class they do nothing."""

    def on_stage(self, stage: str, number: int = 1, count: int = 1, finished: bool = False) -> None:
        """Stage `number` of `count` begins; `finished`: an earlier run has done it already."""

    def on_note(self, note: str) -> None:
        """Something that the user should know before the job spends time, as one sentence."""

    def on_device(self, where: str) -> None:
        """A job is about to compute; `where`: on which device or devices, and in which dtype, as one sentence."""

    def on_search_start(self, evaluations: int, baselines: Mapping[str, float]) -> None:
        """A search of at most `evaluations` begins; `baselines`: loss of each baseline in nats per token."""

    def on_search_progress(self, progress: SearchProgress) -> None:
        """An evaluation has ended."""

    def on_search_end(self, method: str, verdict: str) -> None:
        """A search by `method` has ended; `verdict`: its result against the best baseline, as one sentence."""

    def on_recover_length(self, length: int) -> None:
        """A recovery begins with the window of `length` tokens."""

    def on_train_start(self, steps: int, first: int) -> None:
        """A fine-tuning run of `steps` optimizer steps begins; `first` of them are done already."""

    def stop_requested(self) -> bool:
        """Asked when a fine-tuning begins and after each step: True ends it there, with a checkpoint, by `Stopped`."""
        return False

    def on_train_progress(self, progress: TrainProgress) -> None:
        """An optimizer step has ended."""

    def on_eval_start(self, steps: int) -> None:
        """An evaluation of `steps` samples begins."""

    def on_eval_step(self) -> None:
        """A sample has been measured."""
