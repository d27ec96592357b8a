"""Reading runs: what is found in a folder, which evaluation belongs to which run, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalRow
from longrope.report.collect import collect
from longrope.report.page import build
from longrope.report.styles import OWN, method_styles
from longrope.report.summary import headline, method_of
from longrope.report.tables import effective_lengths
from tests.report import runs


def test_a_run_folder(tmp_path):
    folder = runs.write_run(tmp_path / "run")
    (run,) = collect([folder])
    assert (run.name, run.model, run.original_length) == ("run", "tiny", 256)
    assert run.scaling == runs.scaling()
    assert run.trace is not None
    assert run.trace.evaluations == 80
    assert [proof.length for proof in run.extension.proofs] == [256, 2048]
    assert {row.scaling for row in run.rows} == {OWN, "original", "none", "pi", "yarn"}
    assert len(run.rows) == len(runs.rows(runs.SUITES))


def test_a_search_alone(tmp_path):
    made = runs.scaling()
    made.save(tmp_path / "scaling.json")
    runs.write_log(tmp_path / "search.jsonl", runs.evolution())
    (run,) = collect([tmp_path])
    assert (run.rows, run.extension) == ([], None)
    assert run.trace is not None


def test_an_evaluation_joins_the_run_whose_scaling_it_measured(tmp_path):
    first, second = runs.scaling(), runs.scaling(attention_factor=1.0)
    folders = [
        runs.write_run(tmp_path / name, made, suites=["perplexity"]) for name, made in (("a", first), ("b", second))
    ]
    needles = runs.write_evaluation(tmp_path / "needles.json", runs.evaluation(["needle"], of=second))
    lone = runs.write_evaluation(tmp_path / "lone.json", runs.evaluation(["needle"]))
    found = collect([*folders, needles, lone])
    assert [run.name for run in found] == ["a", "b", "lone"]
    assert [bool(run.of("needle")) for run in found] == [False, True, True]
    assert {row.scaling for row in found[1].of("needle")} >= {OWN, "yarn"}
    assert OWN not in {row.scaling for row in found[2].rows}  # which scaling it is about, it does not say


def test_another_scaling_keeps_its_name(tmp_path):
    made = runs.scaling()
    measured = runs.evaluation(["passkey"], of=made)
    measured.settings["against_sha256"] = {"other.json": "00" * 32, "scaling.json": measured.settings["scaling_sha256"]}
    measured.rows.append(runs.rows(["passkey"])[0].__class__("passkey", "other.json", 256, "accuracy", 0.5, 0.1, 40))
    folder = runs.write_run(tmp_path / "run", made, suites=["perplexity"])
    (run,) = collect([folder, runs.write_evaluation(tmp_path / "eval.json", measured)])
    assert {row.scaling for row in run.of("passkey")} >= {OWN, "other.json"}


def test_another_scaling_in_the_folder_of_a_run_is_not_its_own(tmp_path):
    folder = runs.write_run(tmp_path / "run", suites=["perplexity"])
    other = runs.evaluation(["needle"], of=runs.scaling(attention_factor=1.0))
    runs.write_evaluation(folder / "other.json", other)
    (run,) = collect([folder])
    assert OWN in {row.scaling for row in run.of("perplexity")}
    assert {row.scaling for row in run.of("needle")} == set(runs.METHODS)


def test_a_checkpoint_as_it_is_and_not_the_original_is_what_a_report_is_about(tmp_path):
    """Suites on short texts name the original first, also where no other suite names it at all."""
    measured = runs.evaluation(["perplexity", "retention"])
    rows = [replace(row, scaling="checkpoint") if row.scaling == "scaling.json" else row for row in measured.rows]
    kept = [row for row in rows if row.scaling in ("yarn", "checkpoint")]
    kept += [row for row in rows if row.scaling == "original" and row.suite == "retention"]
    (run,) = collect([runs.write_evaluation(tmp_path / "eval.json", replace(measured, rows=kept))])
    assert method_of(run) == "checkpoint"


def test_the_effective_length_of_several_evaluations_is_the_longest(tmp_path):
    """Each knows its own lengths; a later one at lengths where nothing passes does not take it back."""
    rule = {"rule": "absolute", "threshold": 85.0}
    rows = [
        EvalRow("ruler", OWN, length, "effective_length", value, None, 0, rule)
        for length, value in ((512, 512), (2048, 0))
    ]
    (line,) = effective_lengths(rows, method_styles([OWN])).lines
    assert [cell.text for cell in line.cells] == ["512"]


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize("settings", [None, {}])
def test_a_result_without_its_settings_is_refused(tmp_path, where, settings):
    document = runs.evaluation(["passkey"]).to_json() | {"settings": settings}
    if settings is None:
        del document["settings"]
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(LongRopeError, match="does not say how it was measured"):
        collect([path if where == "file" else tmp_path])


def test_results_of_no_schema_are_refused(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps({"results": [], "settings": {"model": "tiny"}}), "utf-8")
    with pytest.raises(LongRopeError, match=r"longrope\.eval/1"):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "expected .* to hold a finished run"), ({"notes.json": "{}"}, "finished run"), ({"a.json": "{"}, "JSON")],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(LongRopeError, match=message):
        collect([tmp_path])


def test_nothing_is_refused(tmp_path):
    with pytest.raises(LongRopeError, match="found none"):
        collect([])
    with pytest.raises(LongRopeError, match="cannot read"):
        collect([tmp_path / "missing"])


def test_the_same_measurement_twice_is_refused(tmp_path):
    made = runs.scaling()
    folder = runs.write_run(tmp_path / "run", made, suites=["passkey"])
    again = runs.write_evaluation(tmp_path / "again.json", runs.evaluation(["passkey"], of=made))
    with pytest.raises(LongRopeError, match=r"both hold passkey of original at 256 tokens"):
        collect([folder, again])


def test_a_damaged_summary_is_refused(tmp_path):
    folder = runs.write_run(tmp_path / "run", suites=["passkey"])
    (folder / "extend.json").write_text('{"proofs": [{"length": 3}], "losses": []}', "utf-8")
    with pytest.raises(LongRopeError, match="not what longrope extend writes"):
        collect([folder])


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [runs.write_run(tmp_path / parent / "run", suites=["passkey"]) for parent in ("x", "y")]
    assert [run.name for run in collect(folders)] == ["x/run", "y/run"]
    assert len(collect([folders[0], folders[0]])) == 1
    taken = runs.write_run(tmp_path / "yarn", suites=["passkey"])
    assert [run.name for run in collect([taken])] == ["run yarn"]


def test_a_run_that_is_called_like_a_method_of_another_keeps_its_measurements(tmp_path):
    """A server's method has the served model's name, which a file may have too."""
    paths = []
    for file, method in (("a", "b"), ("b", "yarn"), ("run b", "yarn")):
        measured = runs.evaluation(["perplexity"])
        measured.rows[:] = [replace(row, scaling=method) for row in measured.rows if row.scaling == "yarn"]
        paths.append(runs.write_evaluation(tmp_path / f"{file}.json", measured))
    found = collect(paths)
    assert not {run.name for run in found} & {"b", "yarn"}
    assert len({run.name for run in found}) == 3
    report = build(found)
    assert [[one.name for one in part.exhibits] for part in report.chapters[1:]].count([]) == 0
    assert any(line.label == "b" for line in report.chapters[1].exhibits[0].tables[0].lines)


def test_exhibits_of_names_that_look_alike_have_names_of_their_own(tmp_path):
    names = ("exp_1", "exp-1", "exp-1-2", "道", "名", "compared")
    folders = [runs.write_run(tmp_path / name, suites=["passkey"]) for name in names]
    found = [exhibit.name for exhibit in build(collect(folders)).exhibits]
    assert len(set(found)) == len(found)


def test_a_runtime_that_rounds_is_shown_by_its_divergence(tmp_path):
    """Of a quantised model the largest difference of a logit says nothing; transformers' exact logits do."""
    folder, shown = runs.write_run(tmp_path / "a"), method_styles([OWN, "original", "none", "pi", "yarn"])
    (exact,) = [number for number in headline(*collect([folder]), shown) if "exported" in number.label]
    assert exact.value.text == "100 %"
    assert exact.note == "reloaded with plain transformers; logits differ by at most 2.0e-04"
    summary = json.loads((folder / "extend.json").read_text("utf-8"))
    for proof, divergence in zip(summary["proofs"], (0.002, 0.0057), strict=True):
        proof |= {"runtime": "llama.cpp", "divergence": divergence, "divergence_without": 2.07, "top1_agreement": 0.875}
    (folder / "extend.json").write_text(json.dumps(summary), "utf-8")
    (rounded,) = [number for number in headline(*collect([folder]), shown) if "llama.cpp" in number.label]
    assert (rounded.label, rounded.value.text) == ("llama.cpp from the searched model, nats", "0.0057")
    assert rounded.note == "Kullback-Leibler divergence; 2.1 without the factors; same next token 87.5 % of the time"
