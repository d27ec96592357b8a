"""Reads the factor files of the authors' code (microsoft/LongRoPE) as a `RopeScaling` of one window.

Three forms exist: one float per line, D lines; one row of D comma-separated floats per layer, all rows equal; one
float per line, D + 1 lines, the first being n̂. The files say nothing else: geometry, target length and attention
factor come from the caller.
"""

from __future__ import annotations

import re
from pathlib import Path

from longrope.checks import positive_number, shown, whole_number
from longrope.errors import LongRopeError
from longrope.input_files import refuse_special
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from longrope.storage import sha256_bytes

_MAX_BYTES = 16 * 1024 * 1024  # the largest real one (32 layers of 64 columns) has 30 KB
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def read_authors_factors(
    path: Path | str, geometry: RopeGeometry, target_length: int, *, attention_factor: float = 1.0
) -> RopeScaling:
    """The factors in `path` as one window of `target_length` tokens.

    Raises LongRopeError, with the path, when the file cannot be read, is not a factor file, holds another number of
    factors than the geometry has pairs, or has rows that differ (factors per layer).
    """
    data = _read(Path(path))
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise LongRopeError(
            f"expected a text file of rescale factors, found a binary file at {path}", code="damaged-file"
        ) from error
    rows = [[_number(path, number, cell) for cell in line.split(",")] for number, line in enumerate(lines, 1) if line]
    if not rows:
        raise LongRopeError(
            f"expected {geometry.pairs} rescale factors in {path}, found an empty file", code="damaged-file"
        )
    if any(len(row) > 1 for row in rows):
        factors, start_tokens = _from_rows(path, rows, geometry.pairs), 0
    else:
        factors, start_tokens = _from_column(path, [row[0] for row in rows], geometry.pairs)
    for factor in factors:
        try:
            positive_number("every factor", factor)
        except LongRopeError as error:
            raise LongRopeError(f"{path}: {error}", code="damaged-file") from error
    provenance = {"origin": "factor file of the authors' code", "file": Path(path).name, "sha256": sha256_bytes(data)}
    return RopeScaling.single(geometry, target_length, factors, start_tokens, attention_factor, provenance)


def _read(path: Path) -> bytes:
    refuse_special(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise LongRopeError(f"cannot read the factor file {path}: {error.strerror}", code="missing-data") from error
    if len(data) > _MAX_BYTES:
        raise LongRopeError(
            f"expected a file of rescale factors, a few KB; found more than 16 MB at {path}", code="damaged-file"
        )
    return data


def _number(path: Path | str, line: int, cell: str) -> float:
    cell = cell.strip()
    if not _NUMBER.fullmatch(cell):
        raise LongRopeError(f"expected a number in line {line} of {path}, found {shown(cell)}", code="damaged-file")
    return float(cell)


def _from_rows(path: Path | str, rows: list[list[float]], pairs: int) -> list[float]:
    for number, row in enumerate(rows, 1):
        if len(row) != pairs:
            raise LongRopeError(
                f"expected {pairs} factors in every row of {path}, found {len(row)} in row {number}",
                code="damaged-file",
            )
        if row != rows[0]:
            raise LongRopeError(
                f"expected equal rows in {path}, found row {number} different from row 1: factors per layer are not"
                " supported",
                code="damaged-file",
            )
    return rows[0]


def _from_column(path: Path | str, values: list[float], pairs: int) -> tuple[list[float], int]:
    if len(values) == pairs:
        return values, 0
    if len(values) != pairs + 1:
        raise LongRopeError(
            f"expected {pairs} rescale factors in {path}, or start tokens and {pairs} factors;"
            f" found {len(values)} numbers",
            code="damaged-file",
        )
    first, *factors = values
    if not first.is_integer():
        raise LongRopeError(
            f"expected a whole number of start tokens in line 1 of the {len(values)} lines of {path}, found {first:g}",
            code="damaged-file",
        )
    return factors, whole_number(f"start tokens in {path}", int(first), 0)
