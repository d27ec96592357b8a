"""Fixtures that whole-tool tests share: checkpoints and texts on disk, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from longrope.cli import common
from longrope.cli.main import run
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.loading import LoadedModel, open_model
from longrope.models.scaled import ScaledModel
from longrope.rope.scaling import RopeScaling
from tests.checkpoints import save_checkpoint, words

torch.set_num_threads(1)  # two cores: tests that run side by side do not fight over them, and sums repeat bit for bit


@dataclass(frozen=True)
class Ran:
    """The result of a run of the command line: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The message of a run that was refused: exit code 2, and one line on standard error."""
        assert self.code == 2, self
        assert self.err.startswith("longrope: error: ")
        assert self.err.count("\n") == 1
        return self.err


@pytest.fixture(autouse=True)
def transformers_speaks() -> None:
    """The command line quiets transformers for its process; every test begins as a new process would."""
    logging.set_verbosity_warning()
    logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def wide_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences on one line and errors in full; tests of 80 columns set their own width."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(common.output, "width", 1000)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama checkpoint with a window of 64 tokens."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `search.txt` and `other.txt`, different texts of some thousand tokens."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "search.txt").write_text(words(2000, 1), "utf-8")
    (folder / "other.txt").write_text(words(2000, 2), "utf-8")
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    """The random checkpoint, loaded."""
    return open_model(str(checkpoint))


@pytest.fixture(scope="module")
def scaled(loaded: LoadedModel) -> Iterator[ScaledModel]:
    """The same with its original RoPE applied."""
    yield apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    remove_scaling(loaded.model)


@pytest.fixture(scope="module")
def source(texts: Path) -> list[str]:
    """The texts to search on."""
    return [str(texts / "search.txt")]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`cli("search", model, ...)` runs the command line in this process."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call
