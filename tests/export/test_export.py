"""What an export starts from: run folders find their model and scaling; what is missing is said."""

from __future__ import annotations

import json
import shutil

import pytest

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalRow, Evaluation
from longrope.export.export import export, find_source
from tests.export.sources import SU, TARGET, WINDOW, save_model, scaling_of

ROW = EvalRow("perplexity", "longrope", TARGET, "perplexity", 33.25, 0.5, 10, {})


@pytest.fixture
def run(tmp_path):
    """What `longrope extend` leaves, as far as an export looks at it."""
    source = save_model(tmp_path / "source", "llama")
    (tmp_path / "run").mkdir()
    scaling_of(source, SU).with_provenance(model=str(source)).save(tmp_path / "run/scaling.json")
    document = Evaluation([ROW], {"seed": 0}).to_json()
    (tmp_path / "run/eval.json").write_text(json.dumps(document))
    return tmp_path / "run"


def test_a_run_brings_everything(run, tmp_path):
    found = find_source(str(run))
    assert found.model == str(tmp_path / "source")
    assert (found.evidence, found.notes, found.original_length) == ([ROW], [], WINDOW)
    done = export(str(run), tmp_path / "out")
    assert "| longrope | 33.25 ± 0.50 |" in (done.path / "README.md").read_text()


def test_another_scaling_goes_before_the_runs(run, tmp_path):
    source = tmp_path / "source"
    scaling_of(source, 1.0).save(tmp_path / "other.json")
    found = find_source(str(run), tmp_path / "other.json")
    assert found.scaling.windows[-1].attention_factor == 1.0
    assert found.evidence == []  # measured with the run's own


def test_measurements_that_cannot_be_read_are_named(run):
    (run / "eval.json").write_text("{}")
    found = find_source(str(run))
    assert found.evidence == []
    assert "eval.json" in found.notes[0]


def test_an_original_length_that_was_given_to_the_run_holds(run, tmp_path):
    """The model's config states 128; the run was made with 64."""
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    assert export(str(run), tmp_path / "out").losses == []
    with pytest.raises(LongRopeError, match="original_length 64; this model has original_length 128"):
        export(str(tmp_path / "source"), tmp_path / "again", scaling_path=run / "scaling.json")


def test_what_a_run_lacks_is_said(run, tmp_path):
    shutil.move(tmp_path / "source", tmp_path / "elsewhere")
    with pytest.raises(LongRopeError, match=r"is for the model .*source, which is not found from here .*--scaling"):
        find_source(str(run))
    scaling_of(tmp_path / "elsewhere").save(run / "scaling.json")
    with pytest.raises(LongRopeError, match="does not say which model it is for"):
        find_source(str(run))
    (run / "scaling.json").unlink()
    with pytest.raises(LongRopeError, match="found neither in"):
        find_source(str(run))
    (run / "search.jsonl").write_text("{}\n")
    with pytest.raises(LongRopeError, match="go on with it"):
        find_source(str(run))


def test_a_model_needs_a_scaling_and_an_export_has_one(run, tmp_path):
    with pytest.raises(LongRopeError, match="expected --scaling FILE"):
        find_source(str(tmp_path / "source"))
    with pytest.raises(LongRopeError, match="expected --scaling FILE"):
        find_source("tiny")
    done = export(str(run), tmp_path / "out")
    assert export(str(done.path), tmp_path / "phi3", to="phi3").path.is_dir()


def test_options_that_do_not_go_together(run, tmp_path):
    for options, reason in (
        ({"to": "onnx"}, "expected --to hf, hf-unified, phi3 or gguf; found 'onnx'"),
        ({"to": "gguf", "fold_attention_factor": True}, "nothing to fold"),
        ({"gguf": tmp_path / "model.gguf"}, "--gguf goes with --to gguf"),
    ):
        with pytest.raises(LongRopeError, match=reason):
            export(str(run), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
