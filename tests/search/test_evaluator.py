"""The logged evaluator: a search stopped anywhere and resumed ends bit-identically to one that ran through."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longrope.callbacks import SearchProgress
from longrope.errors import LongRopeError
from longrope.locked import with_checksum
from longrope.rope.scaling import Window
from longrope.search.evaluator import (
    SEARCH,
    VALIDATION,
    EvalRequest,
    EvalResult,
    LoggedEvaluator,
    both_splits,
    gradient_request,
    loss_request,
    mean_loss,
)
from longrope.search.log import SearchLog, read_log
from tests.search.targets import HEADER, SETTINGS, FunctionEvaluator, Shown, candidate_of, distance, evolve

REPOSITORY = Path(__file__).parents[2]
EVALUATIONS = SETTINGS.evaluations  # 32: generations of 8, 6, 6, 6, 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of the search that was never stopped."""
    path = tmp_path_factory.mktemp("whole") / "search.jsonl"
    evolve(path)
    return path


def broken(window: Window) -> float:
    """`distance`, but NaN or infinite for two candidates in three."""
    kind = sum(round(factor * 100) for factor in window.factors) % 3
    return (math.nan, math.inf, distance(window))[kind]


def test_log_holds_every_evaluation_in_order(whole: Path) -> None:
    _, rows = read_log(whole)
    assert [row.index for row in rows] == list(range(EVALUATIONS))
    assert [row.generation for row in rows] == [0] * 8 + [1] * 6 + [2] * 6 + [3] * 6 + [4] * 6
    assert all(row.loss == distance(candidate_of(row).window(2048, 1.0)) for row in rows)


def test_best_and_count(whole: Path, tmp_path: Path) -> None:
    optimizer, count = evolve(tmp_path / "log")
    _, rows = read_log(whole)
    best = min(rows, key=lambda row: row.loss)
    assert count == EVALUATIONS
    assert optimizer.incumbent == (candidate_of(best), best.loss)


@pytest.mark.parametrize("loss", [distance, broken])
def test_stopped_after_any_evaluation(tmp_path: Path, loss: Callable[[Window], float]) -> None:
    """Ctrl-C after 0, 1, 2, … evaluations, within generations and between them."""
    expected, _ = evolve(tmp_path / "whole", evaluator=FunctionEvaluator(loss))
    whole = (tmp_path / "whole").read_bytes()
    assert (b'"nan"' in whole, b'"inf"' in whole) == ((True, True) if loss is broken else (False, False))
    for stop in range(EVALUATIONS):
        path = tmp_path / f"{stop}"
        with pytest.raises(KeyboardInterrupt):
            evolve(path, evaluator=FunctionEvaluator(loss, stop))
        stopped = path.read_bytes()
        assert whole.startswith(stopped)
        assert len(read_log(path)[1]) == stop
        resumed = FunctionEvaluator(loss)
        optimizer, count = evolve(path, resume=True, evaluator=resumed)
        assert path.read_bytes() == whole
        assert optimizer.incumbent == expected.incumbent
        # The evaluations in the log were not made again, and are part of the count.
        assert (resumed.computed, count) == (EVALUATIONS - stop, EVALUATIONS)


def test_stopped_again_and_again(whole: Path, tmp_path: Path) -> None:
    path, starts = tmp_path / "log", 0
    while True:
        starts += 1
        try:
            evolve(path, resume=starts > 1, evaluator=FunctionEvaluator(stop_after=3))
            break
        except KeyboardInterrupt:
            continue
    assert starts == EVALUATIONS // 3 + 1
    assert path.read_bytes() == whole.read_bytes()


def test_killed_process(whole: Path, tmp_path: Path) -> None:
    """`kill -9` in mid-run, at whatever moment it falls."""
    path = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-m", "tests.search.targets", str(path), "0.15"], cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 30
        while not (path.exists() and path.read_bytes().count(b"\n") > 5):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    stopped = path.read_bytes()
    assert whole.read_bytes().startswith(stopped)
    assert 5 < stopped.count(b"\n") < EVALUATIONS + 1
    evolve(path, resume=True)
    assert path.read_bytes() == whole.read_bytes()


def test_a_finished_search_is_replayed_without_evaluating(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(whole.read_bytes())
    evaluator = FunctionEvaluator(stop_after=0)
    expected, _ = evolve(tmp_path / "other")
    optimizer, count = evolve(path, resume=True, evaluator=evaluator)
    assert (evaluator.computed, count) == (0, EVALUATIONS)
    assert optimizer.incumbent == expected.incumbent
    assert path.read_bytes() == whole.read_bytes()


def sealed(row: dict[str, Any]) -> str:
    """`row` as a line of a log, with the checksum that it would have been written with."""
    return with_checksum(json.dumps({key: value for key, value in row.items() if key != "crc32"})) + "\n"


def test_replayed_losses_are_the_logs(whole: Path, tmp_path: Path) -> None:
    """The results come from the log, not from evaluating again: another loss in it is another best."""
    path = tmp_path / "log"
    lines = whole.read_text().splitlines(keepends=True)[:21]  # within the third generation
    row = json.loads(lines[20])
    path.write_text("".join([*lines[:20], sealed(row | {"loss": -1.0})]))
    optimizer, _ = evolve(path, resume=True)
    best, loss = optimizer.incumbent
    assert (list(best.steps), best.start_tokens, loss) == (row["steps"], row["start_tokens"], -1.0)


@pytest.mark.parametrize("line", [1, 5, 12, EVALUATIONS])
@pytest.mark.parametrize("edit", ["steps", "start_tokens"])
def test_an_edited_candidate_is_noticed(whole: Path, tmp_path: Path, line: int, edit: str) -> None:
    path = tmp_path / "log"
    lines = whole.read_text().splitlines(keepends=True)
    row = json.loads(lines[line])
    row[edit] = row[edit] + 1 if edit == "start_tokens" else [row[edit][0] + 1, *row[edit][1:]]
    lines[line] = sealed(row)
    path.write_text("".join(lines))
    with pytest.raises(LongRopeError, match=f"evaluation {line - 1} is not the one") as error:
        evolve(path, resume=True)
    assert error.value.code == "other-run"
    assert "\n" not in str(error.value)
    assert path.read_text() == "".join(lines)


def test_evaluations_beyond_the_end_are_noticed(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    last = json.loads(whole.read_text().splitlines()[-1])
    path.write_text(whole.read_text() + sealed(last | {"index": EVALUATIONS}))
    with pytest.raises(LongRopeError, match="holds 33 evaluations, this search ends after 32") as error:
        evolve(path, resume=True)
    assert error.value.code == "other-run"


def test_another_seed_is_another_search(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(whole.read_bytes())
    with pytest.raises(LongRopeError, match="settings differ") as error:
        evolve(tmp_path / "log", resume=True, header=HEADER | {"settings": {"seed": 6, "population": 8}})
    assert error.value.code == "other-run"


def test_progress_follows_each_evaluation(tmp_path: Path) -> None:
    shown = Shown()
    evolve(tmp_path / "log", evaluator=FunctionEvaluator(broken), callbacks=shown)
    _, rows = read_log(tmp_path / "log")
    finite = [row.loss if math.isfinite(row.loss) else math.inf for row in rows]
    assert shown.progress == [SearchProgress(n, min(finite[:n]), replayed=False) for n in range(1, EVALUATIONS + 1)]


def test_progress_of_a_resumed_search_begins_with_what_is_known(tmp_path: Path) -> None:
    shown = Shown()
    with pytest.raises(KeyboardInterrupt):
        evolve(tmp_path / "log", evaluator=FunctionEvaluator(stop_after=16))
    evolve(tmp_path / "log", resume=True, callbacks=shown)
    seen = shown.progress
    assert [one.evaluations for one in seen] == list(range(1, EVALUATIONS + 1))
    assert [one.replayed for one in seen] == [True] * 16 + [False] * 16
    losses = [row.loss for row in read_log(tmp_path / "log")[1]]
    assert [one.best_loss for one in seen] == [min(losses[: one.evaluations]) for one in seen]


def test_what_was_answered_is_not_computed_again(tmp_path: Path) -> None:
    one, other = (Window(2048, (factor,) * 4) for factor in (1.0, 2.0))
    asked = [
        EvalRequest(one, {"n": 0}),
        EvalRequest(other, {"n": 1}),
        EvalRequest(one, {"n": 2}),
        EvalRequest(one, {"n": 3}, VALIDATION),
        EvalRequest(one, {"n": 4}, samples=(0,)),
        EvalRequest(one, {"n": 5}, gradient=True),
        EvalRequest(replace(one, attention_factor=1.5), {"n": 6}),
    ]
    computed: list[EvalRequest] = []

    class Counting(FunctionEvaluator):
        def __call__(self, requests: Sequence[EvalRequest]) -> Iterator[EvalResult]:
            for request in requests:
                computed.append(request)
                yield EvalResult(float(len(computed)))

    path = tmp_path / "log"
    with SearchLog.create(path, HEADER) as log:
        evaluate = LoggedEvaluator(Counting(), log)
        first = [result.loss for result in evaluate(asked)]
        again = [result.loss for result in evaluate(asked[:2])]
    assert (first, again) == ([1, 2, 1, 3, 4, 5, 6], [1, 2])
    assert [request.row["n"] for request in computed] == [0, 1, 3, 4, 5, 6]
    assert [row.loss for row in read_log(path)[1]] == first + again

    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:3]), "utf-8")  # the header and two results
    computed.clear()
    with SearchLog.resume(path, HEADER) as log:
        resumed = [result.loss for result in LoggedEvaluator(Counting(), log)(asked)]
    assert [request.row["n"] for request in computed] == [3, 4, 5, 6]
    assert resumed == [1, 2, 1, 1, 2, 3, 4]


@pytest.mark.parametrize("wrong", [-1, 1])
def test_an_evaluator_of_another_count_is_refused(tmp_path: Path, wrong: int) -> None:
    class Wrong(FunctionEvaluator):
        def __call__(self, requests):
            return iter([EvalResult(1.0)] * (len(requests) + wrong))

    with pytest.raises(ValueError, match="zip"):
        evolve(tmp_path / "log", evaluator=Wrong())


def test_every_batch_has_its_generation_and_only_the_search_is_reported(tmp_path: Path) -> None:
    """Baselines come before the search and other losses after it; a batch without requests counts too."""
    window, shown = Window(2048, (1.0,) * 4), Shown()
    with SearchLog.create(tmp_path / "log", HEADER) as log:
        evaluate = LoggedEvaluator(FunctionEvaluator(lambda _: 1.0), log)
        evaluate([EvalRequest(window, {"n": 0})])
        with evaluate.search(shown) as requests:
            assert evaluate([]) == []
            evaluate([EvalRequest(window, {"n": 1}), EvalRequest(window, {"n": 2})])
        evaluate([EvalRequest(window, {"n": 3})])
    assert [row.generation for row in read_log(tmp_path / "log")[1]] == [0, 2, 2, 3]
    assert [request.row["n"] for request in requests] == [1, 2]
    assert shown.progress == [SearchProgress(n, 1.0, replayed=False) for n in (1, 2)]


def test_the_result_that_a_kill_falls_after_is_in_the_log(tmp_path: Path) -> None:
    """Every result is logged, and shown, before the next one is computed."""
    path, shown, known = tmp_path / "log", Shown(), []

    def loss(window: Window) -> float:
        known.append((path.read_bytes().count(b"\n") - 1, len(shown.progress)))
        return distance(window)

    evolve(path, evaluator=FunctionEvaluator(loss), callbacks=shown)
    assert known == [(count, count) for count in range(EVALUATIONS)]


# --- requests


WINDOW = Window(2048, (2.0,) * 4)


def test_rows_of_requests() -> None:
    for request in (
        loss_request(WINDOW, VALIDATION),
        loss_request(WINDOW, SEARCH, (0, 2)),
        gradient_request(WINDOW, 3),
    ):
        samples = None if request.samples is None else list(request.samples)
        assert request.row == {
            "length": 2048,
            "factors": [2.0] * 4,
            "attention_factor": 1.0,
            "split": request.split,
            "samples": samples,
        }
    assert gradient_request(WINDOW, 3) == EvalRequest(WINDOW, request.row, SEARCH, (3,), gradient=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_both_splits_decide_with_equal_weight_and_numbers_only(bad: float) -> None:
    assert [(request.split, request.samples) for request in both_splits(WINDOW)] == [(VALIDATION, None), (SEARCH, None)]
    assert mean_loss([EvalResult(3.0), EvalResult(1.0)]) == 2.0
    assert mean_loss([EvalResult(bad), EvalResult(1.0)]) == mean_loss([EvalResult(1.0), EvalResult(bad)]) == math.inf
