"""Warnings follow from a run's files: each appears with its cause and stays away without it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from longrope.evaluation.results import EvalRow
from longrope.report.collect import ExtensionRecord, Run, collect
from longrope.report.styles import OWN, method_styles
from longrope.report.trace import read_trace
from longrope.report.warnings import comparability, warnings
from longrope.rope.closed_forms import su_attention_factor
from longrope.rope.scaling import RopeScaling
from tests.report import runs

SU = su_attention_factor(runs.GEOMETRY, runs.TARGET)


def text(run: Run) -> str:
    shown = method_styles([OWN, *run.others])
    return "\n".join(f"{group.heading}: {item}" for group in warnings(run, shown) for item in group.items)


def run_of(scaling: RopeScaling | None = None, rows: list[EvalRow] | None = None, **settings) -> Run:
    measured = runs.evaluation(of=scaling)
    named = [replace(row, scaling=OWN) if row.scaling == "scaling.json" else row for row in measured.rows]
    measured = replace(measured, rows=named if rows is None else rows, settings=measured.settings | settings)
    return Run("run", None, scaling, None, {"eval.json": measured}, ExtensionRecord((), (), {}))


def perplexities(values: dict[str, dict[int, float]]) -> list[EvalRow]:
    return [
        EvalRow("perplexity", name, length, "perplexity", value, 1.0, 40)
        for name, by_length in values.items()
        for length, value in by_length.items()
    ]


@pytest.mark.parametrize(
    ("scaling", "warning"),
    [
        (runs.scaling(start_tokens=8), "start tokens 8"),
        (runs.scaling(start_tokens=8), "No runtime but longrope itself"),
        (runs.scaling(3), "the windows to 512 tokens"),
        (runs.scaling(attention_factor=1.0), "this scaling has 1."),
        (runs.scaling(attention_factor=SU), "Texts of up to 256 tokens also get the attention factor"),
        (runs.scaling(), "The factors change beyond 256 tokens"),
    ],
)
def test_what_a_runtime_cannot_do(scaling, warning):
    assert warning in text(run_of(scaling))


def test_a_portable_scaling_has_no_such_warnings():
    plain = text(run_of(runs.scaling(attention_factor=SU)))
    for warning in ("start tokens", "the windows to", "this scaling has"):
        assert warning not in plain
    one = RopeScaling.single(runs.GEOMETRY, runs.TARGET, [8.0] * 32, attention_factor=SU)
    assert "Limits of the runtimes: The factors change" not in text(run_of(one))


def test_what_was_lost():
    lossy = replace(run_of(runs.scaling()), extension=ExtensionRecord((), ("the start tokens 8: gone",), {}))
    assert "Losses: The exported checkpoint lost the start tokens 8: gone." in text(lossy)


def test_where_something_else_is_better():
    rows = perplexities({"none": {256: 50.0, 512: 90.0}, "yarn": {256: 70.0, 512: 60.0}, OWN: {256: 55.0, 512: 65.0}})
    found = text(run_of(runs.scaling(), rows))
    assert "At 256 tokens, inside the original window, perplexity is +10.0 % against the original model" in found
    assert "At 512 tokens perplexity is lower with YaRN (60.0 ± 1.0)." in found
    better = perplexities({"none": {256: 56.0, 512: 90.0}, OWN: {256: 55.0, 512: 60.0}})
    assert "Losses" not in text(run_of(runs.scaling(), better))


def test_a_loss_within_the_standard_error_is_said_to_be_one():
    """The errors are 1.0 each, so that differences of up to 1.41 are none: the rule of the verdict."""
    rows = perplexities(
        {"none": {256: 54.0, 512: 90.0}, "pi": {512: 58.0}, "yarn": {256: 70.0, 512: 64.0}, OWN: {256: 55.0, 512: 65.0}}
    )
    found = text(run_of(runs.scaling(), rows))
    original = "+1.9 % against the original model (55.0 ± 1.0 and 54.0 ± 1.0)"
    assert f"{original}, which is within the standard error of the difference." in found
    assert (
        "At 512 tokens perplexity is lower with PI (58.0 ± 1.0); within the standard error of the difference also with "
        "YaRN (64.0 ± 1.0)." in found
    )
    alone = perplexities({"none": {512: 90.0}, "yarn": {512: 64.0}, OWN: {512: 65.0}})
    assert (
        "At 512 tokens perplexity is lower with YaRN (64.0 ± 1.0), which is within the standard error of the "
        "difference: no difference was shown." in text(run_of(runs.scaling(), alone))
    )


def test_a_search_that_found_nothing_better(tmp_path):
    for name, loss in (("good", 4.1), ("bad", 4.2), ("alike", 4.1898)):
        runs.write_log(tmp_path / name, [({"steps": [1]}, loss, False)])
        trace = read_trace(tmp_path / name, runs.scaling(best_loss=loss).provenance)
        says = f"The search gained nothing over YaRN on its own texts: {loss:.4f} nats per token, YaRN 4.1900."
        warned = says in text(replace(run_of(runs.scaling()), trace=trace))
        assert warned == (name != "good")


def test_what_was_not_measured():
    found = text(run_of(runs.scaling(), perplexities({"none": {256: 50.0}, OWN: {256: 49.0}})))
    assert "Not measured: Loss by position, passkey retrieval, needles by depth" in found
    assert "Not measured: Beyond 256 tokens: perplexity by length." in found
    assert "Not measured" not in text(run_of(runs.scaling()))


def test_few_trials(tmp_path):
    (few,) = collect([runs.write_evaluation(tmp_path / "e.json", runs.evaluation(["needle", "passkey"], 12))])
    assert "fewer than 30 trials: needles by depth and length (12) and passkey retrieval (12)" in text(few)
    (many,) = collect([runs.write_evaluation(tmp_path / "f.json", runs.evaluation(["needle"], 30))])
    assert "fewer than" not in text(many)


def test_documents_that_were_seen():
    warning = "measured on documents that the search or training of a method has seen: book:one"
    assert f"eval.json: {warning}." in text(run_of(runs.scaling(), seen_documents=["book:one"], warnings=[warning]))
    assert "has seen" not in text(run_of(runs.scaling()))


def test_what_does_not_compare():
    one, two = run_of(runs.scaling()), run_of(runs.scaling(), samples_sha256={"needle 256": "00" * 32})
    assert comparability([one, one]) == []
    assert "different texts: needle." in comparability([one, two])[0]
    other = run_of(runs.scaling(), model_fingerprint="00")
    assert "different models" in comparability([one, other])[0]


def answers(values: dict[str, float], trials: int = 100, suite: str = "needle") -> list[EvalRow]:
    return [
        EvalRow(suite, name, 2048, "accuracy", value, math.sqrt(value * (1 - value) / trials), trials, {"depth": 0.5})
        for name, value in values.items()
    ]


def test_needles_that_another_method_finds_are_named():
    lost = text(run_of(runs.scaling(), answers({OWN: 0.40, "yarn": 0.80})))
    assert "At 2,048 tokens this scaling finds fewer needles: 40 %, with YaRN 80 %." in lost
    assert "The search was driven by perplexity, which does not ask for answers; --objective needle does." in lost
    passkeys = text(run_of(runs.scaling(), answers({OWN: 0.40, "yarn": 0.80}, suite="passkey")))
    assert "this scaling finds fewer passkeys: 40 %, with YaRN 80 %" in passkeys
    within = text(run_of(runs.scaling(), answers({OWN: 0.76, "yarn": 0.80})))
    assert "fewer needles" not in within
    assert "driven by perplexity" not in within
    by_needles = text(run_of(runs.scaling(objective="needle"), answers({OWN: 0.40, "yarn": 0.80})))
    assert "fewer needles" in by_needles
    assert "driven by perplexity" not in by_needles
