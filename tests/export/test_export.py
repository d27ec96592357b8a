"""The source of an export: run folders find their model and scaling; errors name what is missing."""

from __future__ import annotations

import json
import shutil

import pytest

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalResults, EvalRow
from longrope.export.export import export_checkpoint, find_source
from longrope.rope.scaling import RopeScaling
from tests.export.sources import SU, TARGET, WINDOW, export, refusal, save_model, scaling_of
from tests.models.families import tiny_model

ROW = EvalRow("perplexity", "longrope", TARGET, "perplexity", 33.25, 0.5, 10, {})


@pytest.fixture
def run(tmp_path):
    """The files of `longrope extend` that an export reads."""
    source = save_model(tmp_path / "source", "llama")
    (tmp_path / "run").mkdir()
    scaling_of(source, SU).with_provenance(model=str(source)).save(tmp_path / "run/scaling.json")
    document = EvalResults((ROW,), {"seed": 0}).to_json()
    (tmp_path / "run/eval.json").write_text(json.dumps(document))
    return tmp_path / "run"


def test_a_run_brings_everything(run, tmp_path):
    found = find_source(run)
    assert found.model == str(tmp_path / "source")
    assert (found.evidence, found.notes, found.original_length) == ([ROW], [], WINDOW)
    done = export(run, None, tmp_path / "out")
    assert "| this scaling | 33.25 ± 0.50 |" in (done.path / "README.md").read_text()


def test_another_scaling_goes_before_the_runs(run, tmp_path):
    source = tmp_path / "source"
    scaling_of(source, 1.0).save(tmp_path / "other.json")
    found = find_source(run, tmp_path / "other.json")
    assert found.scaling.windows[-1].attention_factor == 1.0
    assert found.evidence == []  # measured with the run's own


def test_measurements_that_cannot_be_read_are_named(run):
    (run / "eval.json").write_text("{}")
    found = find_source(run)
    assert found.evidence == []
    assert "eval.json" in found.notes[0]


def test_an_original_length_that_was_given_to_the_run_holds(run, tmp_path):
    """The model's config states 128; the run was made with 64."""
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    assert export(run, None, tmp_path / "out").unsupported == []
    with pytest.raises(LongRopeError, match="original_length 64; this model has original_length 128"):
        export(tmp_path / "source", run / "scaling.json", tmp_path / "again")


def test_what_a_run_lacks_is_said(run, tmp_path):
    shutil.move(tmp_path / "source", tmp_path / "elsewhere")
    with pytest.raises(LongRopeError, match=r"is for the model .*source, which is not found from here") as error:
        find_source(run)
    assert error.value.code == "no-such-model"
    scaling_of(tmp_path / "elsewhere").save(run / "scaling.json")
    with pytest.raises(LongRopeError, match="does not say which model it is for"):
        find_source(run)
    (run / "scaling.json").unlink()
    assert refusal(find_source, run).code == "no-such-model"
    (run / "search.jsonl").write_text("{}\n")
    assert refusal(find_source, run).code == "unfinished-run"


def test_a_model_needs_a_scaling_and_an_export_has_one(run, tmp_path):
    assert refusal(find_source, tmp_path / "source").code == "missing-scaling"
    assert refusal(find_source, "tiny").code == "missing-scaling"
    done = export(run, None, tmp_path / "out")
    assert export(done.path, None, tmp_path / "phi3", target="phi3").path.is_dir()


def test_a_scaling_that_the_config_states(run, tmp_path):
    """Without a file: windows and weights are those of the checkpoint."""
    done = export(run, None, tmp_path / "out")
    (done.path / "scaling.json").unlink()
    found = find_source(done.path)
    assert found.scaling.windows == RopeScaling.load(run / "scaling.json").windows
    again = export(done.path, None, tmp_path / "again")
    assert (again.path / "model.safetensors").read_bytes() == (done.path / "model.safetensors").read_bytes()
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (again.path, done.path))
    assert config["rope_parameters"] == before["rope_parameters"]


def test_settings_that_do_not_go_together(run, tmp_path):
    for settings, code in (
        ({"target": "onnx"}, "invalid-setting"),
        ({"target": "gguf", "fold_attention_factor": True}, "setting-of-another-target"),
        ({"gguf": tmp_path / "model.gguf"}, "setting-of-another-target"),
    ):
        assert refusal(export, run, None, tmp_path / "out", **settings).code == code
    assert not (tmp_path / "out").exists()


def test_a_scaling_in_memory_is_saved_with_the_checkpoint(run, tmp_path):
    source = tmp_path / "source"
    scaling = scaling_of(source, SU)
    done = export_checkpoint(source, scaling, tmp_path / "out", target="hf-unified", original_length="64")
    assert (done.target, done.scaling_path) == ("hf-unified", None)
    assert RopeScaling.load(done.path / "scaling.json") == scaling
    assert done.to_json()["scaling_path"] is None
    assert "servings" not in repr(done)
    assert refusal(export_checkpoint, tiny_model("llama"), scaling, tmp_path / "again").code == "no-such-model"
    assert refusal(export_checkpoint, source, scaling).code == "invalid-setting"
