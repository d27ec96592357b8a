"""Jobs that end in time: signals of a scheduler, --time-limit, exit code 75, and the same end after --resume."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longrope.cli import stopping
from longrope.cli.main import app
from longrope.cli.progress import Display
from longrope.errors import LongRopeError
from longrope.units import parse_duration
from tests.conftest import Ran
from tests.train.runs import open_fresh, write_texts, yarn_scaling

STOPS = [signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h55m", 14_100.0),
        ("90m", 5400.0),
        ("45s", 45.0),
        ("1d12h", 129_600.0),
        ("03:55:00", 14_100.0),
        ("1-00:00:01", 86_401.0),
    ],
)
def test_a_duration_is_parsed(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "h", "3", "-3h", "3h55", "1:2", "3 hours", "55m3h", "nan", "9" * 30 + "s"])
def test_what_is_no_duration_is_one_line(text: str) -> None:
    with pytest.raises(LongRopeError, match="expected a duration such as 3h55m"):
        parse_duration(text)


def at(monkeypatch: pytest.MonkeyPatch, method: str, call: int, number: int) -> None:
    """Send `number` to this process in the given call of a method of the progress display."""
    real, calls = getattr(Display, method), []

    def called(self: Display, *values: object) -> None:
        real(self, *values)
        calls.append(values)
        if len(calls) == call:
            signal.raise_signal(number)

    monkeypatch.setattr(Display, method, called)


@pytest.mark.parametrize("number", STOPS)
def test_a_search_ends_with_a_state_that_goes_on(
    cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    options = ("--method", "gradient", "--steps", 2, "--samples", 1, "--target-length", 256)
    texts = write_texts(tmp_path / "texts")
    search = ("search", checkpoint, *options, "--data", texts)
    assert cli(*search, "-o", tmp_path / "whole").code == 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        at(patched, "on_search_progress", 3, number)
        ran = cli(*search, "-o", tmp_path / "stopped")
    assert ran.code == 75
    assert ran.err.splitlines()[-1] == f"longrope: stopped by {signal.Signals(number).name}"
    assert "continue with: longrope" in ran.err
    assert signal.getsignal(number) == before
    assert cli(*search, "-o", tmp_path / "stopped", "--resume").code == 0
    whole, stopped = (tmp_path / name / "search.jsonl" for name in ("whole", "stopped"))
    assert stopped.read_bytes() == whole.read_bytes()


def test_a_time_limit_ends_a_search(cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    options = ("--target-length", 256, "--data", texts, "-o", tmp_path / "run", "--time-limit")
    ran = cli("search", checkpoint, *options, "1s", "--method", "longrope", "--iterations", 1000, "--population", 1000)
    assert ran.code == 75, ran.err
    assert ran.err.endswith("longrope: stopped by the time limit of 1 s\n")
    assert cli("search", checkpoint, *options, "soon").code == 2
    assert cli("inspect", checkpoint, "--time-limit", "1s").code == 2  # not a job that goes on


def test_a_fine_tuning_ends_after_its_step_with_a_checkpoint(
    cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yarn_scaling(open_fresh(checkpoint)).save(tmp_path / "scaling.json")
    given = ("--scaling", tmp_path / "scaling.json", "--data", write_texts(tmp_path / "texts"), "--length", 256)
    quick = ("--steps", 4, "--batch", 1, "--learning-rate", "1e-3", "--warmup", 0)
    finetune = ("finetune", checkpoint, *given, *quick)
    assert cli(*finetune, "-o", tmp_path / "whole").code == 0
    with monkeypatch.context() as patched:
        at(patched, "on_train_progress", 2, signal.SIGTERM)
        ran = cli(*finetune, "-o", tmp_path / "stopped")
    assert ran.code == 75, ran.err
    assert "continue from the last checkpoint" in ran.err
    (kept,) = (tmp_path / "stopped").rglob("checkpoint-*")
    assert kept.name in ("checkpoint-2", "checkpoint-3")  # of the step that the signal came in, or the next
    ran = cli(*finetune, "-o", tmp_path / "stopped", "--resume")
    assert ran.code == 0, ran.err
    weights = [
        next((tmp_path / name / "checkpoint").glob("*.safetensors")).read_bytes() for name in ("whole", "stopped")
    ]
    assert weights[0] == weights[1]


def test_a_second_signal_does_not_wait_for_the_step() -> None:
    with stopping.stopping(None):
        assert not stopping.stop_after_step()
        signal.raise_signal(signal.SIGTERM)
        assert stopping.stop_after_step()
        with pytest.raises(stopping.Stopped, match="SIGUSR1"):
            signal.raise_signal(signal.SIGUSR1)


def test_a_stop_that_was_noted_ends_the_next_stage() -> None:
    with stopping.stopping(None):
        stopping.stop_after_step()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(stopping.Stopped, match="SIGTERM"):
            stopping.stop_at_once()


SCRIPTS = sorted((Path(__file__).parents[2] / "examples/slurm").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_for_slurm_can_be_read(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text("utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"longrope ((?:search|finetune) .*) \"\$\{resume\[@\]\}\"", text)
    for name, value in {"out": "run", "address": "head:6379", "processes": "32"}.items():
        line = line.replace(f'"${name}"', value)
    app.parse_args(shlex.split(line))


@pytest.mark.slow
def test_processes_end_after_the_same_step(checkpoint: Path, tmp_path: Path) -> None:
    """Two processes of torchrun, each with its own clock: one checkpoint, whole, and no process that waits for ever."""
    yarn_scaling(open_fresh(checkpoint)).save(tmp_path / "scaling.json")
    given = ("--scaling", tmp_path / "scaling.json", "--data", write_texts(tmp_path / "texts"), "--length", 256)
    finetune = ("finetune", checkpoint, *given, "--batch", 2, "--micro-batch", 1, "--warmup", 0, "-o", tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += ["longrope", *map(str, finetune), "--steps", "2000", "--save-every", "2000", "--time-limit", "30s"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode != 0
    assert ran.stderr.count("longrope: stopped by") == 2, ran.stderr
    (kept,) = (tmp_path / "run").rglob("checkpoint-*")
    assert 0 < int(kept.name.rpartition("-")[2]) < 2000
    assert {path.name for path in kept.iterdir()} >= {"trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"}


def test_a_run_that_can_go_on_is_said_to(cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path) -> None:
    options = ("--target-length", 256, "--data", write_texts(tmp_path / "texts"), "-o", tmp_path / "run")
    search = ("search", checkpoint, *options, "--steps", 1, "--samples", 1)
    assert cli(*search).code == 0
    again = cli(*search)
    assert again.code == 2
    assert again.err.endswith("go on with the run in it by --resume, or choose another -o\n")
