"""What is refused while a scaling with several windows is installed: generation that would be wrong across them.

Each raises before any work. What can only be seen later, such as a cache that does not fit, `switch.py` refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.window_rule import switches

if TYPE_CHECKING:
    from longrope.models.install import Installed

_RIGHT_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


class Entrance:
    """In the place of a method that generates: refuses, before any work, what would be wrong across windows."""

    def __init__(self, installed: Installed, own: Any, check: Callable[..., None]) -> None:
        self.installed, self.own, self.check = installed, own, check
        self.__wrapped__ = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if switches(self.installed):
            self.check(self.installed.model, *args, **kwargs)
        return self.own(*args, **kwargs)


def check_mode(
    model: PreTrainedModel, inputs: Any = None, generation_config: GenerationConfig | None = None, *_: Any, **given: Any
) -> None:
    """Raise LongRopeError unless `generate` takes one token at a time, after a prompt read under one window."""
    config = GenerationConfig()
    for stated in (vars(model.generation_config), vars(generation_config) if generation_config else {}, given):
        vars(config).update({name: value for name, value in stated.items() if value is not None})
    mode = str(config.get_generation_mode(given.get("assistant_model")).value)
    if mode not in _RIGHT_MODES:
        raise _not_across_windows(mode.replace("_", " "))
    if config.guidance_scale not in (None, 1):
        raise _not_across_windows("guidance (a second, unconditional text with a cache of its own)")
    if config.prefill_chunk_size is not None:
        raise LongRopeError(
            "expected no prefill_chunk_size: its chunks would be read under windows of their own; use "
            "longrope.generation(..., prefill_chunk=...)"
        )
    if config.cache_implementation not in (None, "dynamic", "hybrid"):  # transformers itself ignores hybrid
        raise LongRopeError(
            "expected a dynamic cache for generation across windows, found cache_implementation "
            f"{config.cache_implementation!r}; leave it unset"
        )


def refuse_batching(*_: Any, **__: Any) -> None:
    raise _not_across_windows("continuous batching")


def _not_across_windows(what: str) -> LongRopeError:
    return LongRopeError(
        f"{what} is not right across windows, where the cache has to change between two tokens: generate greedily, by "
        "sampling or with beams, or fix one window"
    )
