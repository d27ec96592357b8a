"""A search stopped anywhere and resumed ends bit-identically to one that ran through."""

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

import pytest

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.evaluator import VALIDATION, Answer, Question
from longrope.search.log import SearchLog, read_log
from longrope.search.loop import Conversation, Progress
from tests.search.targets import HEADER, SETTINGS, FunctionEvaluator, candidate_of, distance, evolve

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
    assert all(row.answer.loss == distance(candidate_of(row).window(2048, 1.0)) for row in rows)


def test_best_and_count(whole: Path, tmp_path: Path) -> None:
    optimiser, count = evolve(tmp_path / "log")
    _, rows = read_log(whole)
    best = min(rows, key=lambda row: row.answer.loss)
    assert count == EVALUATIONS
    assert optimiser.incumbent == (candidate_of(best), best.answer.loss)


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
        optimiser, count = evolve(path, resume=True, evaluator=resumed)
        assert path.read_bytes() == whole
        assert optimiser.incumbent == expected.incumbent
        # What the log knew was not evaluated again, and is part of the count.
        assert (resumed.asked, count) == (EVALUATIONS - stop, EVALUATIONS)


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
    optimiser, count = evolve(path, resume=True, evaluator=evaluator)
    assert (evaluator.asked, count) == (0, EVALUATIONS)
    assert optimiser.incumbent == expected.incumbent
    assert path.read_bytes() == whole.read_bytes()


def test_replayed_losses_are_the_logs(whole: Path, tmp_path: Path) -> None:
    """The answers come from the log, not from evaluating again: another loss in it is another best."""
    path = tmp_path / "log"
    lines = whole.read_text().splitlines(keepends=True)[:21]  # within the third generation
    row = json.loads(lines[20])
    path.write_text("".join([*lines[:20], json.dumps(row | {"loss": -1.0}) + "\n"]))
    optimiser, _ = evolve(path, resume=True)
    best, loss = optimiser.incumbent
    assert (list(best.steps), best.start_tokens, loss) == (row["steps"], row["start_tokens"], -1.0)


@pytest.mark.parametrize("line", [1, 5, 12, EVALUATIONS])
@pytest.mark.parametrize("edit", ["steps", "start_tokens"])
def test_an_edited_candidate_is_noticed(whole: Path, tmp_path: Path, line: int, edit: str) -> None:
    path = tmp_path / "log"
    lines = whole.read_text().splitlines(keepends=True)
    row = json.loads(lines[line])
    row[edit] = row[edit] + 1 if edit == "start_tokens" else [row[edit][0] + 1, *row[edit][1:]]
    lines[line] = json.dumps(row) + "\n"
    path.write_text("".join(lines))
    with pytest.raises(LongRopeError, match=f"evaluation {line - 1} is not the one this search would ask") as error:
        evolve(path, resume=True)
    assert "\n" not in str(error.value)
    assert path.read_text() == "".join(lines)


def test_evaluations_beyond_the_end_are_noticed(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    last = json.loads(whole.read_text().splitlines()[-1])
    path.write_text(whole.read_text() + json.dumps(last | {"index": EVALUATIONS}) + "\n")
    with pytest.raises(LongRopeError, match="holds 33 evaluations, this search ends after 32"):
        evolve(path, resume=True)


def test_another_seed_is_another_search(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(whole.read_bytes())
    with pytest.raises(LongRopeError, match="another search: settings differ"):
        evolve(tmp_path / "log", resume=True, header=HEADER | {"settings": {"seed": 6, "population": 8}})


def test_progress_follows_each_evaluation(tmp_path: Path) -> None:
    seen: list[Progress] = []
    evolve(tmp_path / "log", evaluator=FunctionEvaluator(broken), on_progress=seen.append)
    _, rows = read_log(tmp_path / "log")
    finite = [row.answer.loss if math.isfinite(row.answer.loss) else math.inf for row in rows]
    assert seen == [Progress(n, min(finite[:n]), replayed=False) for n in range(1, EVALUATIONS + 1)]


def test_progress_of_a_resumed_search_begins_with_what_is_known(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with pytest.raises(KeyboardInterrupt):
        evolve(tmp_path / "log", evaluator=FunctionEvaluator(stop_after=16))
    evolve(tmp_path / "log", resume=True, on_progress=seen.append)
    assert [one.evaluations for one in seen] == list(range(1, EVALUATIONS + 1))
    assert [one.replayed for one in seen] == [True] * 16 + [False] * 16
    losses = [row.answer.loss for row in read_log(tmp_path / "log")[1]]
    assert [one.best_loss for one in seen] == [min(losses[: one.evaluations]) for one in seen]


def test_what_was_answered_is_not_computed_again(tmp_path: Path) -> None:
    one, other = (Window(2048, (factor,) * 4) for factor in (1.0, 2.0))
    asked = [
        Question(one, {"n": 0}),
        Question(other, {"n": 1}),
        Question(one, {"n": 2}),
        Question(one, {"n": 3}, VALIDATION),
        Question(one, {"n": 4}, samples=(0,)),
        Question(one, {"n": 5}, gradient=True),
        Question(replace(one, attention_factor=1.5), {"n": 6}),
    ]
    computed: list[Question] = []

    class Counting(FunctionEvaluator):
        def evaluate(self, questions: Sequence[Question]) -> Iterator[Answer]:
            for question in questions:
                computed.append(question)
                yield Answer(float(len(computed)))

    path = tmp_path / "log"
    with SearchLog.create(path, HEADER) as log:
        conversation = Conversation(Counting(), log)
        first = [answer.loss for answer, _ in conversation.answers(asked)]
        again = [answer.loss for answer, _ in conversation.answers(asked[:2])]
    assert (first, again) == ([1, 2, 1, 3, 4, 5, 6], [1, 2])
    assert [question.row["n"] for question in computed] == [0, 1, 3, 4, 5, 6]
    assert [row.answer.loss for row in read_log(path)[1]] == first + again

    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:3]), "utf-8")  # the header and two answers
    computed.clear()
    with SearchLog.resume(path, HEADER) as log:
        resumed = [answer.loss for answer, _ in Conversation(Counting(), log).answers(asked)]
    assert [question.row["n"] for question in computed] == [3, 4, 5, 6]
    assert resumed == [1, 2, 1, 1, 2, 3, 4]


@pytest.mark.parametrize("wrong", [-1, 1])
def test_an_evaluator_of_another_count_is_refused(tmp_path: Path, wrong: int) -> None:
    class Wrong(FunctionEvaluator):
        def evaluate(self, questions):
            return iter([Answer(1.0)] * (len(questions) + wrong))

    with pytest.raises(ValueError, match="zip"):
        evolve(tmp_path / "log", evaluator=Wrong())
