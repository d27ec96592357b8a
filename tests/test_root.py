"""The root modules: lengths as people write them, files that are never half written or overwritten, one-line errors."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.errors import LongRopeError, one_line
from longrope.locked import FolderLock, LineLog, log_lines, with_checksum
from longrope.provenance import command_line
from longrope.storage import new_output_folder, sha256_bytes, sha256_text, write_json_atomic, write_text_atomic
from longrope.units import format_length, parse_length, parse_lengths
from longrope.written import sha256_file

# lengths


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("4096", 4096),
        (4096, 4096),
        ("128k", 131_072),
        ("128K", 131_072),
        ("2M", 2_097_152),
        ("2m", 2_097_152),
        (" 8k ", 8192),
        ("1", 1),
    ],
)
def test_a_length_is_parsed(text: str | int, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "0k", "-4096", "1.5k", "k", "4096 tokens", "1e5", "128kk", "0x10", -1, 0])
def test_what_is_no_length_is_refused_in_one_line(text: str | int) -> None:
    with pytest.raises(LongRopeError, match="positive whole number of tokens") as caught:
        parse_length(text)
    assert repr(str(text)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(1000, "1000"), (1024, "1k"), (4096, "4k"), (131_072, "128k"), (2_097_152, "2M"), (1_572_864, "1536k")],
)
def test_a_length_is_written_in_its_shortest_exact_form(tokens: int, text: str) -> None:
    assert format_length(tokens) == text


@given(st.integers(1, 2**40))
def test_what_is_written_is_read_back(tokens: int) -> None:
    assert parse_length(format_length(tokens)) == tokens


def test_a_list_of_lengths_keeps_its_order() -> None:
    assert parse_lengths("2k, 256,1k") == [2048, 256, 1024]


@pytest.mark.parametrize("text", ["", ",", "256,x"])
def test_a_list_without_lengths_is_refused(text: str) -> None:
    with pytest.raises(LongRopeError, match="positive whole number of tokens"):
        parse_lengths(text)


# errors


def test_an_error_is_put_on_one_line() -> None:
    assert one_line(LongRopeError("expected a\n  folder")) == "expected a folder"


def test_an_error_of_another_library_keeps_its_type() -> None:
    assert one_line(KeyError("rope_theta")) == "KeyError: 'rope_theta'"
    assert one_line(ValueError("two\nlines")) == "ValueError: two lines"


def test_an_error_without_a_message_still_says_something() -> None:
    assert one_line(ValueError()) == "ValueError"
    assert one_line(LongRopeError()) == "LongRopeError"


# files: hashes


def test_hashes_agree_with_each_other_and_with_hashlib(tmp_path: Path) -> None:
    text = "Les Misérables\n" * 100_000  # more than one piece of the file
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert sha256_text(text) == sha256_bytes(text.encode()) == sha256_file(path) == expected


# files: atomic writes


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_is_written_in_full_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    write_text_atomic(path, "λ = 1\n")
    assert path.read_bytes() == "λ = 1\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["scaling.json"]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "a long first text\n")
    write_text_atomic(path, "second\n")
    assert path.read_text("utf-8") == "second\n"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old\n", "utf-8")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(LongRopeError, match="No space left on device; nothing was changed") as caught:
        write_text_atomic(path, "new\n")
    assert str(path) in str(caught.value)
    assert path.read_text("utf-8") == "old\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "a.txt"
    path.write_text("old\n", "utf-8")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(path, "new\n")
    assert path.read_text("utf-8") == "old\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere/a.txt"
    with pytest.raises(LongRopeError, match="No such file or directory") as caught:
        write_text_atomic(path, "x")
    assert str(path) in str(caught.value)


def test_json_is_readable_by_people_and_keeps_floats_exact(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"name": "Misérables", "factors": [1.0, 0.1 + 0.2, 1e-300]}
    write_json_atomic(path, value)
    text = path.read_text("utf-8")
    assert "Misérables" in text
    assert text.endswith("}\n")
    assert json.loads(text) == value


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_json_refuses_what_json_does_not_have(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "a.json", {"loss": number})
    assert os.listdir(tmp_path) == []


# files: output folders


def test_an_output_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    path = new_output_folder(tmp_path / "runs/first")
    assert path.is_dir()
    assert os.listdir(path) == []


def test_an_empty_output_folder_is_accepted(tmp_path: Path) -> None:
    assert new_output_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["notes.txt", ".hidden"])
def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine", "utf-8")
    with pytest.raises(LongRopeError, match="not empty; nothing is overwritten"):
        new_output_folder(tmp_path)
    assert (tmp_path / name).read_text("utf-8") == "mine"


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("mine", "utf-8")
    with pytest.raises(LongRopeError, match="found a file at"):
        new_output_folder(path)
    assert path.read_text("utf-8") == "mine"


def test_a_folder_below_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", "utf-8")
    with pytest.raises(LongRopeError, match=r"cannot write .*Not a directory") as caught:
        new_output_folder(tmp_path / "file/out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(dir: Path | None = None) -> None:  # permissions do not stop root: the system's answer is given here
        assert dir == tmp_path / "out"
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(LongRopeError, match=os.strerror(code)):
        new_output_folder(tmp_path / "out")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not stop root")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(LongRopeError, match="Permission denied"):
            new_output_folder(tmp_path / "out")
    finally:
        tmp_path.chmod(0o755)


# files: locks

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


def test_nothing_needs_a_module_that_windows_lacks() -> None:
    missing = "fcntl", "resource", "pwd", "grp", "termios"
    for path in (Path(__file__).parent.parent / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & set(missing), path
            if isinstance(node, ast.ImportFrom):
                assert node.module not in missing, path


# provenance


def test_the_command_line_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/longrope", "search", "tiny", "--data", "my book.txt"])
    assert command_line() == "longrope search tiny --data 'my book.txt'"
    monkeypatch.setattr("sys.argv", ["/lib/longrope/__main__.py", "plan"])
    assert command_line() == "python -m longrope plan"


def test_the_command_line_imports_light() -> None:
    code = "import sys, longrope, longrope.cli.main; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
