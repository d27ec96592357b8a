"""The files that `report` writes; a search's log gives the cost that the search itself counted."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from longrope.errors import LongRopeError
from longrope.models.loading import open_model
from longrope.report import run as module
from longrope.report.run import report
from longrope.report.trace import read_trace
from longrope.search.config import SearchConfig
from longrope.search.run import search
from tests.report import runs


@pytest.fixture(scope="module")
def passkeys(tmp_path_factory):
    """An evaluation with one figure."""
    return runs.write_evaluation(tmp_path_factory.mktemp("run") / "eval.json", runs.evaluation(["passkey"]))


def test_page_and_figures(tmp_path):
    folder = runs.write_run(tmp_path / "run", suites=["passkey"])
    done = report([folder], tmp_path / "page.html")
    assert done.html == tmp_path / "page.html"
    assert done.figures == [
        tmp_path / "page_figures" / f"{name}.{kind}"
        for name in ("passkey", "search", "factors")
        for kind in ("png", "svg")
    ]
    for path in done.figures:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ET.parse(path).getroot().tag.endswith("svg")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "page.html", "page_figures"}
    assert [path.name for path in done.tables] == ["passkey.csv", "search.csv", "search-2.csv", "factors.csv"]
    assert all(path.read_text("utf-8").count("\n") > 1 for path in done.tables)


def test_markdown_by_name_or_by_request(passkeys, tmp_path):
    by_name = report([passkeys], tmp_path / "report.md")
    asked = report([passkeys], tmp_path / "asked.txt", tmp_path / "report_figures_2", format="md")
    text = by_name.html.read_text("utf-8")
    assert text.startswith("# ")
    assert "(report_figures/passkey.png)" in text
    assert (tmp_path / "report_figures" / "passkey.png").is_file()
    assert "(report_figures_2/passkey.png)" in asked.html.read_text("utf-8")
    page = report([passkeys], tmp_path / "page.md", tmp_path / "other", format="html")
    assert page.html.read_text("utf-8").startswith("<!doctype html>")


def test_figures_go_where_they_are_told(passkeys, tmp_path):
    done = report([passkeys], tmp_path / "page.html", tmp_path / "deep" / "figures")
    assert done.figures[0].parent == tmp_path / "deep" / "figures"
    assert not (tmp_path / "page_figures").exists()


def test_nothing_is_overwritten(passkeys, tmp_path):
    report([passkeys], tmp_path / "page.html")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(LongRopeError, match="exists; nothing is overwritten"):
        report([passkeys], tmp_path / "page.html")
    (tmp_path / "page.html").rename(tmp_path / "kept.html")
    figure = next((tmp_path / "page_figures").iterdir())
    drawn = figure.read_bytes()
    figure.write_bytes(drawn + b"\n<!-- mine -->")
    with pytest.raises(LongRopeError, match="page_figures' is not empty"):
        report([passkeys], tmp_path / "page.html")
    assert figure.read_bytes() == drawn + b"\n<!-- mine -->"
    figure.write_bytes(drawn)
    report([passkeys], tmp_path / "page.html")  # as a report leaves them that was stopped before its page
    (tmp_path / "kept.html").unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_report_that_fails_leaves_nothing(passkeys, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(LongRopeError, match="No space left on device"):
        report([passkeys], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_the_same_files_give_the_same_bytes(passkeys, tmp_path):
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        done = report([passkeys], tmp_path / name / "page.html")
        written.append([path.read_bytes() for path in (done.html, *done.figures)])
    assert written[0] == written[1]
    assert len(written[0]) == 3


@pytest.mark.parametrize(
    "options",
    [
        SearchConfig(method="longrope", population=4, iterations=1, samples=2),
        SearchConfig(method="longrope", population=4, iterations=2, samples=2, racing=True),
        SearchConfig(method="cma", evaluations=24, samples=2),
        SearchConfig(method="hybrid", steps=3, evaluations=24, samples=2),
        SearchConfig(method="gradient", steps=3, samples=2),
    ],
    ids=lambda options: options.method + ", racing" * options.racing,
)
def test_the_log_says_what_the_search_counted(options, checkpoint, texts, tmp_path):
    found = search(open_model(str(checkpoint)), 256, [str(texts / "search.txt")], tmp_path / "run", options)
    trace = read_trace(tmp_path / "run" / "search.jsonl", found.scaling.provenance)
    assert (trace.evaluations, trace.token_passes) == (found.evaluations, found.token_passes)
    assert trace.counted
    assert trace.result == found.best_loss
    assert min(point.loss for point in trace.progress) <= found.best_loss + 1e-9
    assert trace.baselines == found.baselines
