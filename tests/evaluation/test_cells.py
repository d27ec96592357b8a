"""The finished cells of a run: kept whole, given back bit for bit, never mixed with another run's."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from longrope.errors import LongRopeError
from longrope.evaluation.results import Cell, CellKey, CellLog, EvalRow

HEADER = {"seed": 0, "suites": {"passkey": {"trials": 30}}, "versions": {"torch": "2"}}


def cell(name: str = "none", value: float = 0.1 + 0.2, length: int = 256) -> Cell:
    row = EvalRow("passkey", name, length, "accuracy", value, 0.0, 30, {"depth": 0.1})
    return Cell(CellKey(name, "passkey", "", length), (row,), "ab" * 32, {"cd" * 32: "book"})


def test_cells_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "eval.cells.jsonl"
    with CellLog.create(path, HEADER) as log:
        log.append(cell("none"))
        log.append(cell("inf", math.inf))
        log.append(cell("nan", math.nan))
    with CellLog.resume(path, HEADER) as log:
        kept = list(log.cells.values())
        log.append(cell("yarn"))
    assert kept[0] == cell("none")
    assert kept[1].rows[0].value == math.inf
    assert math.isnan(kept[2].rows[0].value)
    with CellLog.resume(path, HEADER) as log:
        assert [key.scaling for key in log.cells] == ["none", "inf", "nan", "yarn"]


def test_a_last_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "eval.cells.jsonl"
    with CellLog.create(path, HEADER) as log:
        log.append(cell("none"))
        whole = path.read_bytes()
        log.append(cell("yarn"))
    path.write_bytes(path.read_bytes()[:-20])
    with CellLog.resume(path, HEADER) as log:
        assert [key.scaling for key in log.cells] == ["none"]
        assert path.read_bytes() == whole
        log.append(cell("yarn"))
    with CellLog.resume(path, HEADER) as log:
        assert len(log.cells) == 2


@pytest.mark.parametrize(
    ("changes", "differing"),
    [({"seed": 1}, "seed"), ({"versions": {"torch": "3"}}, "versions"), ({"new": 1}, "new"),
     ({"suites": {"passkey": {"trials": 31}}}, "suites")],
)  # fmt: skip
def test_cells_of_another_run_are_refused_and_kept(tmp_path: Path, changes: dict, differing: str) -> None:
    path = tmp_path / "eval.cells.jsonl"
    CellLog.create(path, HEADER).close()
    before = path.read_bytes()
    with pytest.raises(LongRopeError, match=f"is of another evaluation: {differing} differ"):
        CellLog.resume(path, HEADER | changes)
    assert path.read_bytes() == before


def test_settings_that_are_gone_differ_too(tmp_path: Path) -> None:
    path = tmp_path / "eval.cells.jsonl"
    CellLog.create(path, HEADER | {"original": "other"}).close()
    with pytest.raises(LongRopeError, match="original differ"):
        CellLog.resume(path, HEADER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no cells"),
        ("{", "holds no cells"),
        ("[]\n", "holds no cells"),
        ('{"schema": "x"}\n', "holds no cells"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "eval.cells.jsonl"
    path.write_text(content)
    with pytest.raises(LongRopeError, match=message):
        CellLog.resume(path, HEADER)
    assert path.read_text() == content


def test_damage_inside_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "eval.cells.jsonl"
    with CellLog.create(path, HEADER) as log:
        log.append(cell("none"))
        log.append(cell("yarn"))
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace('"length"', '"height"')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LongRopeError, match="damaged in line 2"):
        CellLog.resume(path, HEADER)


def test_one_writer_nothing_overwritten_nothing_invented(tmp_path: Path) -> None:
    path = tmp_path / "eval.cells.jsonl"
    with pytest.raises(LongRopeError, match="start without --resume"):
        CellLog.resume(path, HEADER)
    assert not path.exists()
    with CellLog.create(path, HEADER), pytest.raises(LongRopeError, match="another process is writing"):
        CellLog.resume(path, HEADER)
    with pytest.raises(LongRopeError, match="add --resume"):
        CellLog.create(path, HEADER)
    with pytest.raises(LongRopeError, match="cannot write"):
        CellLog.create(tmp_path / "none" / "eval.cells.jsonl", HEADER)


def test_no_space_left_keeps_the_finished_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "eval.cells.jsonl"

    def full_after(size: int, write: Callable[[int, bytes], int] = os.write) -> Callable[[int, bytes], int]:
        pieces = iter([size])

        def half(handle: int, data: bytes) -> int:
            if (room := next(pieces, 0)) == 0:
                raise OSError(28, "No space left on device")
            return write(handle, data[:room])

        return half

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_after(10))
        with pytest.raises(LongRopeError, match=r"No space left on device; make room and start again"):
            CellLog.create(path, HEADER)
    assert not path.exists()
    with CellLog.create(path, HEADER) as log:
        log.append(cell("yarn"))
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full_after(10))
            with pytest.raises(LongRopeError, match=r"finished cells are kept, make room and use --resume"):
                log.append(cell("ntk"))
        assert path.read_bytes() == before
        assert list(log.cells) == [cell("yarn").key]
