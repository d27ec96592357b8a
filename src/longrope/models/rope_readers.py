"""The keys of the RoPE dictionary that a family's model reads outside of its rotary module, found by watching it read.

The rotary module is replaced by a scaling, but other code of a model may read the same dictionary: DeepSeek's attention
scales its softmax by `mscale_all_dim` and `factor`, Ministral's its queries by `llama_4_scaling_beta` and
`original_max_position_embeddings`. A config that states a new scaling has to keep their meaning. No list of families is
kept: the model is built without weights, and run, with a dictionary that records which keys are looked up, and by which
code.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from longrope.rope.geometry import text_config

_TOKENS = 4


class _Watched(dict[str, Any]):
    """A RoPE dictionary that adds to `read` every key that is looked up by code other than RoPE's own."""

    def __init__(self, values: Mapping[str, Any], read: set[str]) -> None:
        super().__init__(values)
        self.read = read

    def _note(self, key: object) -> None:
        code = sys._getframe(2).f_code
        own = "Rotary" in code.co_qualname or code.co_filename.endswith("modeling_rope_utils.py")
        if isinstance(key, str) and "/models/" in code.co_filename.replace("\\", "/") and not own:
            self.read.add(key)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watched:
        return _Watched(deepcopy(dict(self), memo), self.read)


def keys_read_by_attention(config: Any, *, trust_remote_code: bool = False) -> frozenset[str]:
    """The keys of the RoPE dictionary of `config` that the model reads outside of its rotary module.

    The model is built on the meta device and run on a few tokens there; where a family cannot run so to its end, the
    keys that were read until then count.
    """
    watched, read = deepcopy(config), set[str]()
    text = text_config(watched)
    entries = getattr(text, "rope_parameters", None)
    if not isinstance(entries, dict):
        return frozenset()
    text.rope_parameters = _watch(entries, read)
    with suppress(Exception), torch.device("meta"), torch.no_grad():  # foreign code, which may raise anything
        model = AutoModelForCausalLM.from_config(watched, trust_remote_code=trust_remote_code)
        # A mask of four dimensions is taken as it is; making one would look at values, which there are none of here.
        mask = torch.ones(1, 1, _TOKENS, _TOKENS, dtype=torch.bool)
        ids, positions = (torch.zeros(1, _TOKENS, dtype=torch.long) for _ in range(2))
        model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    return frozenset(read)


def _watch(entries: dict[str, Any], read: set[str]) -> dict[str, Any]:
    nested = {name: _Watched(value, read) for name, value in entries.items() if isinstance(value, dict)}
    return dict(entries) | nested if nested else _Watched(entries, read)
