"""longrope: a checkpoint of any RoPE language model in, one with a longer context window out, and the evidence.

The names below are loaded when they are first used, so that `import longrope` and `longrope --help` stay quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longrope.models.apply import apply_scaling, remove_scaling
    from longrope.models.generation.cache import prefill
    from longrope.models.generation.generate import generate, generation
    from longrope.models.loading import load_model, load_tokenizer
    from longrope.models.scoring import token_nll
    from longrope.rope.geometry import RopeGeometry
    from longrope.rope.presets import preset
    from longrope.rope.scaling import RopeScaling, Window
    from longrope.standalone.api import LongRoPEModel, load_data

__version__ = version("longrope")

_HOMES = {
    "LongRoPEModel": "standalone.api",
    "RopeGeometry": "rope.geometry",
    "RopeScaling": "rope.scaling",
    "Window": "rope.scaling",
    "generate": "models.generation.generate",
    "generation": "models.generation.generate",
    "apply_scaling": "models.apply",
    "load_data": "standalone.api",
    "load_model": "models.loading",
    "load_tokenizer": "models.loading",
    "prefill": "models.generation.cache",
    "preset": "rope.presets",
    "token_nll": "models.scoring",
    "remove_scaling": "models.apply",
}

__all__ = [
    "LongRoPEModel",
    "RopeGeometry",
    "RopeScaling",
    "Window",
    "__version__",
    "apply_scaling",
    "generate",
    "generation",
    "load_data",
    "load_model",
    "load_tokenizer",
    "prefill",
    "preset",
    "remove_scaling",
    "token_nll",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longrope' has no attribute {name!r}")
    return getattr(import_module(f"longrope.{_HOMES[name]}"), name)
