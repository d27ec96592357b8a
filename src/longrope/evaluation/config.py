"""What the suites of an evaluation can be told, validated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longrope.errors import LongRopeError
from longrope.evaluation.harness import HarnessTask
from longrope.evaluation.ruler.suite import PUBLISHED
from longrope.evaluation.ruler.tasks import TASKS

QA_TASK = "qa_1"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """The suites' options.

    `samples`: texts of perplexity and retention; `stride` chooses perplexity's sliding form. `trials`: passkeys per
    length, needles per depth and length, samples per RULER task and length. `depths`: rows of the needle grid.
    `needles`: in one document, by default as many as leave half of the shortest documents text. `ruler_tasks`: by
    default all, `qa_1` only with a `qa_file`. `threshold` and `share`: of RULER's effective length, absolute and
    relative to the score inside the original window. `tasks`: lm-eval's, for retention; `task_limit` questions of each,
    `task_batch` texts at once.

    Raises LongRopeError for what is out of range.
    """

    samples: int = 10
    stride: int | None = None
    trials: int = 30
    depths: int = 10
    needles: int | None = None
    ruler_tasks: tuple[str, ...] = ()
    qa_file: Path | None = None
    threshold: float = PUBLISHED
    share: float = PUBLISHED / 100
    tasks: tuple[HarnessTask, ...] = ()
    task_limit: int | None = None
    task_batch: int = 1

    def __post_init__(self) -> None:
        """Refuse what no suite can do."""
        for name in ("samples", "trials", "depths", "needles", "task_limit", "task_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LongRopeError(f"expected {name} of at least 1, found {value}")
        if unknown := [task for task in self.ruler_tasks if task not in TASKS]:
            raise LongRopeError(f"expected RULER tasks of {', '.join(TASKS)}; found {', '.join(unknown)}")
        if QA_TASK in self.ruler_tasks and self.qa_file is None:
            raise LongRopeError(f"RULER's {QA_TASK} needs a file of questions in SQuAD's format (--qa-file)")
        if not 0 < self.threshold <= 100 or not 0 < self.share <= 1:
            raise LongRopeError(
                "expected a threshold above 0, up to 100, and a share above 0, up to 1; "
                f"found {self.threshold:g} and {self.share:g}"
            )

    @property
    def chosen_ruler_tasks(self) -> tuple[str, ...]:
        """RULER's tasks in its order."""
        chosen = self.ruler_tasks or tuple(task for task in TASKS if task != QA_TASK or self.qa_file is not None)
        return tuple(task for task in TASKS if task in chosen)
