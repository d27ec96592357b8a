"""Adapters of peft in the place of a model: finds them, and says how to merge one, because updates alone are no
model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from transformers.utils.peft_utils import find_adapter_config_file

from longrope.errors import LongRopeError
from longrope.run_files import ADAPTER, SCALING
from longrope.storage import read_json

ADAPTER_CONFIG = "adapter_config.json"
_NOT_MERGED = ("ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
"""Kinds of peft that add to the text or to the attention: no weights of a plain model compute the same."""


def adapter_config_of(folder: Path) -> Path | None:
    """The adapter_config.json of `folder`, or of the adapter that a fine-tuning left in it; None without one."""
    for path in (folder / ADAPTER_CONFIG, folder / ADAPTER / ADAPTER_CONFIG):
        if path.is_file():
            return path
    return None


def hub_adapter(name: str, offline: bool) -> Path | None:
    """The adapter_config.json of the hub's `name`, which transformers would follow to another model; None without one.

    `offline` looks at earlier downloads only.
    """
    try:
        found = find_adapter_config_file(name, local_files_only=offline)
    except Exception:  # whatever is wrong with the name, the loading of the model says so
        return None
    return None if found is None else Path(found)


def adapter_error(config: Path, name: str) -> LongRopeError:
    """The error for the adapter with this adapter_config.json in place of a model: what it is, and how to merge it.

    `name` is what peft is to load it from: its folder or hub name.
    """
    try:
        stated = read_json(config)
    except LongRopeError:
        stated = {}
    base, kind = _text(stated, "base_model_name_or_path"), _text(stated, "peft_type")
    of_base = f" for the model {base}" if base else ""
    message = f"{name} is an adapter ({ADAPTER_CONFIG}){of_base}, not a model"
    if kind.upper() in _NOT_MERGED:
        hint = f"one of the kind {kind} cannot be merged into weights; give a model"
    elif {path.suffix for path in config.parent.glob("adapter_model.*")} == {".bin"}:
        hint = "its weights are pickled, which can run code: get them as safetensors, then merge them into the model"
    else:
        hint = f"merge it into the weights first: {_command(name, base)}"
        if config.with_name(SCALING).is_file():
            hint += f" (and copy its {SCALING} there)"
    return LongRopeError(message, code="adapter", hint=hint)


def _command(name: str, base: str) -> str:
    """The command that merges an adapter with peft into the folder `merged`, with the tokenizer of its base."""
    code = (
        "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
        f"M.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged'); "
        f"T.from_pretrained({(base or name)!r}).save_pretrained('merged')"
    )
    return f"python -c {shlex.quote(code)}"


def _text(stated: dict[str, Any], key: str) -> str:
    value = stated.get(key)
    return value if isinstance(value, str) else ""
