"""A run continues from sealed checkpoints of the same run, never from half a checkpoint or a damaged one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from longrope.errors import LongRopeError
from longrope.run_files import FINETUNE_IDENTITY, TRAINER
from longrope.train import resume
from longrope.train.resume import SEAL, begin_checkpoint, claimed, last_sealed, remove_checkpoints, rotate, seal
from longrope.written import temporary


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of the Trainer's checkpoints in a run folder."""
    (tmp_path / FINETUNE_IDENTITY).write_text("{}")
    return tmp_path / TRAINER


def checkpoint(root: Path, step: int, run: str | None = "me") -> Path:
    """A checkpoint as it is written: begun, written, sealed by `run`."""
    folder = root / f"checkpoint-{step}"
    begin_checkpoint(folder)
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * step)
    (folder / "deep" / "optimizer.pt").write_bytes(b"moments")
    if run is not None:
        seal(folder, run)
    return folder


def test_the_latest_sealed_one(root: Path) -> None:
    checkpoint(root, 9)
    last = checkpoint(root, 10)
    half = checkpoint(root, 11, run=None)
    assert last_sealed(root, "me") == last
    assert not half.exists()


def test_a_run_from_before_a_setting_says_which(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", {"settings": {"steps": 4}}, False) as (_, kept):
        kept()
    with (
        pytest.raises(LongRopeError, match=r"is another one: settings.skip_to unknown \(now None\)"),
        claimed(tmp_path / "run", {"settings": {"steps": 4, "skip_to": None}}, True),
    ):
        pass


def test_none(root: Path) -> None:
    assert last_sealed(root, "me") is None
    checkpoint(root, 1, run=None)
    assert last_sealed(root, "me") is None


def test_one_that_the_run_did_not_begin_is_kept(root: Path) -> None:
    last = checkpoint(root, 1)
    mine = root / "checkpoint-2"
    mine.mkdir()
    assert last_sealed(root, "me") == last  # a kill before anything was written
    mine = root / "checkpoint-3"
    mine.mkdir()
    (mine / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(LongRopeError, match="not a checkpoint that this run has begun; move it") as error:
        last_sealed(root, "me")
    assert error.value.code == "not-ours"
    assert (mine / "model.safetensors").read_bytes() == b"mine"


def test_old_ones_go_in_one_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while one is being deleted leaves whole ones and a rest under a temporary name."""
    for step in (1, 2, 3, 10):
        checkpoint(root, step)
    with monkeypatch.context() as patch:

        def killed(folder: Path, **_: object) -> None:
            (folder / SEAL).unlink()
            raise KeyboardInterrupt

        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            rotate(root)
    left = [path for path in root.iterdir() if path.name.startswith(".longrope-checkpoint-1.")]
    assert len(left) == 1
    assert last_sealed(root, "me") == root / "checkpoint-10"
    rotate(root)
    assert sorted(path.name for path in root.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-3"]
    remove_checkpoints(root.parent)
    assert [path.name for path in root.parent.iterdir()] == [FINETUNE_IDENTITY]


@pytest.mark.parametrize("place", ["", "checkpoint-2", "checkpoint-2/deep"])
def test_files_of_the_user_stay(root: Path, place: str) -> None:
    for step in (1, 2):
        checkpoint(root, step)
    mine = root / place / "notes.txt"
    mine.write_text("mine")
    temporary(root / "checkpoint-3").mkdir()
    remove_checkpoints(root.parent)
    assert mine.read_text() == "mine"
    assert not (root / "checkpoint-1").exists()
    assert not list(root.glob(".longrope-*"))


def test_a_run_folder_that_is_gone_is_noticed(root: Path) -> None:
    checkpoint(root, 1)
    (root.parent / FINETUNE_IDENTITY).unlink()
    with pytest.raises(LongRopeError, match="was removed while this run was training in it") as error:
        checkpoint(root, 2)
    assert error.value.code == "output-removed"


def test_one_of_another_run_is_refused(root: Path) -> None:
    checkpoint(root, 1, run="other")
    with pytest.raises(LongRopeError) as error:
        last_sealed(root, "me")
    assert error.value.code == "other-run"


@pytest.mark.parametrize("change", ["grow", "remove", "add"])
def test_one_that_has_changed_is_refused(root: Path, change: str) -> None:
    folder = checkpoint(root, 1)
    file = folder / "deep" / "optimizer.pt"
    if change == "remove":
        file.unlink()
    else:
        (file if change == "grow" else folder / "new.pt").write_bytes(b"other bytes")
    with pytest.raises(LongRopeError, match="not as it was written") as error:
        last_sealed(root, "me")
    assert error.value.code == "damaged-file"


@pytest.mark.parametrize("name", ["model.safetensors", "deep/optimizer.pt"])
def test_a_bit_that_has_flipped_is_found(root: Path, name: str) -> None:
    before, folder = checkpoint(root, 1), checkpoint(root, 2)
    content = bytearray((folder / name).read_bytes())
    content[3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(LongRopeError, match=f"not as it was written .{name}.; remove it to continue from") as error:
        last_sealed(root, "me")
    assert error.value.code == "damaged-file"
    shutil.rmtree(folder)  # as the message says
    assert last_sealed(root, "me") == before


def test_a_seal_of_a_version_without_hashes_holds(root: Path) -> None:
    folder = checkpoint(root, 1)
    manifest = json.loads((folder / SEAL).read_text())
    (folder / SEAL).write_text(json.dumps({"run": manifest["run"], "files": manifest["files"]}))
    assert last_sealed(root, "me") == folder


def test_only_the_checkpoint_that_is_continued_is_hashed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        checkpoint(root, step)
    hashed: list[Path] = []
    real = resume.sha256_file
    monkeypatch.setattr(resume, "sha256_file", lambda path: hashed.append(path) or real(path))
    last_sealed(root, "me")
    assert {path.relative_to(root).parts[0] for path in hashed} == {"checkpoint-3"}
    assert len(hashed) == 2


@pytest.mark.parametrize("text", ["", "{}", '{"run": "me", "files": 3}', "[]"])
def test_a_damaged_seal_is_refused(root: Path, text: str) -> None:
    (checkpoint(root, 1) / SEAL).write_text(text, "utf-8")
    with pytest.raises(LongRopeError) as error:
        last_sealed(root, "me")
    assert error.value.code == "damaged-file"


def test_a_foreign_folder_is_refused(root: Path) -> None:
    (root / "checkpoint-best").mkdir(parents=True)
    with pytest.raises(LongRopeError, match="expected only checkpoint-N"):
        last_sealed(root, "me")
