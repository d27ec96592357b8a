"""The log of finished tasks: kept whole, given back bit for bit, never mixed with another run's."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrope.evaluation.results import EvalRow
from longrope.evaluation.task_log import TaskKey, TaskLog, TaskResult
from tests.evaluation.tiny import refused

HEADER = {"seed": 0, "suites": {"passkey": {"trials": 30}}, "versions": {"torch": "2"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "eval.cells.jsonl"


def result(name: str = "none", value: float = 0.1 + 0.2, length: int = 256) -> TaskResult:
    row = EvalRow("passkey", name, length, "accuracy", value, 0.0, 30, {"depth": 0.1})
    return TaskResult(TaskKey(name, "passkey", "", length), (row,), "ab" * 32, {"cd" * 32: "book"})


def test_results_come_back_bit_for_bit(path: Path) -> None:
    with TaskLog.create(path, HEADER) as log:
        log.append(result("none"))
        log.append(result("inf", math.inf))
        log.append(result("nan", math.nan))
    with TaskLog.resume(path, HEADER) as log:
        kept = list(log.results.values())
        log.append(result("yarn"))
    assert kept[0] == result("none")
    assert kept[1].rows[0].value == math.inf
    assert math.isnan(kept[2].rows[0].value)
    with TaskLog.resume(path, HEADER) as log:
        assert [key.scaling for key in log.results] == ["none", "inf", "nan", "yarn"]


def test_a_warning_in_other_words_is_the_same_run(path: Path) -> None:
    TaskLog.create(path, HEADER | {"warnings": ["as an earlier version said it"]}).close()
    TaskLog.resume(path, HEADER | {"warnings": ["as it is said now"]}).close()


def test_a_last_line_that_was_cut_off_is_measured_again(path: Path) -> None:
    with TaskLog.create(path, HEADER) as log:
        log.append(result("none"))
        whole = path.read_bytes()
        log.append(result("yarn"))
    path.write_bytes(path.read_bytes()[:-20])
    with TaskLog.resume(path, HEADER) as log:
        assert [key.scaling for key in log.results] == ["none"]
        assert path.read_bytes() == whole
        log.append(result("yarn"))
    with TaskLog.resume(path, HEADER) as log:
        assert len(log.results) == 2


@pytest.mark.parametrize(
    ("changes", "differing"),
    [({"seed": 1}, "seed"), ({"versions": {"torch": "3"}}, "versions"), ({"new": 1}, "new"),
     ({"suites": {"passkey": {"trials": 31}}}, "suites"), ({"seed": ...}, "seed")],
)  # fmt: skip
def test_a_log_of_another_run_is_refused_and_kept(path: Path, changes: dict[str, Any], differing: str) -> None:
    TaskLog.create(path, HEADER).close()
    before = path.read_bytes()
    header = {key: value for key, value in (HEADER | changes).items() if value is not ...}
    with refused("other-run", f"is of another evaluation: {differing} differ"):
        TaskLog.resume(path, header)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["notes", "[]\n", '{"schema": "x"}\n'])
def test_other_files_are_refused(path: Path, content: str) -> None:
    path.write_text(content)
    with refused("other-schema"):
        TaskLog.resume(path, HEADER)
    assert path.read_text() == content


def test_damage_inside_is_refused_with_its_line(path: Path) -> None:
    with TaskLog.create(path, HEADER) as log:
        log.append(result("none"))
        log.append(result("yarn"))
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace('"length"', '"height"')
    path.write_text("\n".join(lines) + "\n")
    with refused("damaged-file", "line 2"):
        TaskLog.resume(path, HEADER)


def test_a_value_that_has_changed_is_found(path: Path) -> None:
    with TaskLog.create(path, HEADER | {"warnings": ["as written"]}) as log:
        log.append(result("none"))
        log.append(result("yarn"))
    whole = path.read_text()
    path.write_text(whole.replace("0.3000", "0.4000"))
    with refused("damaged-file", "line 2: expected the finished task as it was written", "; delete the line"):
        TaskLog.resume(path, HEADER)
    path.write_text(whole.replace("as written", "as I like"))
    with refused("damaged-file", "line 1"):
        TaskLog.resume(path, HEADER)
    lines = whole.splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2]]))  # what the message advised for line 2
    with TaskLog.resume(path, HEADER) as log:
        assert list(log.results.values()) == [result("yarn")]


def test_a_log_of_a_version_without_checksums_goes_on(path: Path) -> None:
    with TaskLog.create(path, HEADER) as log:
        log.append(result("none"))
    path.write_text(re.sub(r', "crc32": "\w{8}"', "", path.read_text()))
    with TaskLog.resume(path, HEADER) as log:
        log.append(result("yarn"))
    with TaskLog.resume(path, HEADER) as log:
        assert list(log.results.values()) == [result("none"), result("yarn")]
    assert path.read_text().count("crc32") == 1


def test_an_empty_log_is_none(path: Path) -> None:
    path.touch()
    with refused("not-resumable"):
        TaskLog.resume(path, HEADER)
    TaskLog.create(path, HEADER).close()


def test_one_writer_nothing_overwritten_nothing_invented(path: Path) -> None:
    with refused("not-resumable"):
        TaskLog.resume(path, HEADER)
    assert not path.exists()
    with TaskLog.create(path, HEADER), refused("locked"):
        TaskLog.resume(path, HEADER)
    with refused("output-exists", "`resume=True`"):
        TaskLog.create(path, HEADER)
    with refused("output-not-writable"):
        TaskLog.create(path.parent / "none" / path.name, HEADER)


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from longrope.evaluation.task_log import TaskLog, TaskResult
with TaskLog.create(Path(sys.argv[1]), json.loads(sys.argv[2])) as log:
    for line in sys.argv[3:]:
        log.append(TaskResult.from_json(line))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_keeps_the_finished_tasks(path: Path) -> None:
    finished = [result("none"), result("yarn")]
    lines = [one.to_json() for one in finished]
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(path), json.dumps(HEADER), *lines], check=False)
    assert killed.returncode == -signal.SIGKILL
    with TaskLog.resume(path, HEADER) as log:
        assert list(log.results.values()) == finished


def test_no_space_left_keeps_the_finished_tasks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_after(size: int, write: Callable[[int, bytes], int] = os.write) -> Callable[[int, bytes], int]:
        pieces = iter([size])

        def half(handle: int, data: bytes) -> int:
            if (room := next(pieces, 0)) == 0:
                raise OSError(28, "No space left on device")
            return write(handle, data[:room])

        return half

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_after(10))
        with refused("output-not-writable", "No space left on device"):
            TaskLog.create(path, HEADER)
    assert not path.exists()
    with TaskLog.create(path, HEADER) as log:
        log.append(result("yarn"))
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full_after(10))
            with refused("output-not-writable", "is valid"):
                log.append(result("ntk"))
        assert path.read_bytes() == before
        assert list(log.results) == [result("yarn").key]
