"""The README's commands, run as written in an empty folder, on the embedded model with a small budget."""

from __future__ import annotations

import re
import shlex
import subprocess

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


def test_the_command_of_a_release_makes_every_link_of_the_readme_absolute():
    """On PyPI a relative link leads nowhere; CONTRIBUTING.md has the command, which waits for the public address."""
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (command,) = re.findall(r"^(sed -E .*) README\.md$", page, re.MULTILINE)
    sed, option, script = shlex.split(command)
    script = script.replace("RAW", "https://host/raw/v1").replace("PAGES", "https://host/blob/v1")
    made = subprocess.run([sed, option, script, ROOT / "README.md"], capture_output=True, text=True, check=True).stdout
    link = r"(!?)\[[^]]*\]\(([^)]+)\)"
    before, after = (re.findall(link, text) for text in ((ROOT / "README.md").read_text("utf-8"), made))
    assert len(before) == len(after) > 10
    for (mark, old), (_, new) in zip(before, after, strict=True):
        assert new == old if "://" in old else new == f"https://host/{'raw' if mark else 'blob'}/v1/{old}"
        assert "://" in old or (ROOT / old).is_file()


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
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
        assert links or page.name != "README.md"
        assert [link for link in links if not (page.parent / link).exists()] == [], page
