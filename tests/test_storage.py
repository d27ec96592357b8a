"""Files that are never half written, and output folders that are never overwritten."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from longrope.errors import LongRopeError
from longrope.storage import new_output_folder, sha256_bytes, sha256_text, write_json_atomic, write_text_atomic
from longrope.written import sha256_file

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
