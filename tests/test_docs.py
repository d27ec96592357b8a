"""The documentation: its commands run, its pages are all in the site's menu, and the site builds strictly."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.pages import ROOT, run_python
from tests.test_readme import SMALL, commands

DOCS = ROOT / "docs"


def menu(entries: list[object]) -> list[str]:
    """The pages of a navigation, in its order."""
    return [
        page
        for entry in entries
        for value in (entry.values() if isinstance(entry, dict) else (entry,))
        for page in (menu(value) if isinstance(value, list) else (value,))
    ]


def test_every_page_is_in_the_menu() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert sorted(menu(yaml.safe_load(text)["nav"])) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "site/api/index.html").read_text("utf-8")
    assert "Search rescale factors that extend the context window" in api
    assert 'src="http' not in api  # nothing is loaded from elsewhere


def test_the_quickstart_runs(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = [words for words in commands("docs/quickstart.md") if words[0] == "longrope"]
    assert [words[1] for words in ours] == ["inspect", "search", "eval", "export", "doctor", "report", "extend"]
    for words in ours:
        small = list(SMALL.get(words[1], ()))
        if "gradient" in words:
            small = ["--steps", "1", "--samples", "1"]
        ran = cli(*words[1:], *small)
        assert ran.code == 0, (words, ran.err)
    assert run_python("docs/quickstart.md", tmp_path) == 1


def test_commands_that_no_test_runs_say_what_they_need() -> None:
    for page in DOCS.glob("*.md"):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            assert block.startswith(("# needs ", "# in ")), (page.name, block)
