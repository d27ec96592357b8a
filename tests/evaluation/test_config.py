"""The settings of the suites: refused out of range, lm-eval's tasks as text, RULER's tasks in its order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longrope.evaluation.config import EvalConfig, HarnessTask
from tests.evaluation.tiny import refused


@pytest.mark.parametrize(
    "wrong",
    [{"trials": 0}, {"depths": 0}, {"needles": 0}, {"samples": 0}, {"threshold": 0.0}, {"threshold": 101.0},
     {"share": 1.5}, {"ruler_tasks": ("magic",)}, {"task_limit": 0}, {"tasks": (":3",)}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with refused("invalid-setting"):
        EvalConfig(**wrong)


def test_ruler_tasks_come_in_rulers_order() -> None:
    assert EvalConfig(ruler_tasks=("vt", "niah_single_1")).chosen_ruler_tasks == ("niah_single_1", "vt")
    assert "qa_1" not in EvalConfig().chosen_ruler_tasks
    assert EvalConfig(qa_file=Path("qa.json")).chosen_ruler_tasks[-1] == "qa_1"
    with refused("missing-file", "`qa_file`"):
        EvalConfig(ruler_tasks=("qa_1",))


def test_tasks_of_lm_eval_as_they_are_written() -> None:
    assert HarnessTask.parse(" arc_challenge:25 ") == HarnessTask("arc_challenge", 25)
    assert HarnessTask.parse("hellaswag") == HarnessTask("hellaswag")
    assert HarnessTask.parse("a/b.yaml:0") == HarnessTask("a/b.yaml", 0)
    assert EvalConfig(tasks=("arc_challenge:25",)).tasks == (HarnessTask("arc_challenge", 25),)
    for text in ("", ":5", "a:b", "a:-1"):
        with refused("invalid-setting", "expected a task of lm-eval"):
            HarnessTask.parse(text)
