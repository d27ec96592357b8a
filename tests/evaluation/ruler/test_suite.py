"""RULER's scoring, its means by length and the effective lengths they stand for, with an oracle in place of a model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from longrope.evaluation.base import TextContext
from longrope.evaluation.config import RULER_TASKS as TASKS
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.results import EvalRow
from longrope.evaluation.ruler import suite as module
from longrope.evaluation.ruler import words
from longrope.evaluation.ruler.suite import (
    RulerSuite,
    effective_lengths,
    means,
    measure_ruler,
    postprocess,
    string_match_all,
    string_match_part,
)
from longrope.evaluation.ruler.tasks import draw_task
from tests.evaluation.embedded import key, none, tiny, tiny_tokenizer, tokenized
from tests.evaluation.tiny import refused


def test_settings_tell_versions_of_the_questions_apart(tmp_path: Path) -> None:
    path, found = tmp_path / "dev.json", []
    for text in ("Who?", "When?"):
        asked = {"question": text, "answers": [{"text": "a"}]}
        path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "text", "qas": [asked]}]}]}))
        config = EvalConfig(ruler_tasks=("qa_1",), qa_file=path)
        found.append(RulerSuite(TextContext(tiny_tokenizer(), [600], [], 0, config)).settings())
    assert found[0] != found[1]


def test_string_matching() -> None:
    references = ["Red", "blue", "green", "1234567"]
    assert string_match_all("RED, BLUE and 1234567", references) == 75.0
    assert string_match_all("nothing", references) == 0.0
    assert string_match_part("it is blue", references) == 100.0
    assert string_match_part("", references) == 0.0
    assert postprocess("  a\x00b\tc\x1f \n") == "a\nb\nc"


@pytest.mark.parametrize("task", [task for task in TASKS if task != "qa_1"])
def test_an_oracle_gets_100_and_a_liar_0(task: str, oracle) -> None:
    tokenizer = tiny_tokenizer()
    samples = draw_task(task, tokenizer, length=1100, count=2, seed=0, documents=tokenized(tokenizer))
    for reply, expected in (
        (lambda answers: " " + ", ".join(answers), 100.0),
        (lambda answers: " " + ", ".join(answer[::-1] for answer in answers).upper(), 0.0),
        (lambda answers: "", 0.0),
        (lambda answers: " " + answers[0].upper(), None),
    ):
        replies = {key(sample.ids): reply(sample.answers) for sample in samples.samples}
        stand_in = oracle(module, tokenizer, replies)
        (row,) = measure_ruler(tiny(), tokenizer, samples, none())
        wanted = 100.0 / len(samples.samples[0].answers) if expected is None else expected
        assert row.value == pytest.approx(wanted)
        assert max(stand_in.lengths) <= 1100
    assert (row.suite, row.metric, row.detail, row.trials, row.length) == ("ruler", "score", {"task": task}, 2, 1100)


def scores(name: str, by_length: dict[int, list[float]], stderr: float | None = 3.0) -> list[EvalRow]:
    return [
        EvalRow("ruler", name, length, "score", value, stderr, 30, {"task": f"task {at}"})
        for length, values in by_length.items()
        for at, value in enumerate(values)
    ]


def test_means_over_tasks() -> None:
    rows = means(scores("a", {256: [100.0, 50.0], 512: [80.0, 0.0]}) + scores("b", {256: [10.0, 20.0]}, None))
    assert [(row.scaling, row.length, row.value, row.trials) for row in rows] == [
        ("a", 256, 75.0, 60), ("a", 512, 40.0, 60), ("b", 256, 15.0, 60)
    ]  # fmt: skip
    assert rows[0].stderr == pytest.approx(math.sqrt(9 + 9) / 2)
    assert rows[2].stderr is None
    assert all(row.detail == {"task": "mean"} for row in rows)


def effective(rows: list[EvalRow], **more: object) -> dict[tuple[str, str], EvalRow]:
    options = {"original_length": 4096, "reference": "none", "share": 0.856} | more
    return {(row.scaling, row.detail["rule"]): row for row in effective_lengths(means(rows), **options)}


def test_effective_lengths() -> None:
    rows = scores("none", {2048: [90.0], 4096: [50.0], 8192: [0.0]})
    rows += scores("found", {2048: [85.6], 4096: [85.5], 8192: [43.0], 16_384: [42.0]})
    found = effective(rows)
    assert found["none", "absolute"].value == 2048
    assert found["found", "absolute"].value == 2048
    # relative: 85.6 % of what the unscaled model has at 4,096 tokens, the longest inside its window
    assert found["found", "relative"].detail["threshold"] == pytest.approx(42.8)
    assert found["found", "relative"].value == 8192
    assert found["none", "relative"].value == 4096
    row = found["found", "relative"]
    assert (row.metric, row.length, row.stderr, row.trials) == ("effective_length", 16_384, None, 120)
    assert {"of": "none", "at": 4096}.items() <= row.detail.items()
    assert effective(rows, threshold=95.0)["found", "absolute"].value == 0


def test_relative_without_the_unscaled_model_or_a_length_inside() -> None:
    rows = scores("found", {2048: [40.0], 8192: [35.0], 16_384: [30.0]})
    found = effective(rows)
    assert found["found", "relative"].value == 8192
    assert found["found", "relative"].detail["of"] == "found"
    assert ("found", "relative") not in effective(rows, original_length=1024)


def test_without_the_words_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    words.word_list.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with refused("missing-dependency", 'pip install "longrope[eval]"'):
        words.word_list("noun")
