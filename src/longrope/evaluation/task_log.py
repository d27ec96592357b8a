"""The finished tasks of an evaluation, in an append-only JSONL file beside its output: the state of a killed run.

A task is one suite, or one of its tasks, at one length for one method. The first line says which run the file is of;
each further line is one finished task, written in one piece. The result itself is in results.py, written at the end.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalRow, row_from_json
from longrope.storage import LineLog, json_number

LOG_SCHEMA = "longrope.eval-cells/1"


@dataclass(frozen=True, slots=True)
class TaskKey:
    """The method's name, the suite, the task in it ("" for a suite without tasks), the length in tokens."""

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
            asdict(row) | {name: json_number(getattr(row, name)) for name in ("value", "stderr")} for row in self.rows
        ]
        return json.dumps(line | {"rows": rows}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> TaskResult:
        """The result that `to_json` wrote as `line`. Raises what `json`, a missing key or a wrong field raises."""
        result = json.loads(line)
        key = TaskKey(result["scaling"], result["suite"], result["task"], result["length"])
        for row in result["rows"]:
            row |= {name: float(row[name]) for name in ("value", "stderr") if row[name] is not None}
        return cls(key, tuple(map(row_from_json, result["rows"])), result["samples_sha256"], result["documents"])


class TaskLog(LineLog):
    """An open log of finished tasks, locked against other processes. Use `create` or `resume`, in a `with` block."""

    def __init__(self, path: Path, *, new: bool) -> None:
        """Open and lock. Raises LongRopeError when another process has the file, or there is (not) one already."""
        self.results: dict[TaskKey, TaskResult] = {}
        try:
            super().__init__(path, new=new)
        except FileExistsError as error:
            raise LongRopeError(
                f"{path} exists, from a run that did not end or whose output was moved",
                code="output-exists",
                hint="give `resume=True` to go on with it, or choose another `output`",
            ) from error
        except FileNotFoundError as error:
            if new:
                raise LongRopeError(f"cannot write {path}: {error.strerror}", code="output-not-writable") from error
            raise LongRopeError(
                f"there is no {path} to resume", code="not-resumable", hint="start without `resume=True`"
            ) from error
        except OSError as error:
            raise LongRopeError(f"cannot write {path}: {error.strerror}", code="output-not-writable") from error

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> TaskLog:
        """A new file. Raises LongRopeError when there is one already, or it cannot be written."""
        log = cls(path, new=True)
        try:
            log.write_first(json.dumps({"schema": LOG_SCHEMA, **header}, allow_nan=False))
        except OSError as error:
            raise LongRopeError(
                f"cannot write {path}: {error.strerror}", code="output-not-writable", hint="make room and start again"
            ) from error
        return log

    @classmethod
    def resume(cls, path: Path, header: dict[str, Any]) -> TaskLog:
        """The file at `path` with its finished tasks, ready to go on; a last line that was cut off is dropped.

        Raises LongRopeError when there is none, when a line is damaged, or when it belongs to another run: results
        measured with other settings, texts, model or versions are not comparable.
        """
        log = cls(path, new=False)
        try:
            log._read(json.loads(json.dumps(header)))
        except BaseException:
            log.close()
            raise
        return log

    def _read(self, header: dict[str, Any]) -> None:
        content = self.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").splitlines()
        try:
            found = json.loads(lines[0]) if lines else {}
        except (ValueError, RecursionError):
            found = {}
        if not isinstance(found, dict) or found.pop("schema", None) != LOG_SCHEMA:
            raise LongRopeError(
                f"{self.path} is no log of an evaluation (schema {LOG_SCHEMA})",
                code="other-schema",
                hint="choose another `output`",
            )
        keys = (header.keys() | found.keys()) - {"warnings"}  # sentences about the other settings
        differing = sorted(key for key in keys if header.get(key) != found.get(key))
        if differing:
            raise LongRopeError(
                f"{self.path} is of another evaluation: {', '.join(differing)} differ",
                code="other-run",
                hint="use the same settings and versions, or choose another `output`",
            )
        for number, line in enumerate(lines[1:], start=2):
            try:
                result = TaskResult.from_json(line)
            except (LongRopeError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise LongRopeError(
                    f"{self.path} is damaged in line {number}: expected a finished task, found {line[:40]!r}",
                    code="damaged-file",
                    hint="delete the line to measure it again",
                ) from error
            self.results[result.key] = result
        self.cut(len(whole))

    def append(self, result: TaskResult) -> None:
        """Keep a finished task. Raises LongRopeError when it cannot be written; the tasks before it are kept."""
        try:
            self.write(result.to_json())
        except OSError as error:
            raise LongRopeError(
                f"cannot write {self.path}: {error.strerror}; finished tasks are kept",
                code="output-not-writable",
                hint="make room and go on with `resume=True`",
            ) from error
        self.results[result.key] = result
