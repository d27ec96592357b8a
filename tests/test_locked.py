"""Locks and logs: one process at a time, whole lines only, a changed byte is found, nothing foreign is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.locked import FolderLock, LineLog, log_lines, with_checksum
from longrope.storage import new_output_folder

HOLD = """
import sys, time
from pathlib import Path
from longrope.locked import FolderLock, LineLog
with FolderLock(Path("."), "busy") if sys.argv[1] == "folder" else LineLog(Path("a.jsonl")):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["folder", "log"])
def test_one_process_at_a_time_and_a_killed_one_leaves_nothing_that_blocks(tmp_path: Path, kind: str) -> None:
    def open_it() -> FolderLock | LineLog:
        return FolderLock(tmp_path, "busy") if kind == "folder" else LineLog(tmp_path / "a.jsonl")

    with LineLog.create(tmp_path / "a.jsonl", {}) as log:
        log.write("{}")
    with subprocess.Popen([sys.executable, "-c", HOLD, kind], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"locked\n"
            with pytest.raises(LongRopeError) as caught:
                open_it()
        finally:
            process.kill()
    assert caught.value.code == "locked"
    with open_it():
        pass


def test_a_lock_file_left_behind_does_not_fill_an_output_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "busy"):
        assert new_output_folder(tmp_path) == tmp_path
    assert os.listdir(tmp_path) == [".lock"]
    assert new_output_folder(tmp_path) == tmp_path


def test_a_folder_that_cannot_be_locked_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match="cannot write to the run folder") as caught:
        FolderLock(tmp_path, "busy", name="run.json", create=False)
    assert caught.value.code == "output-not-writable"


def test_a_log_holds_whole_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def half(handle: int, data: bytes) -> int:
        if len(data) < 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[: len(data) // 2])

    path = tmp_path / "a.jsonl"
    with LineLog.create(path, {"run": 1}) as log:
        log.write('{"row": 1}')
        kept = log.read()
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(LongRopeError, match="No space left"):
            log.write('{"row": "which does not fit"}')
        monkeypatch.undo()
        assert log.read() == kept == path.read_bytes()
        log.write('{"row": 2}')
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(LongRopeError, match=r"No space left .* nothing was kept; make room"):
            LineLog.create(tmp_path / "new.jsonl", {})
    assert os.listdir(tmp_path) == ["a.jsonl"]
    bodies, wrong = log_lines(path.read_bytes())
    assert bodies == ['{"schema": "", "run": 1}', '{"row": 1}', '{"row": 2}']
    assert wrong is None


@given(st.dictionaries(st.text(), st.text() | st.floats() | st.lists(st.integers())), st.data())
def test_a_byte_that_has_changed_is_found_by_its_line(row: dict[str, Any], data: st.DataObject) -> None:
    lines = [with_checksum(json.dumps(entry)).encode() for entry in ({"schema": "x"}, {}, row, {"last": row})]
    assert log_lines(b"".join(line + b"\n" for line in lines)) == (
        [json.dumps(entry) for entry in ({"schema": "x"}, {}, row, {"last": row})],
        None,
    )
    number = data.draw(st.integers(1, 3))
    at = data.draw(st.integers(0, len(lines[number]) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte not in (lines[number][at], 10)))
    lines[number] = lines[number][:at] + bytes([byte]) + lines[number][at + 1 :]
    assert log_lines(b"".join(line + b"\n" for line in lines))[1] == number + 1


def test_a_log_without_checksums_goes_on_with_them() -> None:
    old, new = b'{"schema": "x"}\n{"row": 1}\n', with_checksum('{"row": 2}').encode() + b"\n"
    assert log_lines(old + new) == (['{"schema": "x"}', '{"row": 1}', '{"row": 2}'], None)
    assert log_lines(old + new.replace(b"2", b"3", 1))[1] == 3
    # But in a log that has them, none may be missing.
    assert log_lines(with_checksum('{"schema": "x"}').encode() + b'\n{"row": 1}\n')[1] == 2


def test_a_log_appears_with_its_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before, while or after that line is written leaves no log, or one with that line."""
    path, seen = tmp_path / "a.jsonl", []
    write = os.write

    def watched(handle: int, data: bytes) -> int:
        seen.append(path.exists())
        written = write(handle, data[:5])
        seen.append(path.exists())
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", watched)
        LineLog.create(path, {"run": 1}).close()
    assert len(seen) > 4
    assert not any(seen)
    assert path.read_bytes().endswith(b"}\n")


def test_an_empty_log_counts_as_none(tmp_path: Path) -> None:
    """As a power cut can leave it."""
    path = tmp_path / "a.jsonl"
    path.touch()
    assert new_output_folder(tmp_path) == tmp_path
    with pytest.raises(LongRopeError, match=r"there is no .* to resume; start without") as caught:
        LineLog.resume(path, {})
    assert caught.value.code == "not-resumable"
    LineLog.create(path, {}).close()
    assert path.read_bytes() == with_checksum('{"schema": ""}').encode() + b"\n"


@pytest.mark.parametrize("content", [None, "not empty"])
def test_a_log_is_never_made_in_the_place_of_something(tmp_path: Path, content: str | None) -> None:
    path, target = tmp_path / "a.jsonl", tmp_path / "target"
    if content is None:
        path.symlink_to(target)
    else:
        path.write_text(content)
    with pytest.raises(LongRopeError) as caught:
        LineLog.create(path, {})
    assert caught.value.code == "output-exists"
    assert not target.exists()
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    LineLog.create(tmp_path / "elsewhere", {}).close()
    (tmp_path / "a.jsonl").symlink_to("elsewhere")
    with pytest.raises(LongRopeError, match="cannot write"):
        LineLog(tmp_path / "a.jsonl")


@pytest.mark.parametrize("gone", ["removed", "replaced", "folder"])
def test_a_log_that_is_gone_is_noticed_at_the_next_line(tmp_path: Path, gone: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with LineLog.create(folder / "a.jsonl", {}) as log:
        log.write("{}")
        if gone == "folder":
            shutil.rmtree(folder)
        else:
            (folder / "a.jsonl").unlink()
        if gone == "replaced":
            (folder / "a.jsonl").write_text("another\n")
        with pytest.raises(LongRopeError, match="removed or replaced: what") as caught:
            log.write("{}")
    assert caught.value.code == "output-removed"
    if gone == "replaced":
        assert (folder / "a.jsonl").read_text() == "another\n"
