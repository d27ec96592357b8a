"""A tiny model, documents and settings for tests of training: seconds on one core."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longrope.callbacks import Callbacks, TrainProgress
from longrope.models.loading import LoadedModel, open_model
from longrope.rope.closed_forms import CLOSED_FORMS
from longrope.rope.scaling import RopeScaling
from longrope.train.config import FinetuneConfig
from tests.checkpoints import WINDOW, words

ROOT = Path(__file__).parents[2]
TARGET = 4 * WINDOW
MIXED = "short:0.25,long:0.75"


def write_texts(folder: Path) -> Path:
    """Three long texts and eight short ones, in one folder."""
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"long{number}.txt").write_text(words(150, number), "utf-8")
    for number in range(8):
        (folder / f"short{number}.txt").write_text(words(3 + number % 4, 50 + number), "utf-8")
    return folder


def yarn_scaling(loaded: LoadedModel, attention_factor: float | None = None, length: int = TARGET) -> RopeScaling:
    factors, m = CLOSED_FORMS["yarn"](loaded.geometry, length)
    given = m if attention_factor is None else attention_factor
    return RopeScaling.extended(loaded.geometry, length, factors, 0, given, {"data": {"document_sha256": ["f" * 64]}})


def training(**more: Any) -> FinetuneConfig:
    """Six steps of two rows of 256 tokens, far above the papers' learning rate so that weights move."""
    given: dict[str, Any] = {
        "length": TARGET,
        "steps": 6,
        "batch": 2,
        "learning_rate": 1e-3,
        "warmup": 1,
        "save_every": 2,
    }
    return FinetuneConfig(**(given | more))


class InterruptAt(Callbacks):
    """Ctrl-C after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_progress(self, progress: TrainProgress) -> None:
        if progress.step == self.step:
            raise KeyboardInterrupt


class Recorded(Callbacks):
    """Keeps what a training reports."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.progress: list[TrainProgress] = []

    def on_train_start(self, steps: int, first: int) -> None:
        self.started.append((steps, first))

    def on_train_progress(self, progress: TrainProgress) -> None:
        self.progress.append(progress)


def torchrun(module: str, processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`processes` of `python -m module arguments` on gloo, to their end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    script = ["-m", module, *map(str, arguments)]
    return subprocess.run([*command, *script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)


def open_fresh(checkpoint: Path) -> LoadedModel:
    return open_model(str(checkpoint))


@contextmanager
def files_of_at_most(size: int | None) -> Iterator[None]:
    """A file-size limit stands in for a full disk: the write that reaches it fails, in Python, safetensors or torch."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before if size is None else size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
