"""Jobs in Python log their progress where they are given no callbacks."""

from __future__ import annotations

import logging

import pytest

import longrope
from longrope.callbacks import Callbacks, SearchProgress, TrainProgress
from longrope.progress_log import EVERY, LoggedProgress


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="longrope")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "longrope"]


def test_a_line_at_once_and_then_one_a_minute(lines):
    now = [0.0]
    progress = LoggedProgress(lambda: now[0])
    progress.on_search_start(40, {"none": 5.0, "yarn": 3.5, "pi": float("nan")})
    for evaluations, at in ((1, 0.0), (2, EVERY - 1), (3, EVERY), (4, EVERY + 1)):
        now[0] = at
        progress.on_search_progress(SearchProgress(evaluations, 3.25, replayed=False))
    progress.on_search_progress(SearchProgress(5, 3.0, replayed=True))
    assert lines() == [
        "search: at most 40 evaluations; best baseline: yarn, loss 3.5000",
        "search: 1 of 40 evaluations at most, best loss 3.2500",
        "search: 3 of 40 evaluations at most, best loss 3.2500",
    ]


def test_training_and_evaluation(lines):
    progress = LoggedProgress(lambda: 0.0)
    progress.on_train_start(20, 10)
    progress.on_train_progress(TrainProgress(11, 2.5, 1234.5))
    progress.on_eval_start(8)
    progress.on_eval_step()
    assert lines() == [
        "train: 20 steps, 10 of them done before",
        "train: 11 of 20 steps, loss 2.5000, 1,234 tokens/s",
        "evaluate: 8 samples",
        "evaluate: 1 of 8 samples",
    ]


def test_a_job_without_callbacks_logs_and_one_with_them_does_not(checkpoint, texts, lines):
    given = {"data": str(texts / "search.txt"), "lengths": [32], "config": longrope.EvalConfig(samples=1)}
    longrope.evaluate(str(checkpoint), **given)
    assert "evaluate: 1 samples" in lines()
    before = len(lines())
    longrope.evaluate(str(checkpoint), **given, callbacks=Callbacks())
    assert len(lines()) == before


def test_a_search_ends_with_its_verdict(checkpoint, texts, lines, tmp_path):
    config = longrope.SearchConfig(steps=1, samples=1, continuation=False)
    data = str(texts / "search.txt")
    longrope.search_scaling(str(checkpoint), target_length=128, data=data, config=config, output_dir=tmp_path / "run")
    said = lines()
    assert any(line.startswith("computing on cpu in float32") for line in said)
    assert said[-1].startswith("gradient: ")
    assert " nats per token" in said[-1]
