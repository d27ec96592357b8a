"""The row every suite returns, and the JSON file that a run of suites leaves. Not the cells of a run (cells.py).

The finished cells of an evaluation, in an append-only JSONL beside its output: what a run that was killed keeps.

A cell is one suite (or one of its tasks) at one length for one contender. The first line says what the run is; every
further line is one cell, written in one piece and flushed. Not the result (results.py), which is written at the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.provenance import record
from longrope.storage import LineLog, json_number, json_ready

SCHEMA = "longrope.eval/1"


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One number: `value` of `metric` for `scaling` at `length` tokens, its standard error over `trials`.

    `stderr` is None where one trial gives none. `detail` is what further splits the number: a task, a depth, the
    positions from–to; empty where nothing does.
    """

    suite: str
    scaling: str
    length: int
    metric: str
    value: float
    stderr: float | None
    trials: int
    detail: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Evaluation:
    """Rows of an evaluation, and what is needed to repeat it."""

    rows: list[EvalRow]
    settings: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=record)
    """Versions, machine and command."""

    def to_json(self) -> dict[str, Any]:
        """The file's content; NaN and infinite values, which JSON has not, become null."""
        results = json_ready(rows_to_json(self.rows))
        return {"schema": SCHEMA, "settings": self.settings, "results": results, **self.provenance}


def rows_to_json(rows: Sequence[EvalRow]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def row_from_json(row: Any) -> EvalRow:
    """What `rows_to_json` made of one row. Raises LongRopeError, naming the field, for anything else.

    A null value is one that JSON could not hold, and comes back as NaN.
    """
    if not isinstance(row, dict) or row.keys() != {entry.name for entry in fields(EvalRow)}:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise LongRopeError(f"expected a row of {', '.join(entry.name for entry in fields(EvalRow))}; found {found}")
    values = dict(row)
    values["value"] = math.nan if row["value"] is None else row["value"]
    kinds: dict[str, Any] = {
        **dict.fromkeys(("suite", "scaling", "metric"), str),
        **dict.fromkeys(("length", "trials"), int),
        "value": (int, float),
        "stderr": (int, float, type(None)),
        "detail": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise LongRopeError(f"{name} of a row cannot be {values[name]!r}")
    return EvalRow(**values)


def load_evaluation(path: Path | str) -> Evaluation:
    """Read what `longrope eval -o` wrote.

    Raises LongRopeError, with the path, for a file that is not of this schema or lacks the settings it was measured
    with: a number that cannot be repeated is no result.
    """
    try:
        document = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise LongRopeError(f"cannot read the evaluation {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LongRopeError(f"{path} is no evaluation: expected JSON, found something else") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise LongRopeError(f"{path}: expected an evaluation of schema {SCHEMA!r}, found {schema!r}")
    settings, results = document.pop("settings", None), document.pop("results", None)
    if not isinstance(settings, dict) or not settings:
        raise LongRopeError(f"{path} does not say how it was measured: expected its settings, found none")
    if not isinstance(results, list):
        raise LongRopeError(f"{path}: expected a list of results, found none")
    del document["schema"]
    try:
        return Evaluation([row_from_json(row) for row in results], settings, document)
    except LongRopeError as error:
        raise LongRopeError(f"{path}: {error}") from error


def values_by_length(rows: Sequence[EvalRow], scaling: str, metric: str = "perplexity") -> dict[int, float]:
    """length -> value of one scaling, in the order measured."""
    return {row.length: row.value for row in rows if row.scaling == scaling and row.metric == metric}


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, its standard error: s/√n with the sample deviation s; None for one value)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


CELLS_SCHEMA = "longrope.eval-cells/1"


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
            log.write_first(json.dumps({"schema": CELLS_SCHEMA, **header}, allow_nan=False))
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
        content = self.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").splitlines()
        try:
            found = json.loads(lines[0]) if lines else {}
        except (ValueError, RecursionError):
            found = {}
        if not isinstance(found, dict) or found.pop("schema", None) != CELLS_SCHEMA:
            raise LongRopeError(
                f"{self.path} holds no cells of an evaluation (schema {CELLS_SCHEMA}); choose another -o"
            )
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
