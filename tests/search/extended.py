"""A model that carries a scaling, for tests of recovery: trained for 8·L alone, stretched to 64·L without training."""

from __future__ import annotations

from dataclasses import replace

from longrope.models.loading import LoadedModel
from longrope.rope.closed_forms import pi, yarn
from longrope.rope.scaling import RopeScaling, Window
from tests.checkpoints import WINDOW

M = 1.4
TRAINED, REACH = 8 * WINDOW, 64 * WINDOW


def extended_from(loaded: LoadedModel) -> LoadedModel:
    windows = (
        Window(TRAINED, tuple(pi(loaded.geometry, TRAINED).tolist()), attention_factor=M),
        Window(REACH, tuple(yarn(loaded.geometry, REACH).tolist()), attention_factor=M),
    )
    return replace(
        loaded, checkpoint_scaling=RopeScaling(loaded.geometry, windows, {"data": {"document_sha256": ["e" * 64]}})
    )


def carried_by(loaded: LoadedModel) -> RopeScaling:
    assert loaded.checkpoint_scaling is not None
    return loaded.checkpoint_scaling
