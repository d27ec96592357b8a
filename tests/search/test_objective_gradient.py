"""Gradients in factors and attention factor against central differences in float64, for every kind of family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from longrope.data.needles import NeedleSamples
from longrope.data.samples import SampleOrigin, Samples
from longrope.models import chunked
from longrope.models.apply import apply_scaling, geometry_of
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.objective import NeedleObjective, PerplexityObjective
from tests.checkpoints import VOCABULARY, save_checkpoint

LENGTH = 96
FAMILIES = ["LlamaConfig", "Phi3Config", "StableLmConfig", "CohereConfig", "GPTNeoXConfig", "Gemma3TextConfig"]
ROWS = (SampleOrigin("book", "0" * 64, 0),) * 2


def _norm(module, x):
    """The family's own norm in float64; its own code goes through float32 whatever the model's dtype."""
    name = type(module).__name__
    if name == "CohereLayerNorm":
        x = x - x.mean(-1, keepdim=True)
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    weight = 1.0 + module.weight if name.startswith("Gemma") else module.weight
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def in_float64(model, monkeypatch):
    for norm in {type(module) for module in model.modules()}:
        if norm.__name__.endswith("RMSNorm") or norm.__name__ == "CohereLayerNorm":
            monkeypatch.setattr(norm, "forward", _norm)


def objective_of(kind, config_class, tmp_path, dtype=torch.float64):
    folder = save_checkpoint(tmp_path / "model", config_class)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    scaled = apply_scaling(model, RopeScaling.original(geometry_of(model, 64)))
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    if kind == "perplexity":
        return PerplexityObjective(scaled, Samples(ids, ROWS, has_bos=False))
    return NeedleObjective(scaled, NeedleSamples(ids, ROWS, False, (3, 6), (0.0, 1.0), ("a-b",) * 2, ("1",) * 2))


def ramp(objective, attention_factor=1.1):
    pairs = objective.scaled.scaling.geometry.pairs
    return Window(LENGTH, tuple(np.linspace(1.05, 2.5, pairs).tolist()), 0, attention_factor)


@pytest.mark.parametrize("config_class", FAMILIES)
@pytest.mark.parametrize("kind", ["perplexity", "needle"])
def test_against_central_differences(kind, config_class, tmp_path, monkeypatch):
    objective = objective_of(kind, config_class, tmp_path)
    plain = objective.loss(ramp(objective))
    in_float64(objective.scaled.model, monkeypatch)
    assert objective.loss(ramp(objective)) == pytest.approx(plain, rel=1e-5)  # still the same model
    window = ramp(objective)
    loss, gradient = objective.loss_and_gradient(window)
    assert loss == pytest.approx(objective.loss(window), rel=1e-12)
    point = np.array([*window.factors, window.attention_factor])
    # Cohere rotates in float32 whatever the dtype, which is noise in the differences.
    steps, relative, absolute = (1e-3, 1e-3, 2e-6) if config_class == "CohereConfig" else (1e-5, 1e-6, 1e-9)
    for index in range(len(point)):
        sides = []
        for sign in (1, -1):
            moved = point.copy()
            moved[index] += sign * steps
            sides.append(objective.loss(Window(LENGTH, tuple(moved[:-1].tolist()), 0, float(moved[-1]))))
        numerical = (sides[0] - sides[1]) / (2 * steps)
        assert gradient[index] == pytest.approx(numerical, rel=relative, abs=absolute), index


def test_start_tokens_take_no_part(tmp_path):
    objective = objective_of("perplexity", "LlamaConfig", tmp_path)
    window = Window(LENGTH, ramp(objective).factors, start_tokens=LENGTH)
    _, gradient = objective.loss_and_gradient(window)
    assert gradient[:-1] == (0.0,) * (len(gradient) - 1)  # every position keeps its original angle
    assert gradient[-1] != 0.0


def test_rows_add_up(tmp_path):
    objective = objective_of("needle", "LlamaConfig", tmp_path)
    window = ramp(objective)
    loss, gradient = objective.loss_and_gradient(window)
    parts = [objective.loss_and_gradient(window, [row]) for row in (0, 1)]
    assert loss == pytest.approx((3 * parts[0][0] + 6 * parts[1][0]) / 9, rel=1e-6)
    assert gradient == pytest.approx(
        [(3 * a + 6 * b) / 9 for a, b in zip(parts[0][1], parts[1][1], strict=True)], rel=1e-4, abs=1e-7
    )


def test_weights_get_no_gradient_and_keep_their_flags(tmp_path):
    objective = objective_of("perplexity", "LlamaConfig", tmp_path, torch.float32)
    model = objective.scaled.model
    next(model.parameters()).requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    objective.loss_and_gradient(ramp(objective))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all("forward" not in vars(module) for module in model.modules())


def test_chunks_do_not_change_the_gradient(tmp_path, monkeypatch):
    objective = objective_of("perplexity", "LlamaConfig", tmp_path)
    _, whole = objective.loss_and_gradient(ramp(objective))
    monkeypatch.setattr(chunked, "MLP_CHUNK", 10)
    monkeypatch.setattr(chunked, "BACKWARD_BUDGET", 0)
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", 7 * VOCABULARY)
    _, pieces = objective.loss_and_gradient(ramp(objective))
    assert pieces == pytest.approx(whole, rel=1e-4, abs=1e-7)


def test_layers_are_computed_again_and_not_kept(tmp_path):
    """Without checkpoints every layer's MLP runs once; with them, once more in the backward pass."""
    objective = objective_of("perplexity", "LlamaConfig", tmp_path, torch.float32)
    calls = []
    for layer in objective.scaled.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    objective.loss(ramp(objective), [0])
    scored = len(calls)
    objective.loss_and_gradient(ramp(objective), [0])
    assert len(calls) - scored == 2 * scored
