"""SmolLM2-135M-Instruct, a model that somebody else trained and quantised: opened, it is what llama.cpp computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longrope.data.books import shipped_books
from longrope.data.sources import read_all
from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel, open_model
from scripts.smollm2 import fetch

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("tests.export.gguf.llama_cpp")

pytestmark = pytest.mark.slow
VOCABULARY = 49152


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return fetch()
    except LongRopeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded(path) -> LoadedModel:
    return open_model(path)


@pytest.fixture(scope="module")
def text() -> str:
    return read_all([f"book:{shipped_books()[0].name}"])[0].text[100_000:140_000]


def test_what_the_file_says(loaded):
    geometry = loaded.geometry
    assert (geometry.rotary_dim, geometry.base, geometry.original_length) == (64, 100_000.0, 8192)
    assert loaded.checkpoint_scaling is None
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008


def test_the_tokens_of_a_book(path, loaded, text):
    assert loaded.tokenizer(text).input_ids == llama_cpp.tokenize(llama_cpp.serve(path, 256), text)


def differences(path: Path, loaded: LoadedModel, text: str, lengths: list[int]) -> tuple[float, float]:
    """The largest difference of a log-probability, and the largest divergence, in nats."""
    ids = loaded.tokenizer(text).input_ids[: max(lengths)]
    with torch.inference_mode():
        ours = loaded.model(torch.tensor([ids])).logits[0, [length - 1 for length in lengths]].double().log_softmax(-1)
    server = llama_cpp.serve(path, 2048)
    theirs = torch.stack([llama_cpp.next_token(server, ids[:length], VOCABULARY, reuse=True) for length in lengths])
    return float((theirs - ours).abs().max()), float((theirs.exp() * (theirs - ours)).sum(-1).max())


def test_the_distributions_of_the_quantised_file(path, loaded, text):
    """llama.cpp rounds activations to 8 bits where weights are quantised."""
    assert differences(path, loaded, text, [5, 100, 1000])[1] < 0.03


def test_the_logits_of_the_same_weights_in_float32(path, loaded, text, tmp_path):
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "exact.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], items)
    for tensor in reader.tensors:
        whole = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        writer.add_tensor(tensor.name, whole.astype(np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    assert differences(tmp_path / "exact.gguf", loaded, text, [5, 100, 1000])[0] < 2e-3
