"""`longrope export` and `longrope fix-config` as a user runs them: what is printed, and what is refused in one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from tests.checkpoints import save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama that Phi-3 can express: four heads of 16."""
    return save_checkpoint(tmp_path_factory.mktemp("model") / "model", num_attention_heads=4, head_dim=16)


@pytest.fixture(scope="module")
def scaling(tmp_path_factory) -> Path:
    """64 to 256 tokens, with the attention factor 1."""
    path = tmp_path_factory.mktemp("scaling") / "scaling.json"
    geometry = RopeGeometry(rotary_dim=16, base=10000.0, original_length=64)
    RopeScaling.extended(geometry, 256, [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]).save(path)
    return path


@pytest.fixture
def refused(cli, tmp_path):
    """Run, and check the form of the refusal and that nothing was left; returns the message."""

    def call(*arguments: object) -> str:
        ran = cli(*arguments)
        assert ran.out == ""
        assert not (tmp_path / "out").exists()
        return ran.refusal

    return call


@pytest.mark.parametrize("form", ["hf", "hf-unified", "phi3"])
def test_every_form_prints_how_to_serve_it(form, cli, model, scaling, tmp_path):
    ran = cli("export", model, "--scaling", scaling, "--to", form, "--fold-attention-factor", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert f"wrote {tmp_path / 'out'} from {model} and {scaling}" in ran.out
    assert "reloaded with transformers: frequencies equal to" in ran.out
    assert "folded into the queries" in ran.out
    for start in ("transformers: transformers serve", "vLLM: vllm serve", "SGLang: python -m sglang", "llama.cpp: "):
        assert start in ran.out
    assert ("One set of factors" in ran.out) is (form == "hf-unified")
    kind = "Phi3ForCausalLM" if form == "phi3" else "LlamaForCausalLM"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == kind


def test_json_is_one_object(cli, model, scaling, tmp_path):
    found = json.loads(cli("export", model, "--scaling", scaling, "-o", tmp_path / "out", "--json").out)
    assert (found["checkpoint"], found["model"], found["losses"]) == (str(tmp_path / "out"), str(model), [])
    assert found["verification"]["max_frequency_error"] < 1e-6
    assert [row["runtime"] for row in found["servings"]] == ["transformers", "vLLM", "SGLang", "llama.cpp"]


def test_a_run_brings_model_and_scaling(cli, model, texts, tmp_path):
    budget = ("--method", "longrope", "--population", 4, "--iterations", 1, "--samples", 1)
    run = tmp_path / "run"
    assert cli("search", model, "--target-length", 128, "--data", texts / "search.txt", "-o", run, *budget).code == 0
    ran = cli("export", run, "--to", "phi3", "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["model"] == str(model)
    assert json.loads(ran.out)["notes"] == []  # `su`, the default of searches, is what every runtime computes


def test_fix_config(cli, model, scaling, tmp_path):
    out = tmp_path / "out"
    cli("export", model, "--scaling", scaling, "-o", out)
    assert cli("fix-config", out).out == f"nothing to change in {out / 'config.json'} (exported --to hf)\n"
    before = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(before | {"rope_theta": 5.0}))
    fixed = cli("fix-config", out)
    assert fixed.out == f"rope_theta: 5.0 -> 10000.0\nwrote {out / 'config.json'} (exported --to hf)\n"
    assert json.loads((out / "config.json").read_text()) == before
    assert json.loads(cli("fix-config", out, "--json").out)["changes"] == []
    (out / "scaling.json").unlink()
    ran = cli("fix-config", out)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("longrope: error: there is no scaling at")
    assert cli("fix-config", out, "--scaling", scaling).code == 0


def test_what_is_missing(refused, model, scaling, tmp_path):
    out = ("-o", tmp_path / "out")
    assert "expected a --scaling" in refused("export", model, *out)
    assert "--to to be 'hf', 'hf-unified', 'phi3' or 'gguf'" in refused(
        "export", model, "--scaling", scaling, "--to", "magic", *out
    )
    assert "nothing to fold" in refused("export", model, "--to", "gguf", "--fold-attention-factor", *out)
    assert "--gguf goes with" in refused("export", model, "--gguf", scaling, *out)
    (tmp_path / "empty").mkdir()
    assert "found neither" in refused("export", tmp_path / "empty", *out)
    assert "config.json; found none" in refused("fix-config", tmp_path / "empty")


def test_pickled_weights_are_not_opened(refused, model, scaling, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (pickled / path.name).write_bytes(path.read_bytes())
    arguments = ("export", pickled, "--scaling", scaling, "-o", tmp_path / "out")
    assert "found none; give a folder that holds model.safetensors" in refused(*arguments)
    torch.save(load_file(model / "model.safetensors"), pickled / "pytorch_model.bin")
    message = refused(*arguments)
    assert "pickled ones (pytorch_model.bin)" in message
    # The conversion that it names is one that works.
    command = shlex.split(message[message.index("python -c") :])[2].replace("CONVERTED", str(tmp_path / "converted"))
    exec(command)
    assert (tmp_path / "converted" / "model.safetensors").is_file()
    assert (tmp_path / "converted" / "tokenizer.json").is_file()


def test_damaged_weights(refused, model, scaling, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in model.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for form in ("hf", "phi3"):
        message = refused("export", damaged, "--scaling", scaling, "--to", form, "-o", tmp_path / "out")
        assert "cannot load" in message or "no complete safetensors file" in message


def test_lossy_only_when_asked(cli, refused, model, scaling, tmp_path):
    document = json.loads(scaling.read_text())
    document["windows"][1]["start_tokens"] = 4
    (tmp_path / "lossy.json").write_text(json.dumps(document))
    for form in ("hf", "hf-unified", "phi3"):
        arguments = ("export", model, "--scaling", tmp_path / "lossy.json", "--to", form)
        assert "it would lose the start tokens 4" in refused(*arguments, "-o", tmp_path / "out")
        ran = cli(*arguments, "-o", tmp_path / form, "--allow-lossy")
        assert "lost: the start tokens 4 (window to 256)" in ran.out
        assert "start tokens 4 (window to 256)" in (tmp_path / form / "README.md").read_text()


def test_an_output_that_exists_is_kept(refused, model, scaling, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("keep me")
    for form in ("hf", "hf-unified", "phi3"):
        assert "not empty" in refused("export", model, "--scaling", scaling, "--to", form, "-o", full)
    assert "exists" in refused("export", model, "--scaling", scaling, "--to", "gguf", "-o", full / "precious.txt")
    assert [path.name for path in full.iterdir()] == ["precious.txt"]
    assert (full / "precious.txt").read_text() == "keep me"


def test_what_is_said_of_large_models(cli, model, scaling, tmp_path):
    export = ("export", model, "--scaling", scaling)
    ran = cli(*export, "-o", tmp_path / "out", "--proof", "rotary", "--device", "cpu")
    assert "with the first 2 of 2 layers" in ran.out
    assert "weights: hard-linked to the source's: what is saved here" in ran.out
    ran = cli(*export, "-o", tmp_path / "copied", "--copy", "--proof", "none")
    assert "not proved: nothing was reloaded" in ran.out
    assert "weights: copied\n" in ran.out
    ran = cli(*export, "-o", tmp_path / "config", "--config-only")
    assert "weights: not in this folder" in ran.out
    assert "serve: the repository" in ran.out
    assert not list((tmp_path / "config").glob("*.safetensors"))


def test_what_is_refused_of_large_models(refused, model, scaling, tmp_path):
    export = ("export", model, "--scaling", scaling, "-o", tmp_path / "out")
    assert "expected owner/name for --push" in refused(*export, "--push", "name")
    assert "--copy copies weights that do not change; found --config-only" in refused(
        *export, "--copy", "--config-only"
    )
    assert "--device is where" in refused(*export, "--proof", "none", "--device", "cpu")
    assert "--config-only leaves the weights" in refused(*export, "--config-only", "--to", "phi3")
    assert "cuda:99" in refused(*export, "--device", "cuda:99")
