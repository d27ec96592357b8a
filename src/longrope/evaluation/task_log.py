"""The finished tasks of an evaluation, in an append-only JSONL file beside its output: the state of a killed run.

A task is one suite, or one of its tasks, at one length for one method. The first line says which run the file is of;
each further line is one finished task, written in one piece and ending in a checksum. The result itself is in
results.py, written at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalRow, row_from_json
from longrope.locked import LineLog, log_lines
from longrope.storage import json_number, nothing_left_if_refused

_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # what a changed line raises


@dataclass(frozen=True, slots=True)
class TaskKey:
    """The key of a result: the method's name, the suite, the task in it ("" for a suite without tasks), the length in
    tokens."""

    scaling: str
    suite: str
    task: str
    length: int


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The result of one task for one method.

    `samples_sha256` is the hash of the samples ("" where lm-eval chose them); `documents` maps the SHA-256 of the
    documents that they were taken from to their names.
    """

    key: TaskKey
    rows: tuple[EvalRow, ...]
    samples_sha256: str
    documents: dict[str, str]

    def to_json(self) -> str:
        """One line. NaN and infinity are written as their names, so that they come back."""
        line = asdict(self.key) | {"samples_sha256": self.samples_sha256, "documents": self.documents}
        rows = [
            row.to_json() | {name: json_number(getattr(row, name)) for name in ("value", "stderr")} for row in self.rows
        ]
        return json.dumps(line | {"rows": rows}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> TaskResult:
        """The result that `to_json` wrote as `line`. Raises what `json`, a missing key or a wrong field raises."""
        result = json.loads(line)
        key = TaskKey(result["scaling"], result["suite"], result["task"], result["length"])
        texts = [key.scaling, key.suite, key.task, result["samples_sha256"], *result["documents"].values()]
        if not all(isinstance(text, str) for text in texts) or type(key.length) is not int:
            raise TypeError("names and hashes are texts, a length is a whole number")
        for row in result["rows"]:
            row |= {name: float(row[name]) for name in ("value", "stderr") if row[name] is not None}
        return cls(key, tuple(map(row_from_json, result["rows"])), result["samples_sha256"], result["documents"])


class TaskLog(LineLog):
    """An open log of finished tasks, locked against other processes. Use `create` or `resume`, in a `with` block."""

    schema = "longrope.eval-cells/1"

    def __init__(self, path: Path) -> None:
        self.results: dict[TaskKey, TaskResult] = {}
        super().__init__(path)

    def _load(self, header: dict[str, Any], content: bytes) -> None:
        try:
            lines, wrong = log_lines(content)
            found = json.loads(lines[0]) if lines else {}
        except (ValueError, RecursionError):
            found = {}
        if not isinstance(found, dict) or found.pop("schema", None) != self.schema:
            raise LongRopeError(
                f"{self.path} is no log of an evaluation (schema {self.schema})",
                code="other-schema",
                hint=self.another,
            )
        keys = (header.keys() | found.keys()) - {"warnings"}  # sentences about the other settings
        differing = sorted(key for key in keys if header.get(key) != found.get(key))
        if differing:
            raise LongRopeError(
                f"{self.path} is of another evaluation: {', '.join(differing)} differ",
                code="other-run",
                hint="use the same settings and versions, or choose another `output`",
            )
        if wrong == 1:
            raise self._damaged(1, "the settings as they were written")
        for number, line in enumerate(lines[1:], start=2):
            try:
                result = TaskResult.from_json(line)
            except (LongRopeError, *_DAMAGE) as error:
                raise self._damaged(number, f"a finished task, found {line[:40]!r}") from error
            if number == wrong:
                raise self._damaged(number, "the finished task as it was written (its checksum is another)")
            self.results[result.key] = result

    def _damaged(self, line: int, expected: str) -> LongRopeError:
        return LongRopeError(
            f"{self.path} is damaged in line {line}: expected {expected}",
            code="damaged-file",
            hint="delete the line to measure it again" if line > 1 else self.another,
        )

    def append(self, result: TaskResult) -> None:
        """Keep a finished task. Raises LongRopeError when it cannot be written; the tasks before it are kept."""
        self.write(result.to_json())
        self.results[result.key] = result


@contextmanager
def task_log(path: Path | None, settings: dict[str, Any], resume: bool) -> Iterator[TaskLog | None]:
    """The log at `path` of an evaluation with these settings, to go on with or new; None without a path.

    Of a new one that is refused before its first task is finished, nothing stays.
    """
    if path is None:
        yield None
    elif resume:
        with TaskLog.resume(path, settings) as log:
            yield log
    else:
        with nothing_left_if_refused(path.parent) as output, TaskLog.create(path, settings) as log:
            output.wrote(path)
            try:
                yield log
            finally:
                if log.results:
                    output.keep()


def samples_of(measured: Sequence[TaskResult]) -> dict[str, Any]:
    """The documents that were measured on, and the hashes of the samples by suite, task and length, for the settings of
    the results.
    """
    documents = {digest: name for result in measured for digest, name in result.documents.items()}
    samples = {
        " ".join(filter(None, (result.key.suite, result.key.task, str(result.key.length)))): result.samples_sha256
        for result in measured
        if result.samples_sha256
    }
    return {
        "document_sha256": sorted(documents),
        "documents": sorted(set(documents.values())),
        "samples_sha256": samples,
    }
