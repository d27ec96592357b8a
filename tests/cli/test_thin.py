"""A verb's file parses, calls one function of the library and prints."""

from __future__ import annotations

from pathlib import Path

import pytest

import longrope
from longrope.cli.main import MODULES, VERBS

FOLDER = Path(longrope.__file__).parent / "cli"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_under_60_lines(verb: str) -> None:
    name = MODULES.get(verb, verb).replace("-", "_")
    files = sorted(FOLDER.glob(f"{name}*.py"))
    assert files
    assert [path.name for path in files if len(path.read_text("utf-8").splitlines()) >= 60] == []
