"""A recipe killed with SIGKILL at any moment, again and again, comes to the bits of one that was left alone."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.recipes.run import run_recipe
from longrope.rope.scaling import RopeScaling
from longrope.train.launch import finetune_in_processes
from longrope.train.output import FinetuneResult
from tests.checkpoints import save_checkpoint
from tests.recipes.recipes import FOLDERS, SEARCH_4, STAGES, TRAIN_4, recipe, without_times, write_recipe
from tests.train.runs import Recorded, training, write_texts, yarn_scaling

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TUNED_4, TUNED_8 = FOLDERS[2:4]


def start(folder: Path) -> subprocess.Popen[bytes]:
    """`longrope extend` in a process and a session of its own; the same command every time."""
    arguments = ["extend", "model", "--recipe", "recipe.yaml", "-o", "run"]
    return subprocess.Popen(
        [sys.executable, "-c", "from longrope.cli.main import main; main()", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def ended(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said.decode()


def results(run: Path) -> dict[str, Any]:
    """All that a run came to: weights, scalings with their provenance, measurements."""
    wanted = ("**/*.safetensors", "**/scaling.json", "**/search.json", "**/recover.json", "**/eval.json", "*.html")
    return {str(path.relative_to(run)): without_times(path) for pattern in wanted for path in run.glob(pattern)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The recipe's folder with an uninterrupted run in it, and the seconds that took."""
    folder = tmp_path_factory.mktemp("killed") / "whole"
    write_recipe(folder, *STAGES)
    save_checkpoint(folder / "model")
    began = time.monotonic()
    ended(start(folder))
    return folder, time.monotonic() - began


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(whole: tuple[Path, float], tmp_path: Path, seed: int) -> None:
    """At the moment a random file appears, and after a random time: both twice, then to the end."""
    kept, seconds = whole
    folder, draw = tmp_path / "killed", random.Random(seed)
    shutil.copytree(kept, folder, ignore=shutil.ignore_patterns("run"))
    names = sorted(str(path.relative_to(kept / "run")) for path in (kept / "run").rglob("*") if path.is_file())
    killed = 0
    for name in (draw.choice(names[: len(names) // 2]), None, draw.choice(names), None):
        process, until = start(folder), time.monotonic() + draw.uniform(0.3, 0.8) * seconds
        while process.poll() is None and time.monotonic() < until:
            if name is not None and (folder / "run" / name).exists():
                break
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.communicate()
    assert killed
    ended(start(folder))
    found, expected = results(folder / "run"), results(kept / "run")
    assert found.keys() == expected.keys()
    assert [name for name, content in found.items() if content != expected[name]] == []


# --- several processes for one fine-tuning


@pytest.fixture(scope="module")
def texts_to_train_on(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("train") / "texts"))


def in_processes(
    loaded: LoadedModel, texts: str, out: Path, *, model: str | None = None, **more: Any
) -> FinetuneResult:
    scaling = out.with_name("scaling.json")
    yarn_scaling(loaded).save(scaling)
    given = {"scaling": scaling, "data": [texts], "output_dir": out, "config": training(steps=10)}
    return finetune_in_processes(2, model or loaded.name, **given, resume=out.is_dir(), **more)


def test_two_processes_train_as_one_does(loaded: LoadedModel, tmp_path: Path) -> None:
    """As stages of a recipe, with their progress; within 1e-4, sums being taken in another order."""
    recorded = Recorded()
    made = {}
    for processes in (1, 2):
        stages = (SEARCH_4, {**TRAIN_4, "processes": processes})
        done = run_recipe(loaded, recipe(tmp_path, *stages), tmp_path / str(processes), recorded)
        made[processes] = done.stages["02-finetune-256"]
        assert not list((tmp_path / str(processes)).glob("02-finetune-256.*"))
    assert made[2]["final_loss"] == pytest.approx(made[1]["final_loss"], abs=1e-4)
    assert made[2]["final_loss"] < made[2]["first_loss"] - 0.05
    assert [one.step for one in recorded.progress] == [1, 2, 3] * 2


def test_what_the_processes_say_when_they_fail(loaded: LoadedModel, texts_to_train_on: str, tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match=r"the 2 processes of the fine-tuning failed: .*no model folder") as error:
        in_processes(loaded, texts_to_train_on, tmp_path / "run", model=str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)
    messages = str(error.value).partition("(all messages: ")[2].removesuffix(")")
    assert "no model folder" in Path(messages).read_text()


def test_processes_end_with_the_one_that_started_them(
    loaded: LoadedModel, texts_to_train_on: str, tmp_path: Path
) -> None:
    """Killed in the middle, nobody trains on behind its back, and the run goes on to the same bits."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    expected, folder = in_processes(loaded, texts_to_train_on, tmp_path / "whole/run"), tmp_path / "killed"
    script = (
        "import sys; from pathlib import Path\n"
        "from longrope.callbacks import Callbacks\n"
        "from tests.recipes.test_killed import in_processes\n"
        "from longrope.models.loading import open_model\n"
        "class Printed(Callbacks):\n"
        "    def on_train_progress(self, progress): print(progress.step, flush=True)\n"
        "in_processes(open_model(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), callbacks=Printed())\n"
    )
    arguments = [loaded.name, texts_to_train_on, str(folder / "run")]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "3":
            break
    process.kill()
    process.communicate()
    identity, waited = folder / "run/run.json", time.monotonic() + 60
    while time.monotonic() < waited and not unlocked(identity):
        time.sleep(0.2)
    found = in_processes(loaded, texts_to_train_on, folder / "run")
    assert found.losses == expected.losses
    one, other = (result.checkpoint / "model.safetensors" for result in (found, expected))
    assert one.read_bytes() == other.read_bytes()
    assert RopeScaling.load(found.path).windows == RopeScaling.load(expected.path).windows
    assert json.loads((folder / "run/finetune.json").read_text())["identity"]["processes"] == 2


def unlocked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
