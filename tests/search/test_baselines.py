"""A search with and without the formulas that it is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longrope.models.loading import LoadedModel
from longrope.rope.scaling import RopeScaling
from longrope.search.config import SearchConfig
from longrope.search.run import search
from tests.search.lengths import NEEDLE_LENGTH

GRADIENT = {"method": "gradient", "steps": 4, "samples": 2}
LONGROPE2 = {"method": "longrope2", "population": 4, "iterations": 1, "samples": 2, "critical_dim": 4}


@pytest.mark.parametrize("config", [GRADIENT, LONGROPE2], ids=["gradient", "longrope2"])
def test_without_the_baselines_the_result_is_the_same(
    loaded: LoadedModel, source: list[str], tmp_path: Path, config: dict[str, Any]
) -> None:
    compared, alone = (
        search(loaded, NEEDLE_LENGTH, source, tmp_path / str(baselines), SearchConfig(**config, baselines=baselines))
        for baselines in (True, False)
    )
    assert len(compared.baselines) > 1
    none = {"none": compared.baselines["none"]}
    assert alone.to_json() == compared.to_json() | {"baselines": none, "scaling": str(alone.path)}
    windows = [RopeScaling.load(tmp_path / name / "scaling.json").windows for name in ("True", "False")]
    assert windows[0] == windows[1]
    lines = (tmp_path / "False/search.jsonl").read_text("utf-8").splitlines()[1:]
    assert [row["baseline"] for row in map(json.loads, lines) if "baseline" in row] == ["none"]
