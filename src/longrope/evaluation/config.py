"""The settings of an evaluation's suites, each written once. Light to import: the suites themselves are not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from longrope.errors import LongRopeError
from longrope.settings import MOST, Settings

SuiteName = Literal["perplexity", "passkey", "needle", "ruler", "retention", "open-llm"]
SUITE_NAMES: tuple[str, ...] = get_args(SuiteName)
"""The suites in the order of the results."""
RulerTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
]
RULER_TASKS: tuple[str, ...] = get_args(RulerTask)
QA_TASK = "qa_1"
PUBLISHED_SCORE = 85.6
"""RULER's published score at an effective length: that of Llama-2-7B at 4,096 tokens."""


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """A task of lm-eval: its name or the path of a YAML file, and the solved examples before each question (None: the
    task's own number)."""

    name: str
    shots: int | None = None

    @classmethod
    def parse(cls, text: str) -> HarnessTask:
        """`arc_challenge`, `arc_challenge:25`, `tasks/own.yaml:0`. Raises LongRopeError for anything else."""
        name, colon, shots = text.strip().rpartition(":")
        if not colon or not shots.isdecimal():
            name, shots = text.strip(), ""
        if not name or ":" in name:
            raise LongRopeError(
                f"expected a task of lm-eval as NAME or NAME:SHOTS, found {text!r}", code="invalid-setting"
            )
        return cls(name, int(shots) if shots else None)

    def __str__(self) -> str:
        return self.name if self.shots is None else f"{self.name}:{self.shots}"

    @property
    def is_file(self) -> bool:
        return Path(self.name).suffix in (".yaml", ".yml")


def _task(value: Any) -> Any:
    return HarnessTask.parse(value) if isinstance(value, str) else value


class EvalConfig(Settings):
    """The settings of the suites of an evaluation."""

    samples: int = Field(10, ge=1, le=MOST)
    """Perplexity and short-context quality: texts of each length, one per document first."""
    stride: int | None = Field(None, ge=1, le=MOST)
    """Perplexity: tokens that a sliding window moves by (the paper's: 256). Default: no sliding window."""
    trials: int = Field(30, ge=1, le=MOST)
    """Passkeys of each length, needles of each depth and length, samples of each RULER task and length."""
    depths: int = Field(10, ge=1, le=MOST)
    """Needles: depths from the start of a text to its end."""
    needles: int | None = Field(None, ge=1, le=MOST)
    """Needles: how many share a document. Default: as many as leave half of the shortest documents to the text."""
    ruler_tasks: tuple[RulerTask, ...] = ()
    """RULER: its tasks. Default: all that need no file."""
    qa_file: Path | None = None
    """RULER: questions in SQuAD's format, for the task qa_1."""
    threshold: float = Field(PUBLISHED_SCORE, gt=0, le=100)
    """RULER: the score that a length must reach to be an effective length."""
    share: float = Field(PUBLISHED_SCORE / 100, gt=0, le=1)
    """RULER: the score of a second, relative effective length, as a share of the model's own inside its original
    window."""
    tasks: tuple[Annotated[HarnessTask, BeforeValidator(_task)], ...] = ()
    """Short-context quality: tasks of lm-eval by name or YAML file, with the number of examples: arc_challenge:25."""
    task_limit: int | None = Field(None, ge=1, le=MOST)
    """lm-eval: questions of each task that are asked. Default: all."""
    task_batch: int = Field(1, ge=1, le=MOST)
    """lm-eval: texts in a batch."""

    OF_SUITES: ClassVar[dict[str, tuple[SuiteName, ...]]] = {
        "stride": ("perplexity",),
        "needles": ("needle",),
        "ruler_tasks": ("ruler",),
        "qa_file": ("ruler",),
        "threshold": ("ruler",),
        "share": ("ruler",),
        "tasks": ("retention",),
        "task_limit": ("retention", "open-llm"),
        "task_batch": ("retention", "open-llm"),
    }
    """Setting -> the suites that use it; the budgets `samples`, `trials` and `depths` may stand in any."""

    def refuse_unused(self, suites: Sequence[str], names: Sequence[str] = ()) -> None:
        """Raise LongRopeError for a setting that was given and that none of `suites` uses; only of `names`, if any.

        Raises LongRopeError for questions of a task of RULER that was not chosen, too.
        """
        for name, users in self.OF_SUITES.items():
            given = name in self.model_fields_set and getattr(self, name) is not None
            unused = given and not set(users) & set(suites)
            if unused and name in (names or self.OF_SUITES):
                raise LongRopeError(
                    f"`{name}` is a setting of {' and '.join(users)}; found {', '.join(suites)} in `suites`",
                    code="setting-of-another-suite",
                    hint="leave it out",
                )
        if self.qa_file is not None and QA_TASK not in self.chosen_ruler_tasks:
            raise LongRopeError(
                f"`qa_file` holds the questions of RULER's {QA_TASK}; found `ruler_tasks` of "
                f"{', '.join(self.chosen_ruler_tasks)}",
                code="setting-of-another-suite",
                hint="leave it out",
            )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if QA_TASK in self.ruler_tasks and self.qa_file is None:
            raise LongRopeError(
                f"RULER's {QA_TASK} needs a file of questions in SQuAD's format",
                code="missing-file",
                hint="give it as `qa_file`",
            )
        return self

    @property
    def chosen_ruler_tasks(self) -> tuple[str, ...]:
        """RULER's tasks in its order."""
        if self.ruler_tasks:
            return tuple(task for task in RULER_TASKS if task in self.ruler_tasks)
        return tuple(task for task in RULER_TASKS if task != QA_TASK or self.qa_file is not None)
