"""Temporary names and the record of written files: what a kill leaves is swept, what is somebody else's is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.run_files import WRITTEN
from longrope.storage import (
    check_output_file,
    keep_or_write_json,
    new_output_folder,
    refuse_links,
    sha256_text,
    write_json_atomic,
    write_text_atomic,
)
from longrope.written import (
    begin_record,
    discard,
    foreign,
    is_temporary,
    move_up,
    note,
    occupied_by,
    publish,
    recorded,
    remove_own,
    sha256_file,
    sweep,
    temporary,
    temporary_folder,
)


def tree(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below `folder`."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


# --- temporary names


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=300))
def test_a_temporary_name_fits_beside_every_name(name: str) -> None:
    made = temporary(Path("folder") / name) if name not in (".", "..") else temporary(Path("folder/x"))
    assert made.parent == Path("folder")
    assert len(made.name.encode()) < 255
    assert is_temporary(made.name)
    assert made != temporary(Path("folder") / name)


@pytest.mark.parametrize(
    "name", ["a.json", ".a.json.x1y2z3a4", ".longrope-a.json", ".longrope-a.json.tmp", "longrope-a.12345678.tmp"]
)
def test_other_names_are_not_temporary(name: str) -> None:
    assert not is_temporary(name)


def test_what_was_left_of_some_names_is_swept(tmp_path: Path) -> None:
    for name in ("a.json", "b.json", "x" * 250):
        temporary(tmp_path / name).write_text("half")
    temporary(tmp_path / "a.json").mkdir()
    link = temporary(tmp_path / "a.json")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine").touch()
    link.symlink_to(tmp_path / "kept")
    (tmp_path / ".a.json.backup").touch()
    sweep(tmp_path, "a.json", "x" * 250)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[0] == ".a.json.backup"
    assert left[1].startswith(".longrope-b.json.")
    assert left[2:] == ["kept"]
    assert (tmp_path / "kept/mine").exists()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.backup", "kept"]
    sweep(tmp_path / "nowhere")


def test_what_earlier_versions_left_is_swept(tmp_path: Path) -> None:
    """Their unfinished checkpoints and JSON files, which fill no folder; names that only look alike stay."""
    older = [".partial-k3_9xyz0/checkpoint/model.safetensors", ".search.json.ab12cd_4", ".scaling.json.00000000"]
    others = [".partial-download/a", ".partial-K3/a", ".notes.ab12cd_4", ".search.json.bak", "partial-k3_9xyz0/a"]
    for name in older:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("half")
    assert occupied_by(tmp_path / "run") is None
    sweep(tmp_path / "run", "scaling.json")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".partial-k3_9xyz0", ".search.json.ab12cd_4"]
    for name in others:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("somebody's")
    sweep(tmp_path / "run")
    assert sorted(name for name, content in tree(tmp_path / "run").items() if content) == sorted(others)


def test_a_kill_while_something_is_removed_leaves_what_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big/weights").touch()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            discard(tmp_path / "big")
    assert not (tmp_path / "big").exists()
    sweep(tmp_path)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("links", [True, False])
def test_a_name_is_given_only_where_it_is_free(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", without)
    made = tmp_path / "made"
    made.write_text("new")
    publish(made, tmp_path / "a")
    assert tree(tmp_path) == {"a": b"new"}
    made.write_text("newer")
    (tmp_path / "dangling").symlink_to("nothing")
    for taken in ("a", "dangling"):
        with pytest.raises(FileExistsError):
            publish(made, tmp_path / taken)
    assert (tmp_path / "a").read_text() == "new"
    (tmp_path / "log.jsonl").write_text('{"schema": "longrope.sea')
    publish(made, tmp_path / "log.jsonl")
    assert (tmp_path / "log.jsonl").read_text() == "newer"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output is looked at before hours of work: it may be there at their end."""
    path, fsync = tmp_path / "eval.json", os.fsync

    def appears(handle: int) -> None:
        path.write_text("mine")
        fsync(handle)

    check_output_file(path)
    monkeypatch.setattr(os, "fsync", appears)
    with pytest.raises(LongRopeError, match="exists; nothing is overwritten") as error:
        write_text_atomic(path, "results", new=True)
    assert error.value.code == "output-exists"
    assert tree(tmp_path) == {"eval.json": b"mine"}


def test_a_link_to_nothing_is_an_output_that_exists(tmp_path: Path) -> None:
    (tmp_path / "eval.json").symlink_to(tmp_path / "target")
    with pytest.raises(LongRopeError, match="exists; nothing is overwritten"):
        check_output_file(tmp_path / "eval.json")


def test_a_link_in_a_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "stage").symlink_to("elsewhere")
    refuse_links(tmp_path / "elsewhere", tmp_path / "nothing")
    with pytest.raises(LongRopeError, match="is a symbolic link; a run writes into its own folder only"):
        refuse_links(tmp_path / "stage")


# --- folders that a killed process has only made


def test_what_does_not_fill_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    begin_record(tmp_path)
    (tmp_path / "search.jsonl").touch()
    (tmp_path / "64").mkdir()
    (tmp_path / "64/search.jsonl").write_text('{"schema": "longrope.search/1", "sett')
    temporary(tmp_path / "search.jsonl").write_text("half")
    temporary(tmp_path / "64/scaling.json").write_text("half")
    assert occupied_by(tmp_path) is None
    new_output_folder(tmp_path)
    assert not list(tmp_path.glob(".longrope-*"))
    assert occupied_by(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["a", "64/a", "search.jsonl", "64/.lock.x", ".longrope-a"])
@pytest.mark.parametrize("content", ["", "my notes"])
def test_what_fills_a_folder(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "64").mkdir()
    (tmp_path / name).write_text(content)
    if name.endswith(".jsonl") and not content:
        assert occupied_by(tmp_path) is None
        return
    assert occupied_by(tmp_path) == tmp_path / name
    with pytest.raises(LongRopeError, match="is not empty"):
        new_output_folder(tmp_path)


def test_a_link_fills_a_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nothing")
    assert occupied_by(tmp_path) == tmp_path / "link"


# --- files that are moved up together


def moved(folder: Path, made: Path) -> None:
    (made / "sub").mkdir()
    for name in ("config.json", "weights", "sub/template"):
        (made / name).write_text(name)
    move_up(made, last="config.json")


def test_files_are_moved_up_the_last_one_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: order.append(path.name) or rename(path, target))
    with temporary_folder(tmp_path / "x") as made:
        moved(tmp_path, made)
    assert order == ["sub", "weights", "config.json"]
    assert tree(tmp_path) == {
        "config.json": b"config.json",
        "weights": b"weights",
        "sub": None,
        "sub/template": b"sub/template",
    }


@pytest.mark.parametrize("place", range(4))
def test_a_kill_while_files_are_moved_up_leaves_nothing_or_all(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`place`: the move before which the process was killed; after the last one, all is done."""
    rename, count = Path.rename, iter(range(10))

    def until(path: Path, target: Path) -> Path:
        if next(count) == place:
            raise KeyboardInterrupt
        return rename(path, target)

    out = new_output_folder(tmp_path / "out")
    made = temporary(out / "checkpoint")
    made.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until)
        if place < 3:
            with pytest.raises(KeyboardInterrupt):
                moved(out, made)
        else:
            moved(out, made)
    whole = place == 3
    assert (occupied_by(out) is not None) == whole
    if not whole:
        new_output_folder(out)  # can begin anew
        assert [name for name, content in tree(out).items() if content is not None] == []
        (out / "weights").write_text("mine")
        assert occupied_by(out) == out / "weights"
    else:
        sweep(out)
        assert (out / "config.json").read_text() == "config.json"
        assert not list(out.glob(".longrope-*"))


def test_a_file_that_has_changed_since_it_was_moved_up_is_kept(tmp_path: Path) -> None:
    made = temporary(tmp_path / "checkpoint")
    made.mkdir()
    begin_record(made)
    (made / "config.json").write_text("the last one")
    (tmp_path / "weights").write_text("mine")
    note(made, {"weights": sha256_text("ours"), "config.json": sha256_text("the last one")})
    assert occupied_by(tmp_path) == tmp_path / "weights"
    sweep(tmp_path)
    assert tree(tmp_path) == {"weights": b"mine"}


def test_a_record_of_a_stranger_removes_nothing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/file").write_text("mine")
    folder = tmp_path / "from a stranger"
    made = temporary(folder / "checkpoint")
    made.mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "links")
    (made / "config.json").touch()
    digest = sha256_file(tmp_path / "precious")
    names = ["../precious", str(tmp_path / "precious"), "link/file", "link", "a/../../precious"]
    (made / WRITTEN).write_text("".join(json.dumps({"file": name, "sha256": digest}) + "\n" for name in names))
    sweep(folder)
    assert (tmp_path / "precious").exists()
    assert (tmp_path / "links/file").exists()


# --- the record


def test_all_that_is_written_into_a_folder_with_a_record_is_its_own(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "before.txt", "before")
    begin_record(tmp_path)
    write_text_atomic(tmp_path / "a.txt", "a")
    write_json_atomic(tmp_path / "b.json", {"b": 1})
    begin_record(tmp_path)  # goes on
    assert recorded(tmp_path) == {"a.txt": {sha256_text("a")}, "b.json": {sha256_text('{\n "b": 1\n}\n')}}
    assert foreign(tmp_path / "before.txt") == tmp_path / "before.txt"
    assert foreign(tmp_path / "nothing") is None
    for name in ("a.txt", "b.json"):
        remove_own(tmp_path / name)
        remove_own(tmp_path / name)  # gone already
    with pytest.raises(LongRopeError, match=r"before.txt is not a file that this run has written.*; move it") as error:
        remove_own(tmp_path / "before.txt")
    assert error.value.code == "not-ours"
    assert sorted(os.listdir(tmp_path)) == [WRITTEN, "before.txt"]


def test_a_kill_before_a_file_has_its_name_leaves_it_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_record(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: pytest.fail("killed"))
        with pytest.raises(BaseException, match="killed"):
            write_text_atomic(tmp_path / "a.txt", "a")
    assert recorded(tmp_path).keys() == {"a.txt"}
    (tmp_path / "a.txt").write_text("mine")
    assert foreign(tmp_path / "a.txt") == tmp_path / "a.txt"


@pytest.mark.parametrize("change", ["edit", "add", "link"])
def test_a_folder_is_removed_only_where_all_of_it_is_own(tmp_path: Path, change: str) -> None:
    begin_record(tmp_path)
    stage = tmp_path / "stage"
    stage.mkdir()
    begin_record(stage)
    (stage / ".lock").touch()
    write_text_atomic(stage / "a.txt", "a")
    (stage / "figures").mkdir()
    (stage / "figures/a.svg").write_text("svg")
    note(stage, {"figures/a.svg": sha256_text("svg"), "work/": ""})
    (stage / "work").mkdir()
    (stage / "work/anything").touch()
    temporary(stage / "b.txt").touch()
    assert foreign(stage) is None
    place = stage / "figures/a.svg" if change == "edit" else stage / "figures/mine"
    place.symlink_to("a.svg") if change == "link" else place.write_text("mine")
    assert foreign(stage) == place
    before = tree(stage)
    with pytest.raises(LongRopeError, match="nothing is deleted or replaced"):
        remove_own(stage)
    assert tree(stage) == before
    place.unlink()
    remove_own(stage)
    assert os.listdir(tmp_path) == [WRITTEN]


def test_a_damaged_record_says_nothing(tmp_path: Path) -> None:
    begin_record(tmp_path)
    write_text_atomic(tmp_path / "a.txt", "a")
    write_text_atomic(tmp_path / "b.txt", "b")
    lines = (tmp_path / WRITTEN).read_text().splitlines(keepends=True)
    assert len(lines) == 4
    (tmp_path / WRITTEN).write_bytes(b"\xff\n[]\n3\n" + b"[" * 100_000 + b'\n{"file": 1}\n' + lines[1][:-9].encode())
    assert recorded(tmp_path) == {}
    write_text_atomic(tmp_path / "c.txt", "c")  # behind a line that was cut off
    assert recorded(tmp_path).keys() == {"c.txt"}
    assert foreign(tmp_path / "a.txt") is not None


# --- results that are there already


def test_a_result_is_written_once(tmp_path: Path) -> None:
    path, value = tmp_path / "a.json", {"loss": 0.1, "list": [{"x": (1, 2)}], "command": "search", "new": 1}
    keep_or_write_json(path, value)
    before = path.stat().st_mtime_ns
    keep_or_write_json(path, value)
    keep_or_write_json(path, value | {"command": "search --resume"}, but=("command",))
    del value["new"]  # of another version
    keep_or_write_json(path, value | {"later": 2})
    for other, said in ({"loss": 0.2}, "loss"), ({"list": [{"x": [1, 3]}]}, r"list\.x"), ({"list": []}, "list"):
        with pytest.raises(LongRopeError, match=f"is not what this run came to: {said} differ; put it back") as error:
            keep_or_write_json(path, value | other)
        assert error.value.code == "damaged-file"
    assert path.stat().st_mtime_ns == before
    for text in ("{", "[]", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(LongRopeError, match=r"expected .*JSON.*; put it back, or move it to another place"):
            keep_or_write_json(path, value)
