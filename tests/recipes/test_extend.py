"""The whole way for models that are not the simple case: low precision, a scaling present, a run that was stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.models.loading import open_model
from longrope.recipes import extend as module
from longrope.recipes.extend import extend
from longrope.rope.scaling import RopeScaling
from longrope.search.config import SearchConfig
from longrope.written import sha256_file, temporary
from tests.checkpoints import WINDOW, save_checkpoint

BUDGET = SearchConfig(method="longrope", population=4, iterations=1, samples=1)


def run(folder: Path, texts: Path, out: Path, target: int = 128, options: SearchConfig = BUDGET, **more):
    loading = LoadOptions(dtype=more.pop("dtype", "auto"))
    data = {"search_data": [str(texts / "search.txt")], "evaluation_data": [str(texts / "other.txt")]}
    loaded = open_model(str(folder), options=loading)
    return extend(loaded, target, out, **data, evaluation_samples=2, config=options, **more)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_precision(dtype, texts, tmp_path):
    source = save_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    done = run(source, texts, tmp_path / "run", dtype=dtype)
    assert [proof.length for proof in done.proofs] == [WINDOW, 128]


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": WINDOW,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW}


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_a_checkpoint_keeps_what_it_was_trained_with(rope, texts, tmp_path):
    """Within its own reach (256 tokens) the extended model is the checkpoint as it was, scaling included."""
    source = save_checkpoint(tmp_path / "source", rope_parameters=rope, max_position_embeddings=4 * WINDOW)
    done = run(source, texts, tmp_path / "run", 512)
    loaded = open_model(str(source))
    short, long = done.search.scaling.windows
    assert (short.max_length, long.max_length) == (256, 512)
    assert short == loaded.checkpoint_scaling.windows[-1]
    assert long.attention_factor == short.attention_factor
    assert "checkpoint" in done.search.baselines
    assert {row.scaling for row in done.evaluation.rows} >= {"checkpoint", "longrope", "none"}
    extended = open_model(str(done.checkpoint)).model
    ids = torch.arange(256)[None]
    with torch.inference_mode():
        torch.testing.assert_close(extended(ids).logits, loaded.model(ids).logits, atol=2e-3, rtol=1e-3)
    with pytest.raises(LongRopeError, match="above the model's window of 256"):
        run(source, texts, tmp_path / "again", 256)


def test_start_tokens_are_searched_and_lost_in_the_open(checkpoint, texts, tmp_path):
    options = SearchConfig(method="longrope", population=4, iterations=1, samples=1, start_tokens="8")
    with pytest.raises(LongRopeError) as error:
        run(checkpoint, texts, tmp_path / "run", options=options)
    assert error.value.code == "not-expressible"
    assert not (tmp_path / "run").exists()
    done = run(checkpoint, texts, tmp_path / "run", options=options, allow_lossy=True)
    assert done.search.scaling.windows[-1].start_tokens == 8
    assert "start tokens 8" in done.losses[0]


@pytest.mark.parametrize("stage", ["evaluate", "export_hf", "prove", "report"])
def test_stopped_in_any_stage_and_resumed(stage, checkpoint, texts, tmp_path, monkeypatch):
    whole = run(checkpoint, texts, tmp_path / "whole")

    def stopped(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, stopped)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, texts, tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["longrope", "extend", "--resume"])  # another command, as resuming is
    done = run(checkpoint, texts, tmp_path / "run", resume=True)
    saved = sha256_file(tmp_path / "run" / "scaling.json")
    assert done.evaluation.settings["scaling_sha256"] == saved
    assert done.search.scaling.windows == whole.search.scaling.windows
    assert [row.value for row in done.evaluation.rows] == [row.value for row in whole.evaluation.rows]
    names = [{path.name for path in folder.iterdir()} for folder in (tmp_path / "whole", tmp_path / "run")]
    assert names[0] == names[1]


def test_all_texts_that_are_missing_are_named_at_once(checkpoint):
    with pytest.raises(LongRopeError, match="as `search_data` and as `evaluation_data` to measure on, found none"):
        module.check_data(str(checkpoint), [], [], None)
    with pytest.raises(LongRopeError, match=f"{checkpoint.name} as `evaluation_data` to measure on, found none"):
        module.check_data(str(checkpoint), ["books/"], [], None)


def test_a_finished_run_is_left_alone(checkpoint, texts, tmp_path):
    out = tmp_path / "run"
    run(checkpoint, texts, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    os.link(out / "report.html", temporary(out / "report.html"))  # a kill in the moment that the page got its name
    with pytest.raises(LongRopeError, match="is finished"):
        run(checkpoint, texts, out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_errors_come_before_the_search(checkpoint, texts, tmp_path, monkeypatch):
    def searched(*_args, **_kwargs):
        raise AssertionError("the search began")

    monkeypatch.setattr(module, "search", searched)
    for lengths in ([WINDOW, 512], [1, WINDOW]):
        with pytest.raises(LongRopeError, match="from 2"):
            run(checkpoint, texts, tmp_path / "run", lengths=lengths)


def test_a_proof_that_fails_says_so(checkpoint, texts, tmp_path, monkeypatch):
    """A checkpoint that is not the searched model: another base in its config, behind the exporter's back."""
    real = module.export_hf

    def export_and_damage(name, scaling, out, *settings, **options):
        done = real(name, scaling, out, *settings, **options)
        config = json.loads((out / "config.json").read_text())
        for key in ("rope_scaling", "rope_parameters"):
            config[key]["long_factor"] = [1.0] * 16
        (out / "config.json").write_text(json.dumps(config))
        return done

    monkeypatch.setattr(module, "export_hf", export_and_damage)
    with pytest.raises(LongRopeError, match="does not give the searched model's logits"):
        run(checkpoint, texts, tmp_path / "run", 512)


def test_every_file_says_how_it_was_made(checkpoint, texts, tmp_path):
    run(checkpoint, texts, tmp_path / "run")
    for name in ("search.json", "eval.json", "extend.json"):
        found = json.loads((tmp_path / "run" / name).read_text())
        assert found["versions"]["torch"] == torch.__version__
        assert found["command"]
    settings = json.loads((tmp_path / "run" / "eval.json").read_text())["settings"]
    assert {"samples_sha256", "target_length", "dtype", "seed"} <= settings.keys()
    assert settings["scaling_sha256"] == sha256_file(tmp_path / "run" / "scaling.json")
    assert RopeScaling.load(tmp_path / "run" / "scaling.json").provenance["search"]["numerics"]["threads"]


def test_windows_that_an_export_would_lose_are_refused_before_the_search(texts, tmp_path):
    source = save_checkpoint(tmp_path / "source")
    geometry = open_model(str(source)).geometry
    RopeScaling.extended(geometry, 128, [2.0] * geometry.pairs).save(source / "scaling.json")
    with pytest.raises(LongRopeError, match="would lose the windows to 128 tokens") as error:
        run(source, texts, tmp_path / "run", target=256)
    assert error.value.code == "not-expressible"
    assert not (tmp_path / "run").exists()


def test_a_model_that_carries_two_windows_is_extended_to_two(texts, tmp_path):
    """Phi-3: the third window takes the place of the second, and the export states both."""
    factors = {"short_factor": [1.02] * 16, "long_factor": [1.0 + 0.2 * pair for pair in range(16)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": WINDOW} | factors
    more = {"original_max_position_embeddings": WINDOW, "max_position_embeddings": 128}
    source = save_checkpoint(tmp_path / "source", "Phi3Config", rope_parameters=rope, **more)
    done = run(source, texts, tmp_path / "run", target=256)
    assert done.losses == []
    assert [proof.length for proof in done.proofs] == [WINDOW, 256]


def test_the_search_may_have_workers(checkpoint, texts, tmp_path, cli, monkeypatch):
    asked = []

    def search(*_, **given):
        asked.append(given)
        raise LongRopeError("far enough")

    monkeypatch.setattr(module, "search", search)
    data = ("--data", texts / "search.txt", "--eval-data", texts / "other.txt", "--target-length", 128)
    ran = cli("extend", checkpoint, *data, "--workers", 4, "--ray-address", "head:6379", "-o", tmp_path / "run")
    assert "far enough" in ran.refusal
    assert (asked[0]["workers"], asked[0]["ray_address"]) == (4, "head:6379")
    assert "expected --workers of at least 1, found '0'" in cli("extend", checkpoint, *data, "--workers", 0).refusal
