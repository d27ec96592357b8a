"""The search log: an append-only JSONL file of all evaluations. It is the whole state of a search.

The first line identifies the search (settings, samples, model); every further line is one evaluation. Each line ends in
a checksum and is written in one piece, so a killed process leaves whole lines; a last line that was cut off does not
count. No pickles: a log is safe to read from anyone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.checks import shown
from longrope.errors import LongRopeError
from longrope.locked import LineLog, log_lines, nothing_to_resume
from longrope.storage import ANOTHER_FOLDER, json_number

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

    schema, another = SCHEMA, ANOTHER_FOLDER

    def __init__(self, path: Path) -> None:
        self.rows: list[LogRow] = []
        super().__init__(path)

    def _load(self, header: dict[str, Any], content: bytes) -> None:
        found, self.rows = read_log(self.path, content)
        differing = sorted(key for key in header if key != "record" and found.get(key) != header[key])
        if differing:
            key = differing[0]
            log, now = found.get(key), header[key]
            if isinstance(log, dict) and isinstance(now, dict):
                inner = next(name for name in sorted(log.keys() | now.keys()) if log.get(name) != now.get(name))
                key, log, now = f"{key}.{inner}", log.get(inner), now.get(inner)
            raise LongRopeError(
                f"{self.path} is the log of another search: {', '.join(differing)} differ "
                f"(log: {key} = {shown(log)}, now: {shown(now)})",
                code="other-run",
                hint="use the same settings or another `output_dir`",
            )

    def append(self, row: LogRow) -> None:
        """Write one evaluation. Raises LongRopeError when it cannot be written; the lines before it are kept."""
        self.write(row.to_json())
        self.rows.append(row)


def read_log(path: Path, content: bytes | None = None) -> tuple[dict[str, Any], list[LogRow]]:
    """Header and evaluations of a log. Raises LongRopeError when it is missing, of another schema, or damaged.

    `content`: the bytes of the file where it is open already.
    """
    try:
        lines, wrong = log_lines(path.read_bytes() if content is None else content)
    except FileNotFoundError as error:
        raise nothing_to_resume(path) from error
    except OSError as error:
        raise LongRopeError(f"cannot read the search log {path}: {error.strerror}", code="damaged-file") from error
    if not lines:
        raise LongRopeError(
            f"{path} ends before its first line does, so there is nothing to resume",
            code="damaged-file",
            hint="remove it and start anew",
        )
    try:
        header = json.loads(lines[0])
    except (ValueError, RecursionError) as error:
        raise LongRopeError(f"{path} is no search log: its first line is not JSON", code="damaged-file") from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        found = header.get("schema") if isinstance(header, dict) else None
        raise LongRopeError(f"{path}: expected a search log of schema {SCHEMA}, found {found!r}", code="damaged-file")
    if wrong == 1:
        raise _damaged(path, 1, f"the settings that were written, found {shown(lines[0])}")
    rows: list[LogRow] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = LogRow.from_json(line)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise _damaged(path, number, f"one evaluation, found {line[:40]!r}") from error
        if row.index != len(rows):
            raise _damaged(path, number, f"evaluation {len(rows)}, found {row.index}")
        if number == wrong:
            raise _damaged(path, number, f"evaluation {row.index} as it was written (its checksum is another)")
        rows.append(row)
    return header, rows


def _damaged(path: Path, line: int, expected: str) -> LongRopeError:
    again = f"keep the {line - 1} lines before it, and the rest is computed again" if line > 1 else "start anew"
    return LongRopeError(
        f"{path} is damaged in line {line}: expected {expected}", code="damaged-file", hint=f"put it back, or {again}"
    )
