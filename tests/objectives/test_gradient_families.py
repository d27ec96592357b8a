"""The gradient of both objectives in every model family that longrope installs into: along itself, by differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longrope.data.needles import NeedleSamples
from longrope.data.samples import SampleOrigin, Samples
from longrope.models.install import geometry_of, install
from longrope.objectives.needle import NeedleObjective
from longrope.objectives.perplexity import PerplexityObjective
from longrope.rope.scaling import RopeScaling, Window
from tests.models.families import FAMILIES, VOCABULARY, WINDOW, tiny_model

LENGTH = 96
ROWS = (SampleOrigin("book", "0" * 64, 0),) * 2
STEP = 1e-4  # along the normed gradient, in float32: the loss at both sides differs by 1e-4 of it and more
MIXTURES = ("mixtral", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["perplexity", "needle"])
def test_slope_along_the_gradient(kind, family):
    # A router that picks other experts makes the loss jump: here every expert has a part, by a smooth weight.
    model = tiny_model(family, **({"num_experts_per_tok": 4} if family in MIXTURES else {}))
    installed = install(model, RopeScaling.original(geometry_of(model, WINDOW)))
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    objective = (
        PerplexityObjective(installed, Samples(ids, ROWS, has_bos=False))
        if kind == "perplexity"
        else NeedleObjective(installed, NeedleSamples(ids, (3, 6), (0.0, 1.0), ("a-b",) * 2, ("1",) * 2, ROWS))
    )
    pairs = installed.scaling.geometry.pairs
    point = np.append(np.linspace(1.05, 2.5, pairs), 1.1)

    def window(at):
        return Window(LENGTH, tuple(at[:-1].tolist()), 0, float(at[-1]))

    _, gradient = objective.loss_and_gradient(window(point))
    slope = float(np.linalg.norm(gradient))
    assert slope > 1e-3
    direction = STEP * np.array(gradient) / slope
    ahead, behind = (objective.loss(window(point + sign * direction)) for sign in (1, -1))
    assert (ahead - behind) / (2 * STEP) == pytest.approx(slope, rel=1e-2)
