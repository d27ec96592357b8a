"""A search with and without the formulas that it is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longrope.costs.plan import plan
from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel, open_model
from longrope.rope.scaling import RopeScaling
from longrope.search.config import SearchConfig
from longrope.search.initial import baselines
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


def test_a_form_that_no_window_can_hold_is_left_out() -> None:
    """NTK by critical dimension has factors above 10^9 there; the search goes on without it."""
    tiny = open_model("tiny")
    assert set(baselines(tiny, 2**20)) - set(baselines(tiny, 2**21)) == {"ntk-critical"}
    (row,) = (row for row in plan("tiny", "2M", searches=[SearchConfig()], trainings=[]).rows if row.stage == "search")
    assert row.name == "gradient"
    with pytest.raises(LongRopeError, match="max_length"):
        baselines(tiny, 2**31)


def test_a_second_form_that_no_window_can_hold_is_left_out() -> None:
    trained = open_model("tiny-512x")
    assert set(baselines(trained, 2**21)) >= {"none", "checkpoint", "second-pi", "second-yarn"}
    assert "second-ntk-critical" not in baselines(trained, 2**30)
