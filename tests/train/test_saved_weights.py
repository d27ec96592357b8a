"""What a run saves of weights that are one and the same, and which loss it says it was trained with."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from longrope.train.finetune import finetune
from tests.checkpoints import save_checkpoint
from tests.train.runs import open_fresh, training, write_texts, yarn_scaling


def test_tied_weights_are_saved_once_in_another_dtype_too(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    loaded, texts = open_fresh(source), write_texts(tmp_path / "texts")
    settings = training(steps=1, save_dtype="bfloat16")
    result = finetune(loaded, yarn_scaling(loaded), [str(texts)], tmp_path / "run", settings)
    saved = load_file(result.checkpoint / "model.safetensors")
    assert saved.keys() == load_file(source / "model.safetensors").keys()
    assert "lm_head.weight" not in saved
    assert result.summary["identity"]["loss"] == "chunked"
