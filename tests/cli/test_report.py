"""The verb `report`, and what a person sees of a long search: the progress display and TensorBoard's scalars."""

from __future__ import annotations

import io
import json
import math
from importlib import util

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from longrope.cli import common, tensorboard
from longrope.cli.watch import SearchWatch
from longrope.search.loop import Progress
from tests.report import runs

BASELINES = {"none": 5.4, "pi": 4.8, "yarn": 4.19, "broken": math.nan}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An evaluation with one figure."""
    return runs.write_evaluation(tmp_path_factory.mktemp("run") / "eval.json", runs.evaluation(["passkey"]))


def test_report(cli, run, tmp_path):
    ran = cli("report", run, "-o", tmp_path / "page.html")
    assert ran.code == 0
    assert f"report:  {tmp_path / 'page.html'}" in ran.out
    assert "(1, each as PNG and SVG)" in ran.out
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")


def test_report_as_json(cli, run, tmp_path):
    ran = cli("report", run, "-o", tmp_path / "page.html", "--figures", tmp_path / "figures", "--json")
    found = json.loads(ran.out)
    assert found["report"] == str(tmp_path / "page.html")
    assert len(found["figures"]) == 2
    assert found["figures"][0].startswith(str(tmp_path / "figures"))


@pytest.mark.parametrize("kind", ["missing", "settings", "exists", "folder"])
def test_bad_input_is_one_line(cli, run, tmp_path, kind):
    loaded, out = run, tmp_path / "page.html"
    if kind == "missing":
        loaded = tmp_path / "nothing"
    elif kind == "settings":
        loaded = tmp_path / "eval.json"
        loaded.write_text('{"schema": "longrope.eval/1", "results": []}', "utf-8")
    elif kind == "exists":
        out.write_text("mine", "utf-8")
    else:
        out = tmp_path / "no" / "page.html"
    ran = cli("report", loaded, "-o", out)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert kind != "exists" or out.read_text("utf-8") == "mine"
    assert not (tmp_path / "page_figures").exists()


def terminal() -> tuple[io.StringIO, Bar]:
    """A terminal of 160 columns, with the columns of `progress_bar`."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160, color_system=None, highlight=False)
    with common.progress_bar() as bar:
        columns = bar.columns
    return screen, Bar(*columns, console=console, auto_refresh=False)


def test_the_display_shows_the_best_the_baselines_and_the_time_left():
    screen, bar = terminal()
    watch = SearchWatch(bar)
    with bar:
        watch.start(100, BASELINES)
        watch.update(Progress(40, 4.1313, replayed=False))
        bar.refresh()
    shown = screen.getvalue()
    assert "baselines: yarn 4.1900, pi 4.8000, none 5.4000" in shown
    assert "best loss 4.1313 (yarn 4.1900)" in shown
    assert "40/100" in shown
    assert "left" in shown


def test_the_display_is_silent_without_a_terminal(capsys):
    with common.progress_bar() as bar:
        watch = SearchWatch(bar)
        watch.start(100, BASELINES)
        watch.update(Progress(40, 4.1313, replayed=False))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def scalars_in(folder) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    with tensorboard.scalars(tmp_path / "logs") as scalars:
        scalars.start(100, BASELINES)
        for step, loss in ((1, 4.5), (2, 4.25), (3, math.inf)):
            scalars.update(Progress(step, loss, replayed=False))
        scalars.measured([row for row in runs.rows(["perplexity"]) if row.scaling == "yarn"])
    found = scalars_in(tmp_path / "logs")
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
    found = scalars_in(tmp_path / "logs")
    log = [json.loads(line) for line in (out / "search.jsonl").read_text("utf-8").splitlines()[1:]]
    losses = [line["loss"] for line in log if "baseline" not in line]
    assert found["search/best_loss"][-1] == (len(losses), pytest.approx(min(losses)))
    assert "perplexity/longrope" in found


def test_without_tensorboard_it_says_so_at_once(cli, checkpoint, texts, tmp_path, monkeypatch):
    real = util.find_spec
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    ran = cli("extend", checkpoint, "-o", tmp_path / "run", "--log-dir", tmp_path / "logs")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert "pip install" in ran.err
    assert list(tmp_path.iterdir()) == []
