"""The progress of a job: the bar on a terminal, log lines, TensorBoard's scalars, and silence where none is wanted."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.progress import Progress

from longrope.callbacks import SearchProgress, TrainProgress
from longrope.cli import common
from longrope.cli.progress import COLUMNS, Display, progress, scalars_in
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
    """A terminal of 160 columns, with the columns of a job's bar."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160, color_system=None, highlight=False)
    return screen, Progress(*COLUMNS, console=console, auto_refresh=False)


def test_the_display_shows_the_best_the_baselines_and_the_time_left():
    screen, bar = terminal()
    with bar:
        search(Display(bar))
        bar.refresh()
    shown = screen.getvalue()
    assert "baselines: yarn 4.1900, pi 4.8000, none 5.4000" in shown
    assert "best loss 4.1313 (yarn 4.1900)" in shown
    assert "40/100" in shown
    assert "left" in shown


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


def test_the_display_is_silent_without_a_terminal(capsys):
    with progress(lambda _: "") as display:
        search(display)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


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
        scalars.measured([row for row in runs.rows(["perplexity"]) if row.scaling == "yarn"])
    found = scalars_of(tmp_path / "logs")
    assert found["search/best_loss"] == [(1, 4.5), (2, 4.25)]
    assert found["baseline/yarn"] == [(0, pytest.approx(4.19)), (100, pytest.approx(4.19))]
    assert [step for step, _ in found["perplexity/yarn"]] == list(runs.LENGTHS)
    assert "baseline/broken" not in found


def test_extend_writes_scalars_and_ends_with_its_report(cli, checkpoint, texts, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    ran = cli(
        "extend", checkpoint, "--target-length", 128, "--data", texts / "search.txt", "--eval-data",
        texts / "other.txt", "-o", out, "--population", 4, "--iterations", 1, "--samples", 1, "--eval-samples", 2,
        "--log-dir", tmp_path / "logs",
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
