"""The benchmark of perplexity in llama.cpp: the same RoPE by two ways gives the same loss, and none gives another."""

from __future__ import annotations

import pytest
import torch

from longrope.models.loading import open_model
from tests.models.gguf_models import WINDOW, save_gguf, token_ids

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


def test_yarn_by_llama_cpp_and_by_factors(tmp_path):
    from benchmarks import gguf_perplexity

    path = str(save_gguf(tmp_path / "model.gguf"))
    length = 2 * WINDOW
    scaling = gguf_perplexity.scaling_of("yarn", path, length)
    texts = [token_ids(length, seed) for seed in (1, 2)]
    found = gguf_perplexity.run(path, scaling, length, texts, tokens=6, threads=1)
    assert list(found) == ["none", "llama.cpp yarn", "longrope"]
    assert found["longrope"]["tokens"] == found["none"]["tokens"] > 0
    assert found["longrope"]["nll"] == pytest.approx(found["llama.cpp yarn"]["nll"], abs=2e-3)
    assert found["none"]["nll"] != pytest.approx(found["longrope"]["nll"], abs=4e-3)
    # The loss of our own model, on the tokens that llama.cpp gives a probability for.
    model = open_model(path).model
    with torch.inference_mode():
        losses = -model(torch.tensor(texts)).logits.double().log_softmax(-1)
    ours = [
        float(losses[row, length - 7 + place, texts[row][length - 6 + place]]) for row in (0, 1) for place in range(6)
    ]
    theirs = [loss for text in found["none"]["losses"] for loss in text]
    assert [mine for mine, other in zip(ours, theirs, strict=True) if other is not None] == pytest.approx(
        [other for other in theirs if other is not None], abs=2e-3
    )
