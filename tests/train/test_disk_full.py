"""A disk that is full while a fine-tuning saves: one line, nothing half written, and the run goes on to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from longrope.errors import LongRopeError
from longrope.run_files import FINETUNE_IDENTITY
from longrope.train.finetune import finetune
from longrope.train.output import FinetuneResult
from longrope.train.trainer import WindowTrainer
from longrope.written import WRITTEN
from tests.train.runs import files_of_at_most, open_fresh, training, write_texts, yarn_scaling

STEPS = training(steps=3, save_every=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


def run(checkpoint: Path, sources: Path, out: Path, **more: Any) -> FinetuneResult:
    loaded = open_fresh(checkpoint)
    return finetune(loaded, scaling=yarn_scaling(loaded), data=sources, output_dir=out, config=STEPS, **more)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(checkpoint, sources, tmp_path_factory.mktemp("whole") / "run").checkpoint


def refused(checkpoint: Path, sources: Path, out: Path, **more: Any) -> str:
    with pytest.raises(LongRopeError) as error:
        run(checkpoint, sources, out, **more)
    said = str(error.value)
    assert error.value.code == "output-not-writable", said
    assert "\n" not in said
    assert len(said) < 400
    return said


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("kept", [0, 1])
def test_a_checkpoint_that_does_not_fit(
    checkpoint: Path, sources: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, kept: int
) -> None:
    """In the weights and in the optimizer's state; of the first checkpoint, and of the second."""
    weights = (whole / "model.safetensors").stat().st_size
    size = weights // 2 if part == "model.safetensors" else weights * 3 // 2
    save, out = WindowTrainer._save_checkpoint, tmp_path / "run"

    def saved(self: WindowTrainer, *arguments: Any) -> None:
        if self.state.global_step <= kept:
            save(self, *arguments)
            return
        with files_of_at_most(size):
            save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(WindowTrainer, "_save_checkpoint", saved)
        said = refused(checkpoint, sources, out)
    assert f"cannot write the checkpoint {out / 'trainer' / f'checkpoint-{kept + 1}'}: " in said
    assert said.endswith("the checkpoints before it are kept; make room and continue with `resume=True`")
    left = {path.name for path in (out / "trainer").iterdir()}
    assert left == {WRITTEN} | {"checkpoint-1" for _ in range(kept)}
    done = run(checkpoint, sources, out, resume=True)
    assert_same(done.checkpoint, whole)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("Error while serializing")])
def test_a_result_that_does_not_fit(
    checkpoint: Path, sources: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    out = tmp_path / "run"

    def full(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("longrope.train.output.copy_companions", full)
        said = refused(checkpoint, sources, out)
    assert f"cannot write {out / 'checkpoint'}: " in said
    assert sorted(path.name for path in out.iterdir()) == [WRITTEN, FINETUNE_IDENTITY, "trainer"]
    assert_same(run(checkpoint, sources, out, resume=True).checkpoint, whole)


def test_an_error_that_is_not_about_files_is_no_full_disk(
    checkpoint: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("transformers.Trainer._save_checkpoint", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(checkpoint, sources, tmp_path / "run")


def test_a_run_folder_that_is_deleted_is_noticed_at_the_next_checkpoint(
    checkpoint: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, out = WindowTrainer._save_checkpoint, tmp_path / "run"

    def deleted(self: WindowTrainer, *arguments: Any) -> None:
        if self.state.global_step == 2:
            out.rename(tmp_path / "away")
        save(self, *arguments)

    monkeypatch.setattr(WindowTrainer, "_save_checkpoint", deleted)
    with pytest.raises(LongRopeError, match="was removed while this run was training in it") as error:
        run(checkpoint, sources, out)
    assert error.value.code == "output-removed"
    assert not out.exists()


def assert_same(one: Path, other: Path) -> None:
    found, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)
