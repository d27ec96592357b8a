"""A model that accelerate spread over devices computes the same numbers: here one layer lies on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from longrope.models import chunked
from longrope.models.apply import geometry_of, scaled
from longrope.models.chunked import checkpointed_layers
from longrope.models.fingerprint import fingerprint
from longrope.models.generation.generate import generate
from longrope.models.scoring import token_nll
from longrope.rope.scaling import RopeScaling
from tests.models.families import VOCABULARY, WINDOW, logits, tiny_model, tokens

IDS = tokens(100)


def scaling_of(model: PreTrainedModel) -> RopeScaling:
    geometry = geometry_of(model)
    return RopeScaling.extended(geometry, 4 * WINDOW, [3.0] * geometry.pairs)


def numbers(model: PreTrainedModel) -> list[Tensor]:
    """Losses, generated tokens and the gradient of the factors."""
    scaling = scaling_of(model)
    model.requires_grad_(False)
    factors = torch.tensor(scaling.windows[-1].factors, dtype=torch.float64, requires_grad=True)
    with scaled(model, scaling) as handle:
        with torch.no_grad():
            losses = token_nll(model, IDS)
        found = generate(handle, IDS[:, :60], max_new_tokens=8, eos_token_id=())
        with checkpointed_layers(model), handle.using(scaling.windows[-1], factors):
            token_nll(model, IDS).mean().backward()
    assert factors.grad is not None
    return [losses, found, factors.grad]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_same_numbers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MLP_CHUNK", 10)
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", 7 * VOCABULARY)
    whole, model = tiny_model(family), tiny_model(family)
    places = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    spread = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "disk", force_hooks=True)
    assert {parameter.device.type for parameter in spread.parameters()} == {"cpu", "meta"}
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(numbers(spread), numbers(whole), strict=True))
    assert fingerprint(spread) == fingerprint(whole)
    with scaled(spread, scaling_of(whole)):
        spread.save_pretrained(tmp_path / "saved")
    with scaled(whole, scaling_of(whole)):
        expected = logits(whole, IDS)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), IDS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
