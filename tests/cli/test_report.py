"""`longrope report` as a user runs it."""

from __future__ import annotations

import json

import pytest

from tests.report import runs


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


def test_markdown(cli, run, tmp_path):
    assert cli("report", run, "-o", tmp_path / "page.md").code == 0
    assert cli("report", run, "-o", tmp_path / "other.txt", "--format", "md").code == 0
    for name in ("page.md", "other.txt"):
        assert (tmp_path / name).read_text("utf-8").startswith("# ")
    assert "html" in cli("report", run, "-o", tmp_path / "page.pdf", "--format", "pdf").err


def test_report_as_json(cli, run, tmp_path):
    ran = cli("report", run, "-o", tmp_path / "page.html", "--figures", tmp_path / "figures", "--json")
    found = json.loads(ran.out)
    assert found["report"] == str(tmp_path / "page.html")
    assert len(found["figures"]) == 2
    assert [path.rpartition("/")[2] for path in found["tables"]] == ["passkey.csv"]
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
    assert ran.refusal
    assert ran.out == ""
    assert kind != "exists" or out.read_text("utf-8") == "mine"
    assert not (tmp_path / "page_figures").exists()
