"""Only the result's tokens are scored: the loss equals that of a plain forward on them, and on nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from longrope.data.needles import NeedleSamples
from longrope.data.samples import SampleOrigin
from longrope.models import scoring
from longrope.models.apply import apply_scaling, geometry_of
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.objective import NeedleObjective

LENGTH, ANSWERS = 90, (5, 8)


@pytest.fixture
def objective():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    scaled = apply_scaling(model, RopeScaling.original(geometry_of(model)))
    rows = (SampleOrigin("book", "0" * 64, 0),) * 2
    samples = NeedleSamples(torch.randint(97, (2, LENGTH)), rows, False, ANSWERS, (0.0, 1.0), ("a-b",) * 2, ("1",) * 2)
    return NeedleObjective(scaled, samples)


def with_ids(objective, row, position, value):
    ids = objective.samples.ids.clone()
    ids[row, position] = value
    return replace(objective, samples=replace(objective.samples, ids=ids))


WINDOW = Window(LENGTH, tuple(torch.linspace(1, 3, 16).tolist()))


def test_loss_is_that_of_the_answers(objective):
    total = 0.0
    with objective.scaled.using(WINDOW) as model, torch.no_grad():
        for row, result in zip(objective.samples.ids, ANSWERS, strict=True):
            logits = model(row[None, :-1]).logits[0]
            total += float(F.cross_entropy(logits[-result:], row[-result:], reduction="sum"))
    assert objective.loss(WINDOW) == pytest.approx(total / sum(ANSWERS), rel=1e-5)


@pytest.mark.parametrize("row", [0, 1])
def test_only_labels_of_the_answer_count(objective, row, monkeypatch):
    """Labels are changed behind the model's back, its input stays: only an result's label may move the loss."""
    before = objective.loss(WINDOW)
    real = scoring.F.cross_entropy
    ids = objective.samples.ids[row]
    scored = set()
    for position in range(LENGTH):

        def with_other_label(logits, target, position=position, **options):
            # Targets are the last tokens of a row; the changed one is found by where it stands from the end.
            at = len(target) - (LENGTH - position)
            if at >= 0 and torch.equal(target, ids[-len(target) :]):
                target = target.clone()
                target[at] = (target[at] + 1) % 97
            return real(logits, target, **options)

        monkeypatch.setattr(scoring.F, "cross_entropy", with_other_label)
        if objective.loss(WINDOW) != before:
            scored.add(position)
    assert scored == set(range(LENGTH - ANSWERS[row], LENGTH))


def test_changing_an_answer_token_changes_the_loss(objective):
    before = objective.loss(WINDOW)
    for position in range(LENGTH - ANSWERS[0], LENGTH):
        other = (int(objective.samples.ids[0, position]) + 1) % 97
        assert with_ids(objective, 0, position, other).loss(WINDOW) != before


def test_the_window_is_applied(objective):
    assert objective.loss(WINDOW) != objective.loss(Window(LENGTH, (1.0,) * 16))
