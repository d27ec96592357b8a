"""`longrope eval` as a user runs it: tables of every suite, one JSON object, files, warnings and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longrope.data.books import read_book
from longrope.evaluation.results import EvalResults
from longrope.models.apply import geometry_of
from longrope.models.loading import load_model
from longrope.rope.scaling import RopeScaling
from longrope.storage import sha256_text

QUICK = ("--trials", 1, "--depths", 2, "--samples", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "part.txt"
    path.write_text(read_book("les-miserables").text[50_000:110_000], "utf-8")
    return path


@pytest.fixture(scope="module")
def scaling(tmp_path_factory, text) -> Path:
    """A scaling for the embedded model that was searched on `text`."""
    geometry = geometry_of(load_model("tiny"))
    path = tmp_path_factory.mktemp("scaling") / "scaling.json"
    data = {"document_sha256": [sha256_text(text.read_text("utf-8"))]}
    RopeScaling.extended(geometry, 512, [1.0] * 16 + [2.0] * 16, provenance={"data": data}).save(path)
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A task of lm-eval with its data."""
    folder = tmp_path_factory.mktemp("task")
    rows = [{"text": "The grass is", "options": [" green", " xqzjv"], "label": 0}] * 3
    (folder / "grass.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "task": "grass",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "grass.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{options}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "grass.yaml").write_text(json.dumps(settings))
    return folder / "grass.yaml"


def test_every_suite_has_its_table_and_one_file_holds_all(cli, text, task, tmp_path):
    out = tmp_path / "eval.json"
    ran = cli(
        "eval", "tiny", "--suite", "perplexity,passkey,needle,ruler,retention", "--lengths", "256,300", "--data", text,
        "--against", "none,yarn", "--target-length", 512, *QUICK, "--ruler-tasks", "niah_single_1", "--tasks", task,
        "-o", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "evaluate: 1 of 35 samples, " in ran.err  # at once; the next line would come after a minute
    assert len(ran.err.splitlines()) == 2
    assert ran.err.startswith("computing on cpu in float32\n")
    for title in (
        "Perplexity by context length, 2 held-out samples",
        "Passkeys found by context length, % of 1",
        "Needles found by context length, % of 2 at all depths",
        "RULER, mean score by context length, 1 samples of each task",
        "Effective length, tokens (score at least)",
        "Short texts, original window of 256 tokens",
    ):
        assert title in ran.out
    retention = ran.out.partition("Short texts")[2]
    assert "top1 agreement" in retention
    assert "grass acc" in retention
    assert [line.split()[0] for line in retention.strip().splitlines()[2:5]] == ["original", "yarn", "none"]
    found = EvalResults.load(out)
    assert {row.suite for row in found.rows} == {"perplexity", "passkey", "needle", "ruler", "retention"}
    assert found.settings["suites"]["retention"]["tasks"] == [str(task)]
    assert found.settings["seed"] == 0
    assert "eval" in found.provenance["command"] or found.provenance["command"]
    assert (tmp_path / "eval.cells.jsonl").exists()
    again = cli("eval", "tiny", "--suite", "passkey", "--lengths", "256", "-o", out)
    assert again.code == 2
    assert "nothing is overwritten" in again.err


def test_passkeys_need_no_text(cli):
    ran = cli("eval", "tiny", "--suite", "passkey", "--lengths", "256", *QUICK, "--json")
    assert ran.code == 0
    document = json.loads(ran.out)
    assert document["schema"] == "longrope.eval/1"
    (row,) = document["results"]
    assert (row["suite"], row["scaling"], row["trials"], row["stderr"]) == ("passkey", "none", 1, None)


def test_lengths_by_themselves(cli, scaling):
    """L, 2L, … L': of the scaling, of --target-length, and of the model as it is."""

    def lengths(*options):
        ran = cli("eval", "tiny", "--suite", "passkey", *QUICK, "--json", *options)
        return [row["length"] for row in json.loads(ran.out)["results"]]

    assert lengths() == [256]
    assert lengths("--scaling", scaling) == [256, 512]
    assert lengths("--target-length", "300") == [256, 300]


def test_a_server_does_not_tell_its_lengths(cli):
    ran = cli("eval", "http://localhost:1/v1", "--tokenizer", "tiny", "--suite", "passkey")
    assert "expected --lengths to measure a server at, found none; give context lengths up to" in ran.refusal


def test_closed_forms_of_the_original_window_say_that_they_change_nothing(cli):
    plain = cli("eval", "tiny", "--suite", "passkey", "--lengths", "256", "--against", "yarn", *QUICK)
    assert plain.code == 0
    assert "warning: yarn rescale nothing: they are made for 256 tokens" in plain.err
    assert "a longer target length shows what they do" in plain.err
    longer = ("--target-length", "512")
    assert "warning" not in cli("eval", "tiny", "--suite", "passkey", "--lengths", "256", *longer, *QUICK).err


def test_seen_texts(cli, text, scaling):
    arguments = ("eval", "tiny", "--lengths", "256", "--data", text, "--scaling", scaling, *QUICK)
    refused = cli(*arguments)
    assert refused.code == 2
    assert "part.txt" in refused.err
    assert "--allow-seen" in refused.err
    allowed = cli(*arguments, "--allow-seen", "--json")
    assert allowed.code == 0
    assert "warning: measured on documents" in allowed.err
    settings = json.loads(allowed.out)["settings"]
    assert settings["seen_documents"] == ["part.txt"]
    assert settings["warnings"]


def test_scalings_against_each_other_on_the_same_samples(cli, scaling, tmp_path):
    other = tmp_path / "other.json"
    RopeScaling.load(scaling).with_provenance(data=None).save(other)
    ran = cli(
        "eval", "tiny", "--suite", "passkey", "--lengths", "300", "--scaling", scaling, *QUICK, "--json",
        "--against", f"{other},original",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert [row["scaling"] for row in document["results"]] == [str(other), "original", str(scaling)]
    assert document["results"][0]["value"] == document["results"][2]["value"]
    assert set(document["settings"]["against_sha256"]) == {str(other), str(scaling)}


def test_refusals_name_the_options(cli, tmp_path):
    """The rest of what cannot be measured is in tests/evaluation."""
    for arguments, message in (
        (("--suite", "ruler", "--lengths", "256", "--ruler-tasks", "qa_1"), "--qa-file"),
        (("--lengths", "256", "--suite", "passkey", "--against", "checkpoint"), "out of --against"),
        (("--lengths", "256", "--suite", "passkey", "--resume"), "give its -o"),
        (("--lengths", "256", "--suite", "passkey", "--resume", "-o", tmp_path / "a.json"), "without --resume"),
        (("--lengths", "256", "--suite", "passkey", "--original", tmp_path / "none"), "no model folder"),
        (("--lengths", "256", "--suite", "passkey", "--data", "book:les-miserables"), "--data is about texts"),
        (("--lengths", "256", "--suite", "passkey", "--allow-seen"), "--allow-seen is about texts"),
        (
            ("--lengths", "256", "--suite", "ruler", "--ruler-tasks", "vt", "--qa-file", "a.json"),
            "found --ruler-tasks of",
        ),
    ):
        ran = cli("eval", "tiny", *arguments)
        assert message in ran.refusal, arguments
    assert not list(tmp_path.glob("*.jsonl"))


def test_ctrl_c_says_how_to_go_on_and_resume_does(cli, tmp_path, monkeypatch):
    from longrope.evaluation import passkey

    real, calls = passkey.measure_passkeys, []

    def interrupted_at_256(*arguments, **more):
        calls.append(arguments[2].length)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(passkey, "measure_passkeys", interrupted_at_256)
    command = ("eval", "tiny", "--suite", "passkey", "--lengths", "192,256", *QUICK, "-o", tmp_path / "eval.json")
    monkeypatch.setattr("sys.argv", ["longrope", "eval", "tiny", "-o", "eval.json"])
    ran = cli(*command)
    assert ran.code == 130
    assert "eval.cells.jsonl; continue with: longrope eval tiny -o eval.json --resume" in ran.err
    again = cli(*command)
    assert again.code == 2
    assert "continue it with --resume" in again.err
    assert cli(*command, "--resume").code == 0
    assert calls == [192, 256, 256]
    assert [row.length for row in EvalResults.load(tmp_path / "eval.json").rows] == [192, 256]
