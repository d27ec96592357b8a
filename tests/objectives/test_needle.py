"""Only the answer's tokens are scored: the loss equals that of a plain forward on them, and on nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from longrope.data.needles import NeedleSamples
from longrope.data.samples import SampleOrigin
from longrope.models.install import geometry_of, install
from longrope.objectives.needle import NeedleObjective
from longrope.rope.scaling import RopeScaling, Window

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
    installed = install(model, RopeScaling.original(geometry_of(model)))
    rows = (SampleOrigin("book", "0" * 64, 0),) * 2
    samples = NeedleSamples(torch.randint(97, (2, LENGTH)), ANSWERS, (0.0, 1.0), ("a-b",) * 2, ("1",) * 2, rows)
    return NeedleObjective(installed, samples)


def with_ids(objective, row, position, value):
    ids = objective.samples.ids.clone()
    ids[row, position] = value
    return replace(objective, samples=replace(objective.samples, ids=ids))


WINDOW = Window(LENGTH, tuple(torch.linspace(1, 3, 16).tolist()))


def test_loss_is_that_of_the_answers(objective):
    total = 0.0
    with objective.installed.using(WINDOW) as model, torch.no_grad():
        for row, answer in zip(objective.samples.ids, ANSWERS, strict=True):
            logits = model(row[None, :-1]).logits[0]
            total += float(F.cross_entropy(logits[-answer:], row[-answer:], reduction="sum"))
    assert objective.loss(WINDOW) == pytest.approx(total / sum(ANSWERS), rel=1e-5)
    assert objective.token_passes == 2 * LENGTH


def test_no_other_label_counts(objective, monkeypatch):
    """Labels are changed behind the model's back: the input stays, so only a scored label can move the loss."""
    from longrope.objectives import needle

    real = needle.token_nll
    before = objective.answer_nlls(WINDOW)

    def scored_positions(model, ids, *, start):
        assert ids.shape[1] - 1 - start in ANSWERS  # nothing before the answer is ever scored
        return real(model, ids, start=start)

    monkeypatch.setattr(needle, "token_nll", scored_positions)
    assert all(torch.equal(a, b) for a, b in zip(before, objective.answer_nlls(WINDOW), strict=True))
    assert [len(nll) for nll in before] == list(ANSWERS)


def test_changing_an_answer_token_changes_the_loss(objective):
    before = objective.loss(WINDOW)
    for position in range(LENGTH - ANSWERS[0], LENGTH):
        other = (int(objective.samples.ids[0, position]) + 1) % 97
        assert with_ids(objective, 0, position, other).loss(WINDOW) != before


def test_the_window_is_applied(objective):
    assert objective.loss(WINDOW) != objective.loss(Window(LENGTH, (1.0,) * 16))
