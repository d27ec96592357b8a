"""The README's commands, run as written in an empty folder, on the embedded model with a small budget."""

from __future__ import annotations

import re
import shlex

from tests.pages import ROOT, run_python

# The last value of an option counts, so these take the budget down without changing what is tested.
SMALL = {
    "search": "--steps 1 --samples 1".split(),
    "extend": "--steps 1 --samples 1 --eval-samples 2 --target-length 512".split(),
    "eval": "--samples 2 --trials 2 --depths 2".split(),
}


def commands(page: str) -> list[list[str]]:
    """Every command in the page's console blocks; bash blocks hold what a test cannot run."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    lines = [line.removeprefix("$ ").partition("#")[0].strip() for line in "\n".join(blocks).splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_readme_names_real_make_targets():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text("utf-8")))
    assert "demo" in named
    assert all(f"\n{target}:" in makefile for target in named)


def test_readme_commands_run(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = [words for words in commands("README.md") if words[0] == "longrope"]
    assert [words[1] for words in ours] == ["extend", "doctor"]
    for words in ours:
        small = () if "--recipe" in words else SMALL.get(words[1], ())  # a recipe's stages have budgets of their own
        ran = cli(*words[1:], *small)
        assert ran.code == 0, (words, ran.err)
        assert ran.out
    assert run_python("README.md", tmp_path) == 1


def test_links_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8"))
        assert links or page.name != "README.md"
        assert [link for link in links if not (page.parent / link).exists()] == [], page
