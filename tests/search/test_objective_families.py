"""The gradient of both objectives in every model family that longrope installs into, by differences of the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longrope.data.needles import NeedleSamples
from longrope.data.samples import SampleOrigin, Samples
from longrope.models.apply import apply_scaling, geometry_of
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.objective import NeedleObjective, PerplexityObjective
from tests.models.families import FAMILIES, VOCABULARY, WINDOW, tiny_model

LENGTH = 96
ROWS = (SampleOrigin("book", "0" * 64, 0),) * 2
STEP = 1e-4  # of a direction of length 1, in float32: what the loss changes by is far above its last bits
MIXTURES = ("mixtral", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["perplexity", "needle"])
def test_slopes(kind, family):
    """Along the gradient, along the attention factor, along two drawn directions that every number has a part in, and
    one of the slow pairs: the first sees wrong sizes, the others what is missing or belongs to another pair."""
    # A router that picks other experts makes the loss jump: here every expert has a part, by a smooth weight.
    model = tiny_model(family, **({"num_experts_per_tok": 4} if family in MIXTURES else {}))
    scaled = apply_scaling(model, RopeScaling.original(geometry_of(model, WINDOW)))
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    objective = (
        PerplexityObjective(scaled, Samples(ids, ROWS, has_bos=False))
        if kind == "perplexity"
        else NeedleObjective(scaled, NeedleSamples(ids, ROWS, False, (3, 6), (0.0, 1.0), ("a-b",) * 2, ("1",) * 2))
    )
    pairs = scaled.scaling.geometry.pairs
    point = np.append(np.linspace(1.05, 2.5, pairs), 1.1)

    def loss(at):
        return objective.loss(Window(LENGTH, tuple(at[:-1].tolist()), 0, float(at[-1])))

    gradient = np.array(objective.loss_and_gradient(Window(LENGTH, tuple(point[:-1].tolist()), 0, 1.1))[1])
    size = float(np.linalg.norm(gradient))
    assert size > 1e-3
    scale = np.abs(gradient) + 0.05 * size  # so that the small components count too
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (3, len(point)))
    slow = np.arange(len(point)) >= pairs // 2  # pairs that hardly turn: little slope, and steps may be long
    slow[-1] = False
    directions = [(gradient, STEP, size), (np.eye(len(point))[-1], STEP, size)]
    directions += [(row / scale, STEP, size) for row in signs[:2]]
    if family != "gemma3_text":  # whose base of 1e6 leaves nothing to measure; test_gradient.py has its components
        directions.append((signs[2] * slow, 60 * STEP, 10 * float(np.linalg.norm(gradient[slow]))))
    for direction, step, about in directions:
        unit = direction / np.linalg.norm(direction)
        numerical = (loss(point + step * unit) - loss(point - step * unit)) / (2 * step)
        assert numerical == pytest.approx(float(gradient @ unit), abs=2e-2 * about)
