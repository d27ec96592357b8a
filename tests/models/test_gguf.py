"""A GGUF file as a model: its weights, its RoPE and its tokenizer are those that llama.cpp itself computes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longrope.models.loading import load_model, open_model
from tests.models.gguf_models import FAMILIES, VOCABULARY, model_of, save_gguf, token_ids

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("tests.export.gguf.llama_cpp")

EXACT = 1e-3  # nats, for float32 weights and cache


def log_probabilities(model, ids: list[int]) -> Tensor:
    """log p(next token) after every prefix: float64 (T, V)."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def worst(path: Path, model, n_ctx: int, lengths: list[int]) -> float:
    """The largest difference of a log-probability between `model` and llama.cpp on `path`, in nats."""
    server, ids = llama_cpp.serve(path, n_ctx), token_ids(max(lengths))
    found = torch.stack([llama_cpp.next_token(server, ids[:length], VOCABULARY) for length in lengths])
    ours = torch.stack([log_probabilities(model, ids[:length])[-1] for length in lengths])
    return float((found - ours).abs().max())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_logits_are_llama_cpp_s(architecture, tmp_path):
    original = model_of(architecture)
    path = save_gguf(tmp_path / "model.gguf", architecture, model=original)
    loaded = open_model(path)
    assert loaded.model.dtype == torch.float32
    ids = token_ids(200)
    torch.testing.assert_close(log_probabilities(loaded.model, ids), log_probabilities(original, ids))
    assert worst(path, loaded.model, 256, [1, 20, 200]) < EXACT


def test_it_can_be_saved(tmp_path):
    path = save_gguf(tmp_path / "model.gguf", quantise=gguf.GGMLQuantizationType.Q8_0)
    loaded = open_model(path)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = token_ids(100)
    assert torch.equal(log_probabilities(again, ids), log_probabilities(load_model(str(path)), ids))
    assert not hasattr(again.config, "quantization_config")
    text = "Nobody had come home in 1862."
    assert open_model(tmp_path / "saved").tokenizer(text).input_ids == loaded.tokenizer(text).input_ids


def test_nothing_beside_the_file_is_read(tmp_path):
    """A folder of models, with files that transformers would take in place of the tokenizer and the weights."""
    path = save_gguf(tmp_path / "model.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "bos_token": "x"}')
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere"}')
    assert open_model(path).tokenizer("Hello").input_ids[0] == 0
