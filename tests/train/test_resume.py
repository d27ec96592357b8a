"""A run continues from sealed checkpoints of the same run, never from half a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from longrope.errors import LongRopeError
from longrope.train.resume import SEAL, last_sealed, seal


def checkpoint(root: Path, step: int, run: str | None = "me") -> Path:
    folder = root / f"checkpoint-{step}"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * step)
    (folder / "deep" / "optimizer.pt").write_bytes(b"moments")
    if run is not None:
        seal(folder, run)
    return folder


def test_the_latest_sealed_one(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    last = checkpoint(tmp_path, 10)
    half = checkpoint(tmp_path, 11, run=None)
    assert last_sealed(tmp_path, "me") == last
    assert not half.exists()


def test_none(tmp_path: Path) -> None:
    assert last_sealed(tmp_path / "nowhere", "me") is None
    checkpoint(tmp_path, 1, run=None)
    assert last_sealed(tmp_path, "me") is None


def test_one_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, run="other")
    with pytest.raises(LongRopeError) as error:
        last_sealed(tmp_path, "me")
    assert error.value.code == "other-run"


@pytest.mark.parametrize("change", ["grow", "remove", "add"])
def test_one_that_has_changed_is_refused(tmp_path: Path, change: str) -> None:
    folder = checkpoint(tmp_path, 1)
    file = folder / "deep" / "optimizer.pt"
    if change == "remove":
        file.unlink()
    else:
        (file if change == "grow" else folder / "new.pt").write_bytes(b"other bytes")
    with pytest.raises(LongRopeError, match="not as it was written") as error:
        last_sealed(tmp_path, "me")
    assert error.value.code == "damaged-file"


@pytest.mark.parametrize("text", ["", "{}", '{"run": "me", "files": 3}', "[]"])
def test_a_damaged_seal_is_refused(tmp_path: Path, text: str) -> None:
    (checkpoint(tmp_path, 1) / SEAL).write_text(text, "utf-8")
    with pytest.raises(LongRopeError) as error:
        last_sealed(tmp_path, "me")
    assert error.value.code == "damaged-file"


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(LongRopeError, match="expected only checkpoint-N"):
        last_sealed(tmp_path, "me")
