"""Every command in the README and the docs can be read: its options exist and its values are possible."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from longrope.cli.main import VERBS, app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """The lines that begin with `longrope` in code blocks, continued lines joined, comments left out."""
    found = []
    for page in PAGES:
        if page.name == "command-line.md":
            continue
        for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text("utf-8"), re.S | re.M):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.strip().removeprefix("$ ") for line in lines if re.match(r"\s*(\$ )?longrope ", line)]
    return found


COMMANDS = [command for command in commands() if "…" not in command]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_read(command: str) -> None:
    tokens = shlex.split(command, comments=True)[1:]
    tokens = tokens[: next((place for place, token in enumerate(tokens) if token in ("|", ">", "&&")), None)]
    assert tokens[0] in {*VERBS, "--help", "--version", "--install-completion"}
    app.parse_args(tokens)
