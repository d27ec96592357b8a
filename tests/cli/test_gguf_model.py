"""A GGUF file as MODEL for every verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longrope.export.config import ExportConfig
from longrope.export.export import export_checkpoint
from longrope.models.loading import load_model, open_model
from longrope.rope.scaling import RopeScaling
from tests.models.gguf_models import HEAD_DIM, HEADS, WINDOW, model_of, save_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Quantised, and of a shape that Phi-3 has too."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    wide = model_of("llama", hidden_size=HEADS * HEAD_DIM)
    return save_gguf(path, model=wide, quantise=gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture(scope="module")
def scaling(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scaling") / "scaling.json"
    geometry = open_model(model).geometry
    RopeScaling.extended(geometry, 2 * WINDOW, [2.0] * geometry.pairs, attention_factor=1.1).save(path)
    return path


def test_inspect(model, cli):
    ran = cli("inspect", model, "--json")
    assert (ran.code, json.loads(ran.out)["original_length"], json.loads(ran.out)["model_type"]) == (0, WINDOW, "llama")


def test_plan(model, cli):
    ran = cli("plan", model, "--target-length", 2 * WINDOW, "--json")
    assert (ran.code, json.loads(ran.out)["original_length"]) == (0, WINDOW)
    assert json.loads(ran.out)["shape"]["vocabulary"] == 300


def test_search_and_eval(model, texts, cli, tmp_path):
    data = ("--data", texts / "search.txt", "--samples", 1)
    ran = cli(
        "search", model, "--target-length", 2 * WINDOW, *data, "-o", tmp_path / "run", "--method", "gradient",
        "--steps", 1, "--no-continuation",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert RopeScaling.load(tmp_path / "run/scaling.json").provenance["model"] == str(model)
    ran = cli(
        "eval", model, "--scaling", tmp_path / "run/scaling.json", "--lengths", "256,512", "--data",
        texts / "other.txt", "--samples", 1, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert {row["length"] for row in json.loads(ran.out)["results"]} == {256, 512}


def test_finetune(model, scaling, texts, cli, tmp_path):
    ran = cli(
        "finetune", model, "--scaling", scaling, "--length", 2 * WINDOW, "--steps", 1, "--batch", 1,
        "--micro-batch", 1, "--data", texts / "search.txt", "-o", tmp_path / "run",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    folder = tmp_path / "run/checkpoint"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    trained = open_model(tmp_path / "run")
    text = "Nobody had come home."
    assert trained.tokenizer(text).input_ids == open_model(model).tokenizer(text).input_ids
    assert trained.context_length == 2 * WINDOW


@pytest.mark.parametrize("target", ["hf", "phi3"])
def test_a_folder_with_the_weights_dequantised(target, model, scaling, tmp_path):
    done = export_checkpoint(model, scaling, tmp_path / "out", config=ExportConfig(target=target))
    assert done.verification is not None
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.model_type == ("phi3" if target == "phi3" else "llama")
    mine, theirs = load_model(str(model)).state_dict(), again.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(mine[name], theirs[name])
    card = (tmp_path / "out/README.md").read_text()
    assert "model.gguf" in card


def test_the_same_file_with_factors(model, scaling, tmp_path, cli):
    ran = cli("export", model, "--scaling", scaling, "--to", "gguf", "-o", tmp_path / "long.gguf", "--json")
    assert ran.code == 0, ran.err
    assert "equal byte for byte to those of model.gguf" in json.loads(ran.out)["proof"]
    assert cli("doctor", tmp_path / "long.gguf", "--json").code == 0
    assert open_model(tmp_path / "long.gguf").context_length == 2 * WINDOW


def test_one_line_for_a_bad_file(cli, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    for verb in (["inspect"], ["plan", "--target-length", "1k"], ["doctor"]):
        ran = cli(verb[0], tmp_path / "bad.gguf", *verb[1:])
        assert ran.code == 2
        assert "Traceback" not in ran.err
        assert "bad.gguf" in ran.err
