"""Two real Ray workers on the CPU: the results of one process, bit for bit, whichever worker dies meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longrope.callbacks import Callbacks, SearchProgress
from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search import ray_evaluator
from longrope.search.evaluator import LoggedEvaluator
from longrope.search.log import SearchLog, read_log
from longrope.search.ray_evaluator import RayEvaluator, ray_session
from tests.evaluation.tiny import ramp
from tests.search.ray_targets import WINDOW, Obedient, Unmakeable, ask, losses, serial
from tests.search.targets import GEOMETRY, TARGET_LENGTH, distance, evolve

REPOSITORY = Path(__file__).parents[2]


def both(workers: RayEvaluator) -> set[float]:
    """The processes of the two workers, once both are ready."""
    while len(pids := set(losses(workers, [ask("pid", 0.1)] * 4))) < 2:
        pass
    return pids


@pytest.fixture(scope="module")
def workers(ray_cluster: Any) -> Iterator[RayEvaluator]:
    """Two workers, or their successors."""
    with RayEvaluator(Obedient, 2) as evaluator:
        both(evaluator)
        yield evaluator


def test_bit_for_bit_the_answers_of_one_process(workers: RayEvaluator) -> None:
    requests = []
    for number in range(12):
        length = (48, 96)[number % 2]
        split = "validation" if number == 4 else "search"
        window = ramp(length, ratio=2.0 + number / 7, attention_factor=1.0 + number / 50)
        samples = None if number % 3 else (number % 2, 0)
        requests.append(ask("model", window=window, split=split, samples=samples, gradient=number % 4 == 1))
    expected = list(serial()(requests))
    assert sum(result.gradient is not None for result in expected) == 3
    assert len({result.loss for result in expected}) == 12
    assert list(workers(requests)) == expected


def test_workers_share_the_requests(workers: RayEvaluator) -> None:
    pids = losses(workers, [ask("pid", 0.1)] * 4)
    assert len(set(pids)) == 2
    assert os.getpid() not in pids


def test_results_come_in_order_each_as_soon_as_its_turn_comes(workers: RayEvaluator, tmp_path: Path) -> None:
    windows = [Window(TARGET_LENGTH, (1.0 + number,) * GEOMETRY.pairs) for number in range(6)]
    gates = [tmp_path / "first", tmp_path / "last"]
    requests = [ask("pause", 0.0, window=window) for window in windows]
    requests[0], requests[5] = (
        ask("wait", str(gate), window=windows[at]) for gate, at in zip(gates, (0, 5), strict=True)
    )
    results = workers(requests)
    gates[0].touch()
    first = [next(results).loss for _ in range(5)]  # and the last is still being answered
    gates[1].touch()
    assert [*first, *(result.loss for result in results)] == [distance(window) for window in windows]


def test_a_slow_first_request_does_not_change_the_order(workers: RayEvaluator) -> None:
    windows = [Window(TARGET_LENGTH, (1.0 + number,) * GEOMETRY.pairs) for number in range(6)]
    requests = [ask("pause", 0.0 if number else 0.5, window=window) for number, window in enumerate(windows)]
    assert losses(workers, requests) == [distance(window) for window in windows]


def test_requests_given_up_leave_no_trace(workers: RayEvaluator) -> None:
    other = Window(TARGET_LENGTH, (3.0,) * GEOMETRY.pairs)
    results = workers([ask("pause", 0.2)] * 5)
    next(results)
    results.close()
    assert losses(workers, [ask("pause", 0.0, window=other)] * 3) == [distance(other)] * 3


def test_no_requests(workers: RayEvaluator) -> None:
    assert list(workers([])) == []


def test_a_search_with_a_worker_killed_in_mid_run(workers: RayEvaluator, tmp_path: Path) -> None:
    """The log of one process, byte for byte, and the best of it; progress follows each result."""
    expected, count = evolve(tmp_path / "whole")
    victim, other = both(workers)
    seen: list[int] = []

    class Kill(Callbacks):
        def on_search_progress(self, progress: SearchProgress) -> None:
            seen.append(progress.evaluations)
            if progress.evaluations == 10:
                os.kill(int(victim), signal.SIGKILL)

    found = evolve(tmp_path / "log", evaluator=workers, callbacks=Kill())
    assert (found[0].incumbent, found[1]) == (expected.incumbent, count)
    assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes()
    assert seen == list(range(1, count + 1))
    after = both(workers)
    assert other in after
    assert victim not in after


@pytest.mark.slow
def test_a_request_that_always_kills_its_worker(
    workers: RayEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; the log holds what was asked before, and the search goes on from it."""
    monkeypatch.setattr(ray_evaluator, "ATTEMPTS", 2)
    deaths, path = tmp_path / "deaths", tmp_path / "log"
    deaths.mkdir()
    doing = [("pause", 0.5), ("pause", 0.0), ("die", str(deaths), 2), ("pause", 0.0)]
    requests = [ask(*do, samples=(place,)) for place, do in enumerate(doing)]
    with (
        SearchLog.create(path, {"seed": 0}) as log,
        pytest.raises(LongRopeError, match="died 2 times on the same request") as error,
    ):
        LoggedEvaluator(workers, log)(requests)
    assert error.value.code == "out-of-memory"
    assert "\n" not in str(error.value)
    assert len(list(deaths.iterdir())) == 2
    _, rows = read_log(path)
    assert [row.request for row in rows] == [request.row for request in requests[:2]]
    with SearchLog.resume(path, {"seed": 0}) as log:
        results = [result.loss for result in LoggedEvaluator(workers, log)(requests)]
    assert results == [distance(WINDOW)] * 4


@pytest.mark.parametrize(("kind", "error"), [("user", LongRopeError), ("bug", ZeroDivisionError)])
def test_what_an_evaluation_raises_is_raised_in_its_turn(
    workers: RayEvaluator, kind: str, error: type[Exception]
) -> None:
    results = workers([ask("pause", 0.2), ask("complain", kind), ask("pause", 0.0)])
    assert next(results).loss == distance(WINDOW)
    with pytest.raises(error, match=f"^{kind} error$"):
        next(results)
    assert losses(workers, [ask("pause", 0.0)]) == [distance(WINDOW)]  # the worker lives


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deadly", "message"),
    [(False, "cannot be made: there is no such model"), (True, "2 search workers in a row died while they loaded")],
)
@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_cannot_be_made(deadly: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_evaluator, "ATTEMPTS", 2)
    with pytest.raises(LongRopeError, match=message) as error, RayEvaluator(Unmakeable(deadly), 1):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(RayEvaluator, Obedient, 0), "at least 1 of `workers`, found 0"),
        (
            partial(RayEvaluator, Obedient, 6),
            "expected room for 6 workers in the Ray cluster, 1 CPU each, found room for 5",
        ),
        (
            partial(RayEvaluator, Obedient, 1, gpu=True),
            "for 1 workers in the Ray cluster, 1 CPU and 1 GPU each, found room for 0",
        ),
        (partial(ray_session, "127.0.0.1:1"), "cannot join the Ray cluster at 127.0.0.1:1: ConnectionRefusedError"),
    ],
)
@pytest.mark.usefixtures("ray_cluster")
def test_what_cannot_be_had_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(LongRopeError, match=message) as error, make():
        pass
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("ray_cluster")
def test_as_many_workers_as_the_cluster_holds() -> None:
    assert RayEvaluator(Obedient)._checked_workers() == 5


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LongRopeError) as error:
        RayEvaluator(Obedient, 1)
    assert error.value.code == "missing-dependency"
    assert 'pip install "longrope[ray]"' in error.value.hint


JOINS = """
import sys
import torch
from longrope.search.ray_evaluator import RayEvaluator, ray_session
from tests.search.ray_targets import Obedient, ask, losses
torch.set_num_threads(3)
with ray_session(sys.argv[1]), RayEvaluator(Obedient, 1) as workers:
    found = losses(workers, [ask("die", sys.argv[2], 1), ask("threads")])
print(found)
"""


@pytest.mark.slow
def test_a_cluster_that_was_joined_lives_on(workers: RayEvaluator, ray_cluster: Any, tmp_path: Path) -> None:
    """Ray's messages about a dead worker do not go to standard output, where `--json` prints.

    A worker has the threads of its driver: neither the machine's, nor what Ray sets OMP_NUM_THREADS to.
    """
    command = [sys.executable, "-c", JOINS, ray_cluster.get_runtime_context().gcs_address, str(tmp_path)]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert ran.stdout == f"[{distance(WINDOW)}, 3.0]\n", ran.stderr
    assert "A worker died" in ran.stderr
    assert len(list(tmp_path.iterdir())) == 1
    assert len(both(workers)) == 2
