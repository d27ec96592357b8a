"""Replicas in Ray workers result as the model here, bit for bit, and refuse to be another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope.callbacks import Callbacks, SearchProgress
from longrope.data.sources import as_sources
from longrope.errors import LongRopeError
from longrope.models import processes
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.config import LoadOptions
from longrope.models.devices import moved_to_cpu
from longrope.models.fingerprint import fingerprint
from longrope.models.loading import LoadedModel, open_model
from longrope.rope.scaling import RopeScaling, Window
from longrope.search import run
from longrope.search.config import SearchConfig
from longrope.search.evaluator import (
    EvalRequest,
    EvalResult,
    EvaluateEach,
    LoggedEvaluator,
    SearchOutcome,
    SerialEvaluator,
)
from longrope.search.log import SearchLog
from longrope.search.ray_evaluator import RayEvaluator
from longrope.search.replicas import Replica, numerics, ray_evaluator
from longrope.search.search_data import Texts, objectives_over, prepare_texts
from tests.search.conftest import planned_over

TARGET = 512
EVOLUTION = SearchConfig(method="longrope", population=4, iterations=2, samples=2)
NEEDLES = SearchConfig(method="gradient", objective="needle", samples=2, continuation=False)


@pytest.fixture
def loaded(checkpoint: Path) -> LoadedModel:
    return open_model(str(checkpoint))


def search_into(
    path: Path, loaded: LoadedModel, texts: Texts, evaluator: RayEvaluator | None = None, ray: Any = None
) -> SearchOutcome:
    """A small evolution under a log at `path`, computed here or by `evaluator`, which loses a worker."""
    handle = apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    planned = planned_over(loaded, handle, texts, TARGET, EVOLUTION)

    class Kill(Callbacks):
        def on_search_progress(self, progress: SearchProgress) -> None:
            if evaluator is not None and progress.evaluations == 1:
                ray.kill(next(iter(evaluator._busy.values()))._actors[0])

    each: EvaluateEach = evaluator or SerialEvaluator(planned.objectives)
    with SearchLog.create(path, planned.identity) as log:
        evaluate = LoggedEvaluator(each, log)
        with evaluate.search(Kill()):
            return planned.prepared.run(evaluate, on_best=evaluate.report_best)


@pytest.mark.slow
def test_a_search_by_two_workers_one_of_them_killed(
    loaded: LoadedModel, texts: Path, tmp_path: Path, ray_cluster: Any
) -> None:
    drawn = prepare_texts(loaded, [str(texts / "search.txt")], TARGET, EVOLUTION)
    expected = search_into(tmp_path / "serial", loaded, drawn)
    with ray_evaluator(loaded, drawn, workers=2, on_note=print) as evaluator:
        assert isinstance(evaluator, RayEvaluator)
        found = search_into(tmp_path / "ray", loaded, drawn, evaluator, ray_cluster)
    assert found == expected
    assert (tmp_path / "ray").read_bytes() == (tmp_path / "serial").read_bytes()


@pytest.mark.usefixtures("ray_cluster")
def test_the_command_line(cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """`--workers` changes nothing in the log but the command that made it."""
    for name, more in {"serial": (), "ray": ("--workers", 1)}.items():
        small = ("--population", 4, "--iterations", 1, "--samples", 1, "--method", "longrope")
        data = ("--target-length", 128, "--data", texts / "search.txt")
        ran = cli("search", checkpoint, *data, *small, *more, "-o", tmp_path / name, "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["evaluations"] == 6
    header, *rows = (tmp_path / "ray" / "search.jsonl").read_text().splitlines()
    expected, *expected_rows = (tmp_path / "serial" / "search.jsonl").read_text().splitlines()
    assert rows == expected_rows
    assert {**json.loads(header), "record": None} == {**json.loads(expected), "record": None}


def requests() -> list[EvalRequest]:
    """Losses and gradients, on both splits, all samples and some."""
    window = Window(TARGET, tuple(torch.linspace(1, 9, 16, dtype=torch.float64).tolist()), 0, 1.2)
    return [
        EvalRequest(window, {}),
        EvalRequest(window, {}, "validation", (1,)),
        EvalRequest(window, {}, samples=(0,), gradient=True),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_needles_and_gradients(
    loaded: LoadedModel, texts: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    """Of a model named relative to this process's working folder."""
    monkeypatch.chdir(checkpoint.parent)
    loaded = replace(loaded, name=checkpoint.name)
    drawn = prepare_texts(loaded, [str(texts / "search.txt")], TARGET, NEEDLES)
    scaled = apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    expected = list(SerialEvaluator(objectives_over(scaled, drawn))(requests()))
    with ray_evaluator(loaded, drawn, workers=1, on_note=print) as evaluator:
        assert list(evaluator(requests())) == expected
    assert expected[2].gradient is not None
    assert len({result.loss for result in expected}) == 3


def replica_of(loaded: LoadedModel, **more: Any) -> Replica:
    drawn = prepare_texts(loaded, ["book:an-american-tragedy"], TARGET, EVOLUTION)
    remove_scaling(loaded.model)
    replica = Replica(loaded.name, loaded.options, drawn, fingerprint(loaded.model), numerics(loaded))
    return replace(replica, **more)


def test_a_recipe_says_what_makes_a_replica(loaded: LoadedModel) -> None:
    """Its options too: a longer original window, another dtype."""
    loaded = open_model(loaded.name, options=LoadOptions(dtype="float64", original_length=100))
    evaluator = replica_of(loaded)()
    ((key, objective),) = evaluator.objectives.items()
    assert key == ("search", TARGET)
    assert objective.scaled.model is not loaded.model
    assert objective.scaled.model.dtype == torch.float64
    assert objective.scaled.scaling.geometry == loaded.geometry
    assert objective.scaled.scaling.geometry.original_length == 100


def test_a_replica_needs_no_tokenizer(loaded: LoadedModel, tmp_path: Path) -> None:
    """The texts come as token ids; the tokenizer of a search may lie elsewhere than its model."""
    bare = shutil.copytree(loaded.name, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    with pytest.raises(LongRopeError, match="expected a tokenizer"):
        open_model(bare)
    replica_of(open_model(bare, loaded.tokenizer))()


def test_other_weights_are_refused(loaded: LoadedModel) -> None:
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1.0)
    with pytest.raises(LongRopeError) as error:
        replica_of(loaded)()
    assert error.value.code == "other-model"


def test_another_way_to_compute_is_refused(loaded: LoadedModel) -> None:
    replica = replica_of(loaded)
    torch.set_num_threads(2)
    try:
        with pytest.raises(LongRopeError, match=r"computes otherwise than this search began: threads 2 \(not 1\)$"):
            replica()
    finally:
        torch.set_num_threads(1)
    replica.numerics["hardware"] = "NVIDIA H200"
    with pytest.raises(LongRopeError, match=r"hardware .* \(not NVIDIA H200\)$"):
        replica()


def test_a_process_of_torchrun_has_no_workers(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever job the search is part of: an extension, a recipe."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes._Speaker, "silent", False)
    monkeypatch.setattr(processes._Speaker, "count", 1)
    with (
        pytest.raises(LongRopeError, match="expected one process here, found 2"),
        ray_evaluator(loaded, {}, workers=1, on_note=print),
    ):
        pass


def test_ray_hands_out_the_gpus(loaded: LoadedModel) -> None:
    numbered = replace(loaded, options=LoadOptions(device="cuda:1"))
    with (
        pytest.raises(LongRopeError, match="expected the device cuda, found cuda:1"),
        ray_evaluator(numbered, {}, workers=1, on_note=print),
    ):
        pass


def test_the_device_that_is_named_is_that_of_the_workers(
    loaded: LoadedModel, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they compute, the model here is elsewhere; in another dtype stands for that."""

    @contextmanager
    def workers(loaded: LoadedModel, *_: Any, **__: Any) -> Iterator[EvaluateEach]:
        loaded.model.to(torch.float64)
        yield lambda requests: (EvalResult(sum(request.window.factors)) for request in requests)
        loaded.model.to(torch.float32)

    lines: list[str] = []

    class Lines(Callbacks):
        def on_device(self, where: str) -> None:
            lines.append(where)

    monkeypatch.setattr(run, "ray_evaluator", workers)
    source = as_sources(str(texts / "search.txt"))
    made: dict[str, Any] = {"workers": 1, "context_parallel": 2, "callbacks": Lines()}
    run.search(loaded, TARGET, source, tmp_path / "run", EVOLUTION, **made)
    assert lines == ["computing on cpu in float32, every text shared by 2 processes"]


@pytest.mark.parametrize("count", [0, -2, 1.5, "2"])
def test_context_parallel_is_a_number(count: Any) -> None:
    with pytest.raises(LongRopeError, match=f"`context_parallel` must be a whole number, 1 or more; found {count!r}"):
        run.search_scaling("tiny", target_length=TARGET, workers=1, context_parallel=count)


def test_the_model_waits_in_main_memory(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is back at the end, whatever happens."""
    moves: list[str] = []
    monkeypatch.setattr(loaded.model, "to", lambda device: moves.append(str(device)))

    def interrupted() -> None:
        with moved_to_cpu(loaded.model):
            assert moves == ["cpu"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert moves == ["cpu", "cpu"]  # back to where it was
