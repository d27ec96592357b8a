"""The log file: what a line holds, what is refused, and that nothing is lost or overwritten."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from pathlib import Path

import pytest

from longrope.errors import LongRopeError
from longrope.locked import with_checksum
from longrope.search.log import SCHEMA, SearchLog, read_log
from longrope.search.spaces import Candidate
from tests.search.targets import HEADER, evolve, log_row

ROWS = [log_row(index, index // 2, Candidate((100, 100 + index), 4), 3.0 + index / 7) for index in range(4)]


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    """A log with a header and four evaluations."""
    path = tmp_path / "search.jsonl"
    with SearchLog.create(path, HEADER) as log:
        for row in ROWS:
            log.append(row)
    return path


def refused(path: Path, header: dict[str, object] = HEADER, code: str = "damaged-file") -> str:
    """The one-line message that resuming `path` ends with; the file is untouched."""
    before = path.read_bytes()
    with pytest.raises(LongRopeError) as error:
        SearchLog.resume(path, header)
    assert path.read_bytes() == before
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert error.value.code == code
    return str(error.value)


def test_what_is_written_is_read(log_path: Path) -> None:
    header, rows = read_log(log_path)
    assert header == {"schema": SCHEMA, **HEADER}
    assert rows == ROWS


def test_every_line_is_plain_json(log_path: Path) -> None:
    def no_constants(name: str) -> None:
        raise AssertionError(name)

    with SearchLog.resume(log_path, HEADER) as log:
        log.append(log_row(4, 2, Candidate((100, 200)), math.nan))
    lines = log_path.read_text().splitlines()
    assert len(lines) == 6
    for line in lines:
        json.loads(line, parse_constant=no_constants)
    first = {"index": 0, "generation": 0, "steps": [100, 100], "start_tokens": 4, "loss": 3.0}
    assert json.loads(lines[1]) == first | {"crc32": f"{zlib.crc32(json.dumps(first).encode()):08x}"}


@pytest.mark.parametrize("loss", [0.1 + 0.2, 1e-320, 12345.678901234567, math.nan, math.inf, -math.inf])
def test_losses_come_back_bit_for_bit(tmp_path: Path, loss: float) -> None:
    with SearchLog.create(tmp_path / "log", {}) as log:
        log.append(log_row(0, 0, Candidate((100,)), loss))
    _, rows = read_log(tmp_path / "log")
    assert math.isnan(rows[0].loss) if math.isnan(loss) else rows[0].loss == loss


def test_lines_reach_the_file_as_they_are_appended(tmp_path: Path) -> None:
    with SearchLog.create(tmp_path / "log", HEADER) as log:
        for row in ROWS:
            log.append(row)
            assert read_log(tmp_path / "log")[1] == log.rows == ROWS[: row.index + 1]


def test_resume_appends_and_keeps_the_bytes(log_path: Path) -> None:
    before = log_path.read_bytes()
    with SearchLog.resume(log_path, HEADER) as log:
        assert log.rows == ROWS
        log.append(log_row(4, 2, Candidate((100, 200)), 2.0))
    assert log_path.read_bytes().startswith(before)
    assert len(read_log(log_path)[1]) == 5


def test_create_over_a_log_is_refused(log_path: Path) -> None:
    before = log_path.read_bytes()
    with pytest.raises(LongRopeError, match="exists; continue it with `resume=True`") as error:
        SearchLog.create(log_path, HEADER)
    assert error.value.code == "output-exists"
    assert log_path.read_bytes() == before


def test_no_log_to_resume(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError) as error:
        SearchLog.resume(tmp_path / "none.jsonl", HEADER)
    assert error.value.code == "not-resumable"
    assert not (tmp_path / "none.jsonl").exists()


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match="No such file or directory") as error:
        SearchLog.create(tmp_path / "none" / "log", HEADER)
    assert error.value.code == "output-not-writable"


@pytest.mark.parametrize(
    ("key", "value"),
    [("samples_sha256", "cd" * 32), ("target_length", 4096), ("settings", {"seed": 6, "population": 8}), ("new", 1)],
)
def test_another_search_is_refused_by_the_name_of_what_differs(log_path: Path, key: str, value: object) -> None:
    message = refused(log_path, HEADER | {key: value}, "other-run")
    named = f"{key}.seed" if key == "settings" else key  # the setting itself, of several
    assert f"is the log of another search: {key} differ (log: {named} = " in message
    assert len(message) < 400


def test_all_that_differs_is_named(log_path: Path) -> None:
    assert "samples_sha256, target_length differ" in refused(
        log_path, HEADER | {"target_length": 1, "samples_sha256": ""}, "other-run"
    )


def test_versions_and_machine_may_differ(tmp_path: Path) -> None:
    with SearchLog.create(tmp_path / "log", HEADER | {"record": {"versions": 1}}):
        pass
    with SearchLog.resume(tmp_path / "log", HEADER | {"record": {"versions": 2}}) as log:
        assert log.rows == []


def test_header_values_are_compared_as_json_gives_them(tmp_path: Path) -> None:
    header = {"seeds": ((1, 2), (3,)), "upper": 0.1 + 0.2}
    with SearchLog.create(tmp_path / "log", header):
        pass
    with SearchLog.resume(tmp_path / "log", header):
        pass
    with pytest.raises(LongRopeError) as error:
        SearchLog.resume(tmp_path / "log", header | {"seeds": ((1, 2), (4,))})
    assert error.value.code == "other-run"


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_last_line_that_was_cut_off_is_computed_again(log_path: Path, cut: int) -> None:
    whole = log_path.read_bytes()
    log_path.write_bytes(whole[:-cut])
    assert read_log(log_path)[1] == ROWS[:3]
    with SearchLog.resume(log_path, HEADER) as log:
        assert log.rows == ROWS[:3]
        log.append(ROWS[3])
    assert log_path.read_bytes() == whole


@pytest.mark.parametrize("size", [0, 1, 40])
def test_a_log_without_a_whole_first_line_is_none(log_path: Path, size: int) -> None:
    log_path.write_bytes(log_path.read_bytes()[:size])
    assert "there is no" in refused(log_path, code="not-resumable")
    SearchLog.create(log_path, HEADER).close()
    assert read_log(log_path) == ({"schema": SCHEMA, **HEADER}, [])


def test_another_file_without_a_line_is_kept(log_path: Path) -> None:
    log_path.write_text("my notes")
    assert "ends before its first line does, so there is nothing to resume; remove it" in refused(log_path)
    with pytest.raises(LongRopeError, match="exists"):
        SearchLog.create(log_path, HEADER)
    assert log_path.read_text() == "my notes"


@pytest.mark.parametrize("line", range(5))
def test_a_digit_that_has_changed_is_found(log_path: Path, line: int) -> None:
    lines = log_path.read_text().splitlines(keepends=True)
    key = '"loss": 3.' if line else '"target_length": 204'
    changed = lines[line].replace(key, key[:-2] + "7" + key[-1])
    assert changed != lines[line]
    log_path.write_text("".join([*lines[:line], changed, *lines[line + 1 :]]))
    if line:
        message = refused(log_path)
        assert f"is damaged in line {line + 1}: expected evaluation {line - 1} as it was written" in message
        assert message.endswith(f"put it back, or keep the {line} lines before it, and the rest is computed again")
    else:
        refused(log_path, code="damaged-file")


def test_a_log_of_a_version_without_checksums_goes_on(log_path: Path) -> None:
    whole = log_path.read_text()
    old = "".join(re.sub(r', "crc32": "\w{8}"', "", line) for line in whole.splitlines(keepends=True)[:3])
    assert "crc32" not in old
    log_path.write_text(old)
    with SearchLog.resume(log_path, HEADER) as log:
        assert log.rows == ROWS[:2]
        log.append(ROWS[2])
        log.append(ROWS[3])
    assert log_path.read_text() == old + "".join(whole.splitlines(keepends=True)[3:])
    assert read_log(log_path) == ({"schema": SCHEMA, **HEADER}, ROWS)
    log_path.write_text(log_path.read_text().replace('"loss": 3.2', '"loss": 3.7'))
    assert "is damaged in line 4" in refused(log_path)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "not json",
        "[]",
        "3",
        "null",
        '{"index": 1}',
        '{"index": 1, "generation": 0, "steps": [100, 100], "start_tokens": 0, "loss": "low"}',
        '{"index": 1, "generation": 0, "steps": [100, 100], "start_tokens": 0, "loss": null}',
        '{"index": Infinity, "generation": 0, "steps": [100, 100], "start_tokens": 0, "loss": 1.0}',
        '{"index": 1, "generation": 0, "steps": [100, 100], "start_tokens": 0, "loss": 1' + "0" * 400 + "}",
        "[" * 100_000,
        '{"index": 2, "generation": 0, "steps": [100, 100], "start_tokens": 0, "loss": 1.0}',
    ],
)
def test_a_damaged_line_is_named(log_path: Path, line: str) -> None:
    lines = log_path.read_text().split("\n")
    lines[2] = line
    log_path.write_text("\n".join(lines))
    message = refused(log_path)
    assert "is damaged in line 3: expected" in message
    assert len(message) < 400


def test_a_missing_line_is_named(log_path: Path) -> None:
    lines = log_path.read_text().split("\n")
    log_path.write_text("\n".join(lines[:2] + lines[3:]))
    assert "is damaged in line 3: expected evaluation 1, found 2" in refused(log_path)


@pytest.mark.parametrize(
    ("first", "says"),
    [
        ('{"schema": "longrope.search/2"}', "of schema longrope.search/1, found 'longrope.search/2'"),
        ('{"schema": 1}', "of schema longrope.search/1, found 1"),
        ("{}", "found None"),
        ("[1, 2]", "found None"),
        ("Call me Ishmael.", "is no search log: its first line is not JSON"),
        ("{" * 3, "is no search log: its first line is not JSON"),
        ("[" * 100_000, "is no search log: its first line is not JSON"),
    ],
)
def test_another_file_is_refused(log_path: Path, first: str, says: str) -> None:
    log_path.write_text(first + "\n")
    assert says in refused(log_path)


def test_binary_files_are_refused(log_path: Path) -> None:
    log_path.write_bytes(b"\x80\x81\n" * 10)
    assert "is no search log: its first line is not JSON" in refused(log_path)


def test_a_folder_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match="directory") as error:
        SearchLog.resume(tmp_path, HEADER)
    assert error.value.code == "output-not-writable"


class FullDisk:
    """`os.write` on a disk with room for `room` bytes: what fits is written, then there is no space left."""

    def __init__(self, room: int, most: int | None = None) -> None:
        self.room, self.most, self.write = room, most, os.write

    def __call__(self, handle: int, data: bytes) -> int:
        if data and self.room <= 0:
            raise OSError(28, "No space left on device")
        written = self.write(handle, data[: min(self.room, self.most or len(data))])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 50, 81])
def test_no_space_left_keeps_the_log_valid(log_path: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = log_path.read_bytes()
    row = log_row(4, 2, Candidate((100, 200)), 2.0)
    assert room < len(with_checksum(row.to_json()) + "\n")
    with SearchLog.resume(log_path, HEADER) as log:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", FullDisk(room))
            with pytest.raises(LongRopeError, match=r"No space left .* is valid .* `resume=True`") as error:
                log.append(row)
        assert error.value.code == "output-not-writable"
        assert "\n" not in str(error.value)
        assert log.rows == ROWS
        assert log_path.read_bytes() == before
        log.append(row)  # there is room again
    assert read_log(log_path)[1] == [*ROWS, row]


@pytest.mark.parametrize("room", [0, 1, 100])
def test_no_space_for_the_header_leaves_no_log(tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(room))
        with pytest.raises(LongRopeError, match=r"No space left .* nothing was kept"):
            SearchLog.create(tmp_path / "log", HEADER)
    assert list(tmp_path.iterdir()) == []
    SearchLog.create(tmp_path / "log", HEADER).close()


@pytest.mark.parametrize("most", [1, 7])
def test_lines_written_in_pieces_are_whole(tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(10**6, most))
        with SearchLog.create(tmp_path / "log", HEADER) as log:
            for row in ROWS:
                log.append(row)
    assert read_log(tmp_path / "log") == ({"schema": SCHEMA, **HEADER}, ROWS)


def test_ctrl_c_within_a_line_leaves_whole_lines(log_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = log_path.read_bytes()

    def interrupted(handle: int, data: bytes, write=os.write) -> int:
        write(handle, data[:10])
        raise KeyboardInterrupt

    with SearchLog.resume(log_path, HEADER) as log, monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.append(log_row(4, 2, Candidate((100, 200)), 2.0))
    assert log_path.read_bytes() == before


def test_a_search_that_runs_out_of_space_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evolve(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for room in (len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path = tmp_path / str(room)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", FullDisk(room))
            with pytest.raises(LongRopeError, match="continue with `resume=True`"):
                evolve(path)
        assert whole.startswith(path.read_bytes())
        evolve(path, resume=True)
        assert path.read_bytes() == whole


def test_an_unwritable_log_is_refused(log_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LongRopeError, match="Permission denied") as error:
        SearchLog(log_path)
    assert error.value.code == "output-not-writable"


def test_a_second_process_is_refused(log_path: Path) -> None:
    before = log_path.read_bytes()
    with SearchLog.resume(log_path, HEADER), pytest.raises(LongRopeError, match="another process is writing"):
        SearchLog.resume(log_path, HEADER)
    with SearchLog.resume(log_path, HEADER):  # free again
        pass
    assert log_path.read_bytes() == before
