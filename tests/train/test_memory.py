"""The least memory of a step: its parts, and the refusal."""

from __future__ import annotations

import pytest
import torch

from longrope.errors import LongRopeError
from longrope.train.config import FinetuneConfig
from longrope.train.memory import least_bytes, require_room
from tests.models.families import HIDDEN, LAYERS, tiny_model


def test_the_parts() -> None:
    model = tiny_model("llama")
    count = sum(parameter.numel() for parameter in model.parameters())
    settings = FinetuneConfig(length=1024, micro_batch=2, bf16=True)
    parts = least_bytes(model, settings, shards=1, packed=True)
    assert parts == {
        "weights": 4 * count,
        "gradients": 4 * count,
        "AdamW's moments": 8 * count,
        "inputs of the layers": LAYERS * 2 * 1024 * HIDDEN * 2,
        "mask between packed documents": 2 * 1024 * 1024,
    }
    sharded = least_bytes(model, settings, shards=4, packed=False)
    assert sharded["weights"] == count
    assert sharded["mask between packed documents"] == 0


def test_offload_and_frozen_weights_take_less() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    full = least_bytes(model, FinetuneConfig(length=64), shards=1, packed=False)
    less = least_bytes(model, FinetuneConfig(length=64, offload=True), shards=1, packed=False)
    assert less["inputs of the layers"] * LAYERS == full["inputs of the layers"]
    assert full["gradients"] < full["weights"]


def test_what_cannot_fit_is_refused_and_the_rest_is_not() -> None:
    model = tiny_model("llama")
    cpu = torch.device("cpu")
    require_room(model, FinetuneConfig(length=1024), cpu, shards=1, packed=True)
    with pytest.raises(LongRopeError, match="mask between packed documents") as error:
        require_room(model, FinetuneConfig(length=2**26), cpu, shards=1, packed=True)
    assert error.value.code == "out-of-memory"
