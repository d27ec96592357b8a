"""A worker of two Ray processes that share every text: one process's results, whichever of them dies or fails."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling
from longrope.models.fingerprint import fingerprint
from longrope.models.loading import LoadedModel, open_model
from longrope.rope.scaling import RopeScaling, Window
from longrope.search import ray_worker
from longrope.search.config import SearchConfig
from longrope.search.evaluator import EvalRequest, EvalResult, SerialEvaluator
from longrope.search.ray_evaluator import RayEvaluator
from longrope.search.replicas import Replica, numerics
from longrope.search.search_data import Texts, objectives_over, prepare_texts
from tests.conftest import Ran
from tests.models.families import tiny_model
from tests.search.ray_targets import Failing
from tests.train.runs import torchrun

TARGET = 510  # 4 pieces do not divide it
CONFIG = SearchConfig(method="gradient", samples=2, continuation=False)
CLI = ("--target-length", TARGET, "--method", "gradient", "--steps", 1, "--no-continuation", "--samples", 1)
WINDOW = Window(TARGET, tuple(torch.linspace(1, 9, 16, dtype=torch.float64).tolist()), 0, 1.2)
REQUESTS = [
    EvalRequest(WINDOW, {}),
    EvalRequest(WINDOW, {}, "validation", (1,)),
    EvalRequest(WINDOW, {}, samples=(0,), gradient=True),
]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return open_model(str(checkpoint))


@pytest.fixture(scope="module")
def drawn(loaded: LoadedModel, texts: Path) -> Texts:
    return prepare_texts(loaded, [str(texts / "search.txt")], TARGET, CONFIG)


def replica(loaded: LoadedModel, drawn: Texts, kind: type[Replica] = Replica, **more: Any) -> Replica:
    own = fingerprint(loaded.model), numerics(loaded, 2)
    return kind(loaded.name, loaded.options, drawn, *own, context_parallel=2, **more)


@pytest.fixture(scope="module")
def two(loaded: LoadedModel, drawn: Texts, ray_cluster: Any) -> Iterator[RayEvaluator]:
    """One worker of two processes, or its successor."""
    with RayEvaluator(replica(loaded, drawn), 1, processes=2) as evaluator:
        yield evaluator


@pytest.fixture(scope="module")
def found(two: RayEvaluator) -> list[EvalResult]:
    return list(two(REQUESTS))


def test_losses_and_gradients_are_those_of_one_process(
    found: list[EvalResult], loaded: LoadedModel, drawn: Texts
) -> None:
    scaled = apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    expected = list(SerialEvaluator(objectives_over(scaled, drawn))(REQUESTS))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert (ours.gradient is None) == (theirs.gradient is None)
    ours, theirs = (torch.tensor(results[2].gradient) for results in (found, expected))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["idle", "at work"])
def test_a_process_that_dies(
    rank: int, when: str, two: RayEvaluator, found: list[EvalResult], ray_cluster: Any
) -> None:
    """Its worker is replaced whole, and the request is computed again, to the same bits."""
    (worker,) = two._all()
    if when == "idle":
        ray_cluster.kill(worker._actors[rank])
        assert list(two(REQUESTS)) == found
    else:
        results = two(REQUESTS * 3)
        first = next(results)
        ray_cluster.kill(worker._actors[rank])
        assert [first, *results] == found * 3
    assert two._all() != [worker]
    assert len(two._all()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("deadly", "message"),
    [(False, "no room for 1 GiB$"), (True, "^a search worker died 3 times on the same request")],
)
@pytest.mark.usefixtures("ray_cluster")
def test_an_error_in_a_process_is_one_line(
    rank: int, deadly: bool, message: str, loaded: LoadedModel, drawn: Texts
) -> None:
    """And is told from the death of a process, which the other one feels as an error too."""
    failing = replica(loaded, drawn, Failing, rank=rank, deadly=deadly)
    with RayEvaluator(failing, 1, processes=2) as evaluator, pytest.raises(Exception, match=message):
        list(evaluator(REQUESTS))


@pytest.mark.slow
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.usefixtures("ray_cluster")
def test_an_error_that_the_first_process_is_not_told_of(
    early: bool, loaded: LoadedModel, drawn: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the other process for hours, as in an exchange by NCCL."""
    monkeypatch.setattr(ray_worker, "GRACE", 2)
    failing = replica(loaded, drawn, Failing, rank=1, unheard=True, early=early)
    message = "^a search worker cannot be made: .*no room for 1 GiB$" if early else "^no room for 1 GiB$"
    with pytest.raises(Exception, match=message), RayEvaluator(failing, 1, processes=2) as evaluator:
        list(evaluator(REQUESTS))


@pytest.mark.slow
def test_a_family_that_cannot_be_shared(tmp_path: Path, loaded: LoadedModel, drawn: Texts, ray_cluster: Any) -> None:
    """Its worker leaves no resources taken."""

    def groups() -> int:
        return sum(group["state"] != "REMOVED" for group in ray_cluster.util.placement_group_table().values())

    tiny_model("gemma2").save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    gemma, before = open_model(str(tmp_path)), groups()
    with (
        pytest.raises(LongRopeError, match=r"^a search worker cannot be made: .*found eager"),
        RayEvaluator(replica(gemma, drawn), 1, processes=2),
    ):
        pass
    until = time.monotonic() + 30
    while groups() > before:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.usefixtures("ray_cluster")
def test_all_processes_of_a_worker_need_room() -> None:
    evaluate = partial(RayEvaluator, dict, processes=2)
    assert evaluate()._checked_workers() == 2  # of 5 CPUs
    with pytest.raises(LongRopeError, match="expected room for 3 workers in the Ray cluster, 2 CPU each, found room f"):
        evaluate(3)._checked_workers()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_line(cli: Callable[..., Ran], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """It begins and ends the search of processes that torchrun has started."""
    search = ["search", checkpoint, "--data", texts / "search.txt", *CLI, "--context-parallel", 2, "-o"]
    started = torchrun("longrope", 2, *search, tmp_path / "torchrun")
    assert started.returncode == 0, started.stderr
    ran = cli(*search, tmp_path / "ray", "--workers", 1)
    assert ran.code == 0, ran.err
    assert "every text shared by 2 processes" in ran.err
    logs = [(tmp_path / name / "search.jsonl").read_text().splitlines() for name in ("torchrun", "ray")]
    assert logs[0][1:] == logs[1][1:]
    again = cli(*search, tmp_path / "torchrun", "--workers", 1, "--resume")
    assert again.code == 0, again.err
    assert "context_parallel" in cli(*search, tmp_path / "ray", "--context-parallel", 1, "--resume").refusal


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_on_two_nodes_of_which_one_leaves(cli: Callable[..., Ran], texts: Path, tmp_path: Path) -> None:
    evolution = ("--method", "longrope", "--population", 8, "--iterations", 3, "--samples", 1)
    search = ["search", "tiny", "--target-length", 2048, "--data", texts / "search.txt", *evolution]
    expected = cli(*search, "--workers", 1, "--context-parallel", 2, "-o", tmp_path / "one")
    assert expected.code == 0, expected.err
    command = [sys.executable, "-m", "tests.search.ray_nodes", tmp_path / "two", *search]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=900)
    assert ended.returncode == 0, ended.stderr
    logs = [(tmp_path / name / "search.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert logs[0][1:] == logs[1][1:]
