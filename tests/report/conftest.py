"""Reports made once for the room: one full run, and two runs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from longrope.report.collect import collect
from longrope.report.page import Report, build, render
from tests.report import runs


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One run with everything measured."""
    return build(collect([runs.write_run(tmp_path_factory.mktemp("report") / "full")]))


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Two runs, the second a gradient search with three windows, start tokens, and few trials."""
    folder = tmp_path_factory.mktemp("report")
    choices = {"losses": [{"critical_dim": 10, "needle": 1.1234, "perplexity": None}], "chosen_by": {"needle": 10}}
    provenance = {"method": "gradient", "critical_dim": 10, "critical_dims": choices}
    second = runs.scaling(3, start_tokens=8, attention_factor=1.0, **provenance)
    made = runs.write_run(folder / "one", suites=["perplexity", "needle"])
    other = runs.write_run(folder / "two", second, gradient=True, suites=["perplexity", "needle"], trials=12)
    return build(collect([made, other]))


@pytest.fixture(scope="session")
def full_page(full: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _page(full, tmp_path_factory)


@pytest.fixture(scope="session")
def several_page(several: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _page(several, tmp_path_factory)


def _page(report: Report, factory: pytest.TempPathFactory) -> Path:
    path = factory.mktemp("page") / "report.html"
    path.write_text(render(report, "0"), "utf-8")
    return path
