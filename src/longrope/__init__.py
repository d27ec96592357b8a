"""longrope: a checkpoint of any RoPE language model in, one with a longer context window out, and the evidence.

The names below are loaded when they are first used, so that `import longrope` and `longrope --help` stay quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longrope.models.cache import prefill
    from longrope.models.generate import generate, generation
    from longrope.models.install import install, uninstall
    from longrope.models.load import load_model, load_tokenizer
    from longrope.models.scoring import token_nll
    from longrope.pipeline.standalone import LongRoPEModel, load_data
    from longrope.rope.geometry import RopeGeometry
    from longrope.rope.presets import preset
    from longrope.rope.scaling import RopeScaling, Window

__version__ = version("longrope")

_HOMES = {
    "LongRoPEModel": "pipeline.standalone",
    "RopeGeometry": "rope.geometry",
    "RopeScaling": "rope.scaling",
    "Window": "rope.scaling",
    "generate": "models.generate",
    "generation": "models.generate",
    "install": "models.install",
    "load_data": "pipeline.standalone",
    "load_model": "models.load",
    "load_tokenizer": "models.load",
    "prefill": "models.cache",
    "preset": "rope.presets",
    "token_nll": "models.scoring",
    "uninstall": "models.install",
}

__all__ = [
    "LongRoPEModel",
    "RopeGeometry",
    "RopeScaling",
    "Window",
    "__version__",
    "generate",
    "generation",
    "install",
    "load_data",
    "load_model",
    "load_tokenizer",
    "prefill",
    "preset",
    "token_nll",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longrope' has no attribute {name!r}")
    return getattr(import_module(f"longrope.{_HOMES[name]}"), name)
