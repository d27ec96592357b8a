"""The finished cells of an evaluation, in an append-only JSONL beside its output: what a run that was killed keeps.

A cell is one suite (or one of its tasks) at one length for one contender. The first line says what the run is; every
further line is one cell, written in one piece and flushed. Not the result (results.py), which is written at the end.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalRow, row_from_json
from longrope.files import json_number
from longrope.linelog import LineLog

SCHEMA = "longrope.eval-cells/1"


@dataclass(frozen=True, slots=True)
class CellKey:
    """Which cell: the contender's name, the suite, the task in it ("" where it has none), the length in tokens."""

    scaling: str
    suite: str
    task: str
    length: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A finished cell: its rows, the hash of the samples they were measured on ("" where lm-eval chose them), and the
    documents those were taken from, SHA-256 -> name."""

    key: CellKey
    rows: tuple[EvalRow, ...]
    samples_sha256: str
    documents: dict[str, str]

    def to_json(self) -> str:
        line = asdict(self.key) | {"samples_sha256": self.samples_sha256, "documents": self.documents}
        rows = [
            asdict(row) | {name: json_number(getattr(row, name)) for name in ("value", "stderr")} for row in self.rows
        ]
        return json.dumps(line | {"rows": rows}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Cell:
        cell = json.loads(line)
        key = CellKey(cell["scaling"], cell["suite"], cell["task"], cell["length"])
        for row in cell["rows"]:
            row |= {name: float(row[name]) for name in ("value", "stderr") if row[name] is not None}
        return cls(key, tuple(map(row_from_json, cell["rows"])), cell["samples_sha256"], cell["documents"])


class CellLog(LineLog):
    """An open file of cells, locked against other processes. Use `create` or `resume`, in a `with` block."""

    def __init__(self, path: Path, *, new: bool) -> None:
        """Open and lock. Raises LongRopeError when another process has the file, or there is (not) one already."""
        self.cells: dict[CellKey, Cell] = {}
        try:
            super().__init__(path, new=new)
        except FileExistsError as error:
            raise LongRopeError(
                f"{path} exists, from a run that did not end or whose output was moved: add --resume to go on with it,"
                " or choose another -o"
            ) from error
        except OSError as error:
            if not new and isinstance(error, FileNotFoundError):
                raise LongRopeError(f"there is no {path} to resume; start without --resume") from error
            raise LongRopeError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> CellLog:
        """A new file. Raises LongRopeError when there is one already, or it cannot be written."""
        log = cls(path, new=True)
        try:
            log.write_first(json.dumps({"schema": SCHEMA, **header}, allow_nan=False))
        except OSError as error:
            raise LongRopeError(f"cannot write {path}: {error.strerror}; make room and start again") from error
        return log

    @classmethod
    def resume(cls, path: Path, header: dict[str, Any]) -> CellLog:
        """The file at `path` with its finished cells, ready to go on; a last line that was cut off is dropped.

        Raises LongRopeError when there is none, when a line is damaged, or when it belongs to another run: cells
        measured with other settings, texts, model or versions would not be comparable.
        """
        log = cls(path, new=False)
        try:
            log._read(json.loads(json.dumps(header)))
        except BaseException:
            log.close()
            raise
        return log

    def _read(self, header: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").splitlines()
        try:
            found = json.loads(lines[0]) if lines else {}
        except (ValueError, RecursionError):
            found = {}
        if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
            raise LongRopeError(f"{self.path} holds no cells of an evaluation (schema {SCHEMA}); choose another -o")
        differing = sorted(key for key in header.keys() | found.keys() if header.get(key) != found.get(key))
        if differing:
            raise LongRopeError(
                f"{self.path} is of another evaluation: {', '.join(differing)} differ; use the same command and "
                "versions, or another -o"
            )
        for number, line in enumerate(lines[1:], start=2):
            try:
                cell = Cell.from_json(line)
            except (LongRopeError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise LongRopeError(
                    f"{self.path} is damaged in line {number}: expected a cell, found {line[:40]!r}; delete the line "
                    "to measure it again"
                ) from error
            self.cells[cell.key] = cell
        self.cut(len(whole))

    def append(self, cell: Cell) -> None:
        """Keep a finished cell. Raises LongRopeError when it cannot be written; the cells before it are kept."""
        try:
            self.write(cell.to_json())
        except OSError as error:
            raise LongRopeError(
                f"cannot write {self.path}: {error.strerror}; finished cells are kept, make room and use --resume"
            ) from error
        self.cells[cell.key] = cell
