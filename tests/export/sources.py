"""Tiny models to export, on disk, and scalings for them: a window of 64 tokens extended to 256."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from longrope.errors import LongRopeError
from longrope.export.config import ExportConfig
from longrope.export.export import ExportResult, export_checkpoint
from longrope.models.apply import apply_scaling
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from tests.models.families import VOCABULARY, WINDOW, tiny_model

TARGET = 4 * WINDOW
SU = (4 / 3) ** 0.5  # √(1 + ln 4/ln 64)


def slow(*values: object) -> list[ParameterSet]:
    """`values` of a parametrised test for the slow tier."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def save_model(folder: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A random model of `family` whose norms and biases are random too."""
    tiny_model(family, **overrides).to(dtype).save_pretrained(folder)
    return folder


def scaling_of(folder: Path, attention_factor: float = 1.0) -> RopeScaling:
    """Two windows, factors 1 and 1 … 4.5."""
    geometry = RopeGeometry.from_config(AutoConfig.from_pretrained(folder), original_length=WINDOW)
    factors = torch.linspace(1.0, 4.5, geometry.pairs, dtype=torch.float64)
    return RopeScaling.extended(geometry, TARGET, factors, attention_factor=attention_factor)


def export(model: Path | str, scaling: RopeScaling | Path | None, output: Path, **settings: Any) -> ExportResult:
    """`export_checkpoint` with `settings` of its config."""
    return export_checkpoint(model, scaling, output, config=ExportConfig(**settings))


def refusal(job: Callable[..., object], *arguments: Any, **settings: Any) -> LongRopeError:
    """The error that `job` raises."""
    with pytest.raises(LongRopeError) as error:
        job(*arguments, **settings)
    return error.value


def ids(length: int) -> Tensor:
    """(1, length)"""
    return (torch.arange(length) * 37 % VOCABULARY)[None]


def plain_logits(folder: Path, *lengths: int) -> list[Tensor]:
    """The logits of stock transformers from `folder` for texts of `lengths` tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return [model(ids(length), use_cache=False).logits for length in lengths]


def scaled_logits(folder: Path, scaling: RopeScaling, *lengths: int) -> list[Tensor]:
    """The logits of `folder` with `scaling` installed."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    apply_scaling(model, scaling)
    with torch.inference_mode():
        return [model(ids(length), use_cache=False).logits for length in lengths]
