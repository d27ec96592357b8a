"""The whole way for a GGUF file: searched as it is served, extended byte for byte, proved in llama.cpp."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from longrope.export.export import export_checkpoint
from longrope.models.loading import open_model
from longrope.recipes import extend as module
from longrope.recipes.extend import Extension, extend
from longrope.rope.closed_forms import llama3
from longrope.rope.geometry import RopeGeometry
from longrope.search.config import SearchConfig
from tests.export.sources import refusal
from tests.models.gguf_models import HEAD_DIM, WINDOW, model_of, save_gguf

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

BUDGET = SearchConfig(method="longrope", population=4, iterations=1, samples=1)
Q8 = gguf.GGMLQuantizationType.Q8_0


def run(path: Path, texts: Path, out: Path, target: int = 2 * WINDOW, **more) -> Extension:
    data = {"search_data": [str(texts / "search.txt")], "evaluation_data": [str(texts / "other.txt")]}
    return extend(open_model(path), target, out, **data, evaluation_samples=1, config=BUDGET, **more)


def test_the_same_file_with_the_factors(texts, tmp_path):
    source = save_gguf(tmp_path / "model.gguf", quantise=Q8)
    done = run(source, texts, tmp_path / "run")
    assert done.checkpoint == tmp_path / "run" / "model-512.gguf"
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert [proof.runtime for proof in done.proofs] == ["llama.cpp"] * 2
    assert [proof.length for proof in done.proofs] == [WINDOW, 2 * WINDOW]
    assert all(proof.divergence < proof.divergence_without / 10 for proof in done.proofs)
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(done.checkpoint)
    tensors = {tensor.name: tensor.data.tobytes() for tensor in new.tensors}
    assert all(tensors.pop(tensor.name) == tensor.data.tobytes() for tensor in old.tensors)
    assert set(tensors) == {"rope_factors_long.weight", "rope_factors_short.weight"}
    written = json.loads((tmp_path / "run" / "extend.json").read_text())
    assert written["proofs"][1]["runtime"] == "llama.cpp"
    assert "llama.cpp" in done.report.html.read_text()
    # It is a model again, with the scaling that was searched.
    again = open_model(done.checkpoint)
    assert again.context_length == 2 * WINDOW
    np.testing.assert_allclose(
        again.checkpoint_scaling.windows[-1].factors, done.search.scaling.windows[-1].factors, rtol=1e-6
    )
    # The run's folder brings model and scaling to another export.
    out = export_checkpoint(tmp_path / "run", output_dir=tmp_path / "other.gguf", target="gguf")
    assert "byte for byte" in out.proof


def test_llama_3_is_extended_from_its_own_window(texts, tmp_path):
    factors = llama3(RopeGeometry(HEAD_DIM, 10_000.0, WINDOW // 4), 4.0)
    source = save_gguf(tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors})
    done = run(source, texts, tmp_path / "run")
    short, long = done.search.scaling.windows
    assert (short.max_length, long.max_length) == (WINDOW, 2 * WINDOW)
    np.testing.assert_allclose(short.factors, factors, rtol=1e-6)
    names = {tensor.name for tensor in gguf.GGUFReader(done.checkpoint).tensors}
    assert "rope_freqs.weight" not in names
    assert max(proof.divergence for proof in done.proofs) < 1e-4  # float32 weights


def test_windows_that_are_no_multiple_of_a_context(texts, tmp_path):
    """llama.cpp rounds a context up to a multiple of 256: at -c 300 the long factors would hold."""
    source = save_gguf(tmp_path / "model.gguf", model=model_of("llama", max_position_embeddings=300))
    done = run(source, texts, tmp_path / "run", 500)
    assert [proof.length for proof in done.proofs] == [256, 500]
    assert all(proof.divergence < proof.divergence_without / 10 for proof in done.proofs)


def test_a_stopped_run_goes_on(texts, tmp_path, monkeypatch):
    source = save_gguf(tmp_path / "model.gguf", quantise=Q8)
    with monkeypatch.context() as patched:
        patched.setattr(module, "prove_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, texts, tmp_path / "run")
    assert run(source, texts, tmp_path / "run", resume=True).proofs


def searched(*_args, **_kwargs):
    raise AssertionError("the search began")


def test_a_graph_without_factors_is_refused_before_the_search(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "search", searched)
    source = save_gguf(tmp_path / "model.gguf", "qwen2")
    error = refusal(run, source, texts, tmp_path / "run")
    assert error.code == "unsupported-model"
    assert "'qwen2'" in str(error)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_ends_with_such_a_file_is_refused_too(texts, tmp_path, cli):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "stages:\n- {stage: search, target: 2x, method: gradient, steps: 1, samples: 1}\n- {stage: export, to: gguf}\n"
    )
    source = save_gguf(tmp_path / "model.gguf", "qwen2")
    ran = cli("extend", source, "--recipe", recipe, "--data", texts / "search.txt", "-o", tmp_path / "run", "--dry-run")
    assert "stage 2 (export): llama.cpp cannot apply LongRoPE to the architecture 'qwen2'" in ran.refusal


def test_without_llama_cpp_nothing_begins(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "search", searched)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    error = refusal(run, save_gguf(tmp_path / "model.gguf"), texts, tmp_path / "run")
    assert error.code == "missing-dependency"
    assert "longrope[llamacpp]" in str(error)


def test_a_file_with_other_factors_is_no_proof(texts, tmp_path, monkeypatch):
    """The right scaling is searched, and another one is written."""
    from longrope.recipes import extend_gguf

    own = extend_gguf.export_gguf

    def wrong(model, scaling, output, config):
        long = scaling.windows[-1]
        other = type(long)(long.max_length, [1.0] * len(long.factors), 0, long.attention_factor)
        return own(model, type(scaling)(scaling.geometry, (scaling.windows[0], other)), output, config)

    monkeypatch.setattr(extend_gguf, "export_gguf", wrong)
    error = refusal(run, save_gguf(tmp_path / "model.gguf", quantise=Q8), texts, tmp_path / "run")
    assert error.code == "differs"
    assert "-c 512 does not give" in str(error)
