"""Ray in a process of its own: a search goes on when Ray ends, and no process is left at its end.

`without_ray.py` takes the place of Ray but in the last test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longrope.callbacks import Callbacks, SearchProgress
from longrope.errors import LongRopeError
from longrope.search import ray_process
from longrope.search.ray_process import RayProcess
from tests.search.ray_targets import WINDOW, Obedient, Unmakeable, ask, losses
from tests.search.targets import distance, evolve
from tests.search.without_ray import Odd

psutil = pytest.importorskip("psutil")
REPOSITORY = Path(__file__).parents[2]
NOTE = "Ray has ended; it is started again, and the search goes on"


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_process, "__name__", "tests.search.without_ray")
    monkeypatch.setattr(sys, "path", [str(REPOSITORY), *sys.path])


def processes() -> list[Any]:
    """The living processes below this one, but those of a Ray session that other tests share."""
    found = [child for child in psutil.Process().children() if "ray_process" in " ".join(child.cmdline())]
    found += [child for child in psutil.Process().children() if "without_ray" in " ".join(child.cmdline())]
    return [one for child in found for one in [child, *child.children(recursive=True)] if alive(one)]


def alive(process: Any) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def wait_until_gone(started: list[Any]) -> None:
    deadline = time.monotonic() + 30
    while any(map(alive, started)):
        assert time.monotonic() < deadline, started
        time.sleep(0.1)


@pytest.mark.usefixtures("without_ray")
def test_a_search_whose_ray_ends_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The log of one process, byte for byte; what Ray prints is not shown."""
    expected, count = evolve(tmp_path / "whole")

    class Kill(Callbacks):
        def on_search_progress(self, progress: SearchProgress) -> None:
            if progress.evaluations == 10:
                (driver,) = processes()
                driver.kill()

    notes: list[str] = []
    with RayProcess(Obedient, on_note=notes.append) as evaluator:
        found = evolve(tmp_path / "log", evaluator=evaluator, callbacks=Kill())
    assert notes == [NOTE]
    assert (found[0].incumbent, found[1]) == (expected.incumbent, count)
    assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes()
    assert processes() == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_errors_and_batches_that_are_given_up(tmp_path: Path) -> None:
    notes: list[str] = []
    with RayProcess(Odd, on_note=notes.append) as evaluator:
        results = evaluator([ask("pause", 0.0), ask("complain", "user"), ask("pause", 0.0)])
        assert next(results).loss == distance(WINDOW)
        with pytest.raises(LongRopeError, match=r"^user error"):
            next(results)
        with pytest.raises(ZeroDivisionError, match=r"^bug error") as error:
            losses(evaluator, [ask("complain", "bug")])
        assert any("in complain" in note for note in error.value.__notes__)  # the traceback of the other process
        with pytest.raises(RuntimeError, match="an error with a function"):
            losses(evaluator, [ask("lock")])
        results = evaluator([ask("pid", 0.0)] * 50)
        first = next(results)
        results.close()
        assert losses(evaluator, [ask("pause", 0.0)] * 2) == [distance(WINDOW)] * 2
        assert losses(evaluator, [ask("pid", 0.0)]) == [first.loss]  # one process for all
        assert losses(evaluator, []) == []
    assert notes == []


@pytest.mark.slow
@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.usefixtures("without_ray")
def test_a_ray_that_always_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_start: bool) -> None:
    """One line that says how to go on. A result in between begins the count anew."""
    monkeypatch.setattr(ray_process, "ATTEMPTS", 2)
    notes: list[str] = []
    requests = [ask("die", str(tmp_path), 1), ask("pause", 0.0), ask("die", str(tmp_path), 9)]
    evaluator = RayProcess(Unmakeable(deadly=True) if at_start else Obedient, on_note=notes.append)
    with pytest.raises(LongRopeError) as error, evaluator:
        losses(evaluator, requests)
    assert str(error.value) == (
        "Ray ended 2 times in a row; see /tmp/ray/session_latest/logs; continue with `resume=True`"
    )
    assert error.value.code == "no-cluster"
    assert notes == [NOTE] * (1 if at_start else 2)
    assert processes() == []


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_what_cannot_be_started_is_raised() -> None:
    with (
        pytest.raises(LongRopeError, match=r"^there is no such model"),
        RayProcess(Unmakeable(deadly=False), on_note=print),
    ):
        pass
    assert processes() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_search_leaves_no_process(number: int) -> None:
    """Though the other process is in the middle of an evaluation."""
    program = (
        "from longrope.search import ray_process\n"
        "from tests.search.ray_targets import Obedient, ask\n"
        "ray_process.__name__ = 'tests.search.without_ray'\n"
        "with ray_process.RayProcess(Obedient, on_note=print) as evaluator:\n"
        "    print('ready', flush=True)\n"
        "    list(evaluator([ask('pause', 300.0)]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as search:
        assert search.stdout is not None
        assert search.stdout.readline() == "ready\n"
        others = psutil.Process(search.pid).children(recursive=True)
        assert others
        time.sleep(0.5)
        search.send_signal(number)
        search.wait(30)
    wait_until_gone(others)


@pytest.mark.slow
def test_the_command_line_when_the_agent_of_ray_is_killed(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """Ray ends its raylet with the agent, and its driver with the raylet: the search ends as one without Ray."""
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "longrope", "search", checkpoint, "--target-length", 128, "--method", "longrope"]
    command += ["--data", texts / "search.txt", "--population", 8, "--iterations", 6, "--samples", 4]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def started(name: str, *more: Any) -> subprocess.Popen[str]:
        line = [str(part) for part in [*command, *more, "-o", tmp_path / name]]
        return subprocess.Popen(
            line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )

    with started("serial") as search:
        search.communicate()
        assert search.returncode == 0
    log = tmp_path / "ray" / "search.jsonl"
    with started("ray", "--workers", 2) as search:
        while not log.exists() or log.read_bytes().count(b"\n") < 4:
            assert search.poll() is None, search.stderr and search.stderr.read()
            time.sleep(0.01)
        below = psutil.Process(search.pid).children(recursive=True)
        (agent,) = [one for one in below if "ray::DashboardAgent" in one.cmdline()[0]]
        agent.kill()
        out, err = search.communicate(timeout=300)
    assert search.returncode == 0, err
    assert NOTE in err
    assert "raylet" not in out + err
    assert "core_worker" not in out + err
    assert log.read_text().splitlines()[1:] == (tmp_path / "serial" / "search.jsonl").read_text().splitlines()[1:]
    wait_until_gone(below)
