"""Rows that processes share in training: who gets which, what they take, and that two train as one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longrope.errors import LongRopeError
from longrope.models.context_parallel import share
from longrope.train.config import FinetuneConfig
from longrope.train.finetune import packed_rows, training_windows
from longrope.train.memory import least_bytes
from longrope.train.trainer import StepRows, training_arguments
from tests.models.families import tiny_model
from tests.train.runs import open_fresh, torchrun, training, write_texts, yarn_scaling


def test_ranks_get_the_shares_of_the_same_rows(checkpoint: Path, tmp_path: Path) -> None:
    """Data parallelism gives micro-batch k·W + r to rank r; here 4 ranks, 2 of which share a row, 2 rows at once."""
    loaded = open_fresh(checkpoint)
    settings = training(steps=2, batch=4, micro_batch=2, mix="short,long")
    windows = training_windows(loaded, yarn_scaling(loaded), settings)
    rows = packed_rows(loaded, [write_texts(tmp_path / "texts")], settings, windows)
    whole, shared = StepRows(rows, 4), StepRows(rows, 4, group=2, processes=2)
    assert (len(whole), len(shared)) == (8, 16)
    for turn in range(2):
        for rank in range(4):
            for within in range(2):
                given = shared[(turn * 4 + rank) * 2 + within]
                row = whole[(turn * 2 + rank // 2) * 2 + within]
                for name in ("input_ids", "position_ids", "shift_labels"):
                    assert torch.equal(given[name], share(row[name], 2, rank % 2))
                assert torch.equal(given["row_position_ids"], row["position_ids"])
                assert (given["part"], given["weight"]) == (row["part"], row["weight"])


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError) as error:
        FinetuneConfig(length=258, context_parallel=2)
    assert error.value.code == "indivisible-row"
    with pytest.raises(LongRopeError) as error:
        training_arguments(training(context_parallel=2), tmp_path, cpu=True)
    assert error.value.code == "wrong-processes"


def test_a_share_needs_less_memory() -> None:
    model = tiny_model("llama")
    one, two = (
        least_bytes(model, FinetuneConfig(length=1024, context_parallel=count), shards=1, packed=True)
        for count in (1, 2)
    )
    for name in ("inputs of the layers", "mask between packed documents"):
        assert two[name] * 2 == one[name]
    config = model.config
    heads = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert two["keys and values of a layer"] == 1024 * heads * 4
    assert "keys and values of a layer" not in one


@pytest.mark.slow
def test_shares_add_up_and_documents_stay_apart(tmp_path: Path) -> None:
    """Two processes, float64, six families with grouped heads, sliding windows, tied and scaled heads."""
    ended = torchrun("tests.train.shares", 2, tmp_path / "found.json")
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert len(result["found"]) == 24
    for name, found in result["found"].items():
        assert found["loss"] < 1e-12, name
        assert found["gradient"] < 1e-6, name  # some norms compute in float32
        if "others" in found:
            assert found["others"] == 0.0, name
            assert found["own document"] > 0.1, name
    eager, wrong = result["refused"]
    assert "found eager" in eager
    assert "cannot be computed in shares of a row: hidden states differ" in wrong
