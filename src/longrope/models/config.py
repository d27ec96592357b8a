"""The settings of loading a model and of its memory. Light to import."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longrope.settings import Settings
from longrope.units import Length

LayerInputs = Literal["keep", "offload", "recompute"]
"""The ways to store the inputs of layers between forward and backward pass (`layer_inputs.py`)."""
USABLE = 0.9
"""The share of a memory that is planned with; the rest is the driver's, the kernels' and fragmentation."""


class LoadOptions(Settings):
    """The options of loading a model from a folder or the hub."""

    dtype: str = "auto"
    """float32, bfloat16, float16, float64, `checkpoint` (its own), or `auto`: float32 on a CPU, its own elsewhere."""
    device: str = "auto"
    """The device to compute on: `auto` (CUDA, XPU or the CPU, and for a model too large for it all GPUs and main
    memory), cpu, cuda, cuda:1, …"""
    attn_implementation: str | None = None
    """The attention of transformers to use: sdpa, flash_attention_2, eager, …; or blocked, our own, the fastest in
    bfloat16 on CPUs without AMX."""
    original_length: Length | None = Field(None)
    """The window that the model was trained with, where its config is wrong."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint or with a task file of lm-eval."""
