"""The table of a search: its losses against the baselines, and the critical dimension where the method finds one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.search.lengths import NEEDLE_LENGTH


def test_the_table_names_the_critical_dimension(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    few = ("--method", "longrope2", "--population", 4, "--iterations", 1, "--samples", 2)
    data = ("--target-length", NEEDLE_LENGTH, "--data", texts / "search.txt")
    ran = cli("search", checkpoint, *data, "-o", tmp_path / "run", *few)
    assert ran.code == 0, ran.err
    assert re.search(r"real critical dimension: pair \d+ \(needle loss alone \d+, perplexity loss alone \d+\)", ran.out)
    assert "ntk-rcd" in ran.out
