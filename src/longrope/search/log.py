"""The search log: an append-only JSONL file of all evaluations. It is the whole state of a search.

The first line identifies the search (settings, samples, model); every further line is one evaluation. Each line is
written in one piece and flushed, so a killed process leaves whole lines. No pickles: a log is safe to read from anyone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.storage import LineLog, json_number

SCHEMA = "longrope.search/1"


@dataclass(frozen=True, slots=True)
class LogRow:
    """A line of the log: the evaluation number `index`, in the order of the requests, with its batch `generation`.

    `request` is the row of the request. Losses and gradients come back bit for bit, NaN and infinity too.
    """

    index: int
    generation: int
    request: dict[str, Any]
    loss: float
    gradient: tuple[float, ...] | None = None

    def to_json(self) -> str:
        line = {"index": self.index, "generation": self.generation, **self.request, "loss": json_number(self.loss)}
        if self.gradient is not None:
            line["gradient"] = [json_number(value) for value in self.gradient]
        return json.dumps(line, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> LogRow:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise TypeError("a line of the log is a JSON object")
        index, generation, loss = int(row.pop("index")), int(row.pop("generation")), float(row.pop("loss"))
        gradient = row.pop("gradient", None)
        return cls(index, generation, row, loss, None if gradient is None else tuple(map(float, gradient)))


class SearchLog(LineLog):
    """An open log, locked against other processes. Use `create` or `resume`, in a `with` block."""

    def __init__(self, path: Path, *, new: bool) -> None:
        """Open and lock. Raises LongRopeError when another process has the log, or there is (not) one already."""
        self.rows: list[LogRow] = []
        try:
            super().__init__(path, new=new)
        except FileExistsError as error:
            hint = "continue it with `resume=True`, or choose another `output_dir`"
            raise LongRopeError(f"{path} exists", code="output-exists", hint=hint) from error
        except OSError as error:
            if not new and isinstance(error, FileNotFoundError):
                raise _nothing_to_resume(path) from error
            raise LongRopeError(
                f"cannot write the search log {path}: {error.strerror}", code="output-not-writable"
            ) from error

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> SearchLog:
        """A new log. Raises LongRopeError when there is one already."""
        line = json.dumps({"schema": SCHEMA, **header}, allow_nan=False)
        log = cls(path, new=True)
        try:
            log.write_first(line)
        except OSError as error:
            raise LongRopeError(
                f"cannot write the search log {path}: {error.strerror}; nothing was kept",
                code="output-not-writable",
                hint="make room and start again",
            ) from error
        return log

    @classmethod
    def resume(cls, path: Path, header: dict[str, Any]) -> SearchLog:
        """The log at `path`, ready to go on.

        Raises LongRopeError when there is none, when a line is damaged or cut off, or when it belongs to another
        search: resuming with other settings, samples or model would not be the same search.
        """
        log = cls(path, new=False)
        try:
            log.rows = log._checked(header)
        except BaseException:
            log.close()
            raise
        return log

    def _checked(self, header: dict[str, Any]) -> list[LogRow]:
        path = self.path
        found, rows = read_log(path, self.read())
        wanted = json.loads(json.dumps(header))
        differing = sorted(key for key in wanted if key != "record" and found.get(key) != wanted[key])
        if differing:
            key = differing[0]
            raise LongRopeError(
                f"{path} is the log of another search: {', '.join(differing)} differ "
                f"(log: {key} = {_short(found.get(key))}, now: {_short(wanted[key])})",
                code="other-run",
                hint="use the same settings or another `output_dir`",
            )
        return rows

    def append(self, row: LogRow) -> None:
        """Write one evaluation. Raises LongRopeError when it cannot be written; the lines before it are kept."""
        try:
            self.write(row.to_json())
        except OSError as error:
            raise LongRopeError(
                f"cannot write the search log {self.path}: {error.strerror}; the log is valid up to here",
                code="output-not-writable",
                hint="make room and continue with `resume=True`",
            ) from error
        self.rows.append(row)


def read_log(path: Path, content: bytes | None = None) -> tuple[dict[str, Any], list[LogRow]]:
    """Header and evaluations of a log. Raises LongRopeError when it is missing, of another schema, or damaged.

    `content`: the bytes of the file where it is open already.
    """
    try:
        text = (path.read_bytes() if content is None else content).decode("utf-8")
    except FileNotFoundError as error:
        raise _nothing_to_resume(path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise LongRopeError(f"cannot read the search log {path}: {error}", code="damaged-file") from error
    lines = text.split("\n")
    rest = lines.pop()
    if not lines:
        raise LongRopeError(
            f"{path} ends before its first line does, so there is nothing to resume",
            code="damaged-file",
            hint="start anew",
        )
    if rest:
        raise LongRopeError(
            f"{path} is cut off in line {len(lines) + 1}",
            code="damaged-file",
            hint=f"delete that line to continue from the {len(lines) - 1} whole evaluations before it",
        )
    try:
        header = json.loads(lines[0])
    except (ValueError, RecursionError) as error:
        raise LongRopeError(f"{path} is no search log: its first line is not JSON", code="damaged-file") from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        found = header.get("schema") if isinstance(header, dict) else None
        raise LongRopeError(f"{path}: expected a search log of schema {SCHEMA}, found {found!r}", code="damaged-file")
    rows: list[LogRow] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = LogRow.from_json(line)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise _damaged(path, number, f"one evaluation, found {line[:40]!r}") from error
        if row.index != len(rows):
            raise _damaged(path, number, f"evaluation {len(rows)}, found {row.index}")
        rows.append(row)
    return header, rows


def _nothing_to_resume(path: Path) -> LongRopeError:
    hint = "start without `resume=True`"
    return LongRopeError(f"there is no search log at {path} to resume", code="not-resumable", hint=hint)


def _damaged(path: Path, line: int, expected: str) -> LongRopeError:
    return LongRopeError(f"{path} is damaged in line {line}: expected {expected}", code="damaged-file")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
