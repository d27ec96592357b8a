"""The progress of a job: the bar on a terminal, log lines, TensorBoard's scalars, and silence where none is wanted."""

from __future__ import annotations

import importlib.machinery
import io
import json
import math
import re
import sys
import threading
import time
import types
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.progress import Progress

from longrope.callbacks import SearchProgress, TrainProgress
from longrope.cli import common
from longrope.cli.progress import Display, Lines, job_bar, progress
from longrope.cli.scalars import scalars_in
from longrope.errors import LongRopeError
from longrope.trackers import TRACKERS
from tests.report import runs

BASELINES = {"none": 5.4, "pi": 4.8, "yarn": 4.19, "broken": math.nan}


@pytest.fixture(autouse=True)
def silent_again() -> Iterator[None]:
    yield
    common.set_verbosity(False, False)


def search(display: Display) -> None:
    display.on_search_start(100, BASELINES)
    display.on_search_progress(SearchProgress(40, 4.1313, replayed=False))


def terminal() -> tuple[io.StringIO, Progress]:
    """A terminal of 80 columns, with the columns of a job's bar."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None, highlight=False)
    return screen, job_bar(console, auto_refresh=False)


def test_the_display_shows_the_best_the_baselines_and_the_time_left():
    screen, bar = terminal()
    with bar:
        search(Display(bar))
        bar.refresh()
    shown = screen.getvalue()
    assert "baselines: yarn 4.1900, pi 4.8000, none 5.4000" in shown
    assert "best 4.1313 (yarn 4.1900)" in shown
    assert "40/100" in shown
    assert re.search(r"\d+ s elapsed", shown)


def test_the_display_shows_training_and_evaluation():
    screen, bar = terminal()
    with bar:
        display = Display(bar)
        display.on_train_start(8, 2)
        display.on_train_progress(TrainProgress(3, 1.25, 1000.0))
        bar.refresh()
        display.on_eval_start(5)
        display.on_eval_step()
        bar.refresh()
    shown = screen.getvalue()
    assert "loss 1.2500, 1,000 tokens/s" in shown
    assert "3/8" in shown
    assert "1/5" in shown


def test_elapsed_and_left_in_words_at_80_columns():
    screen, bar = terminal()
    clock = iter(range(0, 10_000, 97))
    bar.get_time = lambda: float(next(clock))
    with bar:
        display = Display(bar)
        display.on_search_start(1344, BASELINES)
        for evaluations in (200, 400, 600):
            display.on_search_progress(SearchProgress(evaluations, 4.1313, replayed=False))
        bar.refresh()
    line = [line for line in re.split(r"[\r\n]", screen.getvalue()) if "600/1344" in line][-1]
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip()
    assert len(shown) <= 80
    assert re.search(r"\d+ min( \d+ s)? elapsed, (\d+ s|\d+ min( \d+ s)?) left", shown), shown
    assert shown.endswith("best 4.1313 (yarn 4.1900)")


def test_without_a_terminal_the_first_evaluation_is_a_line_at_once(capsys):
    with progress(lambda _: "") as display:
        search(display)
        display.on_search_progress(SearchProgress(41, 4.1300, replayed=False))
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d search: 40 of 100 evaluations at most, .* a second, best loss 4.1313 \(yarn 4.1900\), .* left",
        line,
    )
    assert captured.out == ""


def test_before_the_first_loss_there_is_no_best(capsys):
    with progress(lambda _: "") as display:
        display.on_search_start(100, BASELINES)
        display.on_search_progress(SearchProgress(1, math.inf, replayed=False))
    assert "no best loss yet (yarn 4.1900)" in capsys.readouterr().err


def test_a_loss_is_shown_beside_baselines_only_where_it_compares_with_them(capsys, tmp_path):
    """That of a shorter window has its length instead; of one chosen by validation texts too, that on search texts."""
    common.set_verbosity(True, False)
    with progress(lambda _: "") as display:
        display.on_search_start(100, BASELINES)
        display.on_search_progress(SearchProgress(1, 3.9, replayed=False, length=512, search_loss=3.8))
        display.on_search_progress(SearchProgress(2, 4.2, replayed=False, search_loss=4.1))
    common.set_verbosity(False, False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].endswith(" evaluation 1: best loss 3.9000 at 512 tokens")
    assert lines[-1].endswith(" evaluation 2: best loss 4.1000 (yarn 4.1900)")
    assert "interrupted after 2 evaluations; best loss 4.1000 (yarn 4.1900)" in display.best


def lines_of(clock: list[float]) -> Lines:
    return Lines(clock=lambda: clock[0])


def test_a_line_a_minute_with_rate_value_and_time_left(capsys):
    clock = [100.0]
    lines = lines_of(clock)
    lines.begin("search", "evaluations", 100)
    for second in range(1, 151):
        clock[0] = 100.0 + second
        lines.step(second // 2, f"best loss {second}")
    shown = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == [
        "search: 0 of 100 evaluations, best loss 1, 1 s elapsed",
        "search: 30 of 100 evaluations, 30 a minute, best loss 61, 2 min 22 s left",
        "search: 60 of 100 evaluations, 30 a minute, best loss 121, 1 min 21 s left",
    ]


def test_a_stage_without_steps_is_not_told_by_the_one_before(capsys):
    """`extend` went on with "evaluate: 28 of 28 samples" while it proved the checkpoint for minutes."""
    clock = [100.0]
    lines = lines_of(clock)
    display = Display(job_bar(Console(file=io.StringIO())), lines=lines)
    display.on_stage("compare", 2, 5)
    display.on_eval_start(1)
    display.on_eval_step()
    display.on_stage("prove", 4, 5)
    clock[0] = 400.0
    assert lines.line() == "prove: 5 min elapsed"


def test_replayed_evaluations_do_not_count_for_the_rate(capsys):
    clock = [0.0]
    lines = lines_of(clock)
    lines.begin("search", "evaluations", 100)
    for done in range(1, 51):
        clock[0] += 0.001
        lines.step(done, replayed=True)
    assert capsys.readouterr().err == ""
    clock[0] += 10.0
    lines.step(51)
    assert "51 of 100 evaluations, 6.0 a minute, 8 min 10 s left" in capsys.readouterr().err


def test_a_step_that_takes_long_gives_lines_too(capsys):
    lines = Lines(every=0.05)
    thread = threading.Thread(target=lines.watch)
    lines.begin("evaluate", "samples", 3)
    thread.start()
    time.sleep(0.3)
    lines.close()
    thread.join()
    shown = capsys.readouterr().err.splitlines()
    assert 2 <= len(shown) <= 7
    assert "evaluate: 0 of 3 samples" in shown[0]
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_no_lines_on_a_terminal_nor_where_they_are_not_wanted(capsys):
    common.set_verbosity(False, True)
    with progress(lambda _: "") as display:
        search(display)
    assert capsys.readouterr().err == ""
    lines = Lines(shown=False)
    lines.begin("search", "evaluations", 3)
    lines.step(1)
    assert capsys.readouterr().err == ""


class Tracker(types.ModuleType):
    """A module with the functions of wandb and trackio."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.rows: list[tuple[dict[str, float], int | None]] = []
        self.runs: list[str] = []

    def init(self, project: str) -> None:
        self.runs.append(project)

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.rows.append((values, step))

    def finish(self) -> None:
        self.runs.append("finished")


@pytest.mark.parametrize("name", TRACKERS)
def test_scalars_of_a_tracker(name, monkeypatch):
    tracker = Tracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    with scalars_in(None, [name]) as scalars:
        scalars.on_search_start(100, {"yarn": 4.19, "broken": math.nan})
        scalars.on_search_progress(SearchProgress(1, math.inf, replayed=False))
        scalars.on_search_progress(SearchProgress(2, 4.25, replayed=False))
        scalars.measured([row for row in runs.rows(["perplexity"]) if row.scaling == "yarn"][:1])
    assert tracker.runs == ["longrope", "finished"]
    assert tracker.rows[0] == ({"search/best_loss": 4.25, "baseline/yarn": 4.19}, 2)
    ((last, step),) = tracker.rows[1:]
    assert (list(last), step) == ([f"perplexity/yarn/{runs.LENGTHS[0]}"], None)


def test_a_tracker_that_is_not_there_is_refused_before_any_work(cli, checkpoint, tmp_path, monkeypatch):
    command = ("search", checkpoint, "--target-length", 128, "-o", tmp_path / "run", "--report-to")
    assert "expected wandb or trackio in --report-to, found 'mlflow'" in cli(*command, "mlflow").refusal
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr("longrope.trackers.find_spec", lambda name: None)
    assert "pip install trackio" in cli(*command, "trackio").refusal


def test_a_tracker_that_does_not_start_is_one_line(monkeypatch):
    tracker = Tracker("wandb")
    tracker.init = lambda project: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    with pytest.raises(LongRopeError, match="wandb of `report_to` does not start"), scalars_in(None, ["wandb"]):
        pass


def test_verbose_logs_every_step_and_quiet_leaves_remarks_out(capsys):
    common.set_verbosity(True, False)
    with progress(lambda _: "", stage_lines=True) as display:
        display.on_stage("search 4k", 1, 2)
        search(display)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1/2 search 4k"
    assert lines[-1].endswith(" evaluation 40: best loss 4.1313 (yarn 4.1900)")
    common.set_verbosity(False, True)
    with progress(lambda _: "go on", stage_lines=True) as display:
        display.on_stage("search 4k", 1, 2)
    assert capsys.readouterr().err == ""


def scalars_of(folder) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    with scalars_in(tmp_path / "logs") as scalars:
        scalars.on_search_start(100, BASELINES)
        for step, loss in ((1, 4.5), (2, 4.25), (3, math.inf)):
            scalars.on_search_progress(SearchProgress(step, loss, replayed=False))
        scalars.on_search_progress(SearchProgress(4, 3.5, replayed=False, length=512, search_loss=3.0))
        scalars.on_search_progress(SearchProgress(5, 4.5, replayed=False, search_loss=4.125))
        scalars.measured([row for row in runs.rows(["perplexity"]) if row.scaling == "yarn"])
    found = scalars_of(tmp_path / "logs")
    assert found["search/best_loss"] == [(1, 4.5), (2, 4.25), (5, 4.125)]
    assert found["search/best_loss_at_512"] == [(4, 3.5)]
    assert found["baseline/yarn"] == [(0, pytest.approx(4.19)), (100, pytest.approx(4.19))]
    assert [step for step, _ in found["perplexity/yarn"]] == list(runs.LENGTHS)
    assert "baseline/broken" not in found


def test_extend_writes_scalars_and_ends_with_its_report(cli, checkpoint, texts, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    ran = cli(
        "extend", checkpoint, "--target-length", 128, "--data", texts / "search.txt", "--eval-data",
        texts / "other.txt", "-o", out, "--method", "longrope", "--population", 4, "--iterations", 1, "--samples", 1,
        "--eval-samples", 2, "--log-dir", tmp_path / "logs",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.out.endswith(f"report:     {out / 'report.html'}\n")
    page = (out / "report.html").read_text("utf-8")
    assert "from 64 to 128 tokens" in page
    assert {path.name for path in (out / "report_figures").iterdir()} >= {"factors.png", "perplexity.svg"}
    found = scalars_of(tmp_path / "logs")
    log = [json.loads(line) for line in (out / "search.jsonl").read_text("utf-8").splitlines()[1:]]
    losses = [line["loss"] for line in log if "baseline" not in line]
    assert found["search/best_loss"][-1] == (len(losses), pytest.approx(min(losses)))
    assert "perplexity/longrope" in found
