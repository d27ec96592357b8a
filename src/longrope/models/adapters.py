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
        own_tokenizer = config.with_name("tokenizer_config.json").is_file()
        with_base = "" if _is_there(base) else ", with the folder or hub name of its base model for BASE"
        hint = f"merge it into the weights first{with_base}: {_command(name, base, own_tokenizer)}"
        if config.with_name(SCALING).is_file():
            hint += f" (and copy its {SCALING} there)"
    return LongRopeError(message, code="adapter", hint=hint)


def _command(name: str, base: str, own_tokenizer: bool) -> str:
    """The command that merges an adapter with peft into the folder `merged`, with its tokenizer or that of its base.

    peft itself loads a base that is there, with a vocabulary as large as the adapter's own tokenizer.
    """
    if _is_there(base):
        imports, merged = "AutoPeftModelForCausalLM as M", f"M.from_pretrained({name!r})"
        of_base = ""
    else:
        base = "BASE"
        imports, of_base = "PeftModel as P", "AutoModelForCausalLM as M, "
        merged = f"P.from_pretrained(M.from_pretrained('BASE'), {name!r})"
    code = (
        f"from peft import {imports}; from transformers import {of_base}AutoTokenizer as T; "
        f"{merged}.merge_and_unload().save_pretrained('merged'); "
        f"T.from_pretrained({(name if own_tokenizer else base)!r}).save_pretrained('merged')"
    )
    return f"python -c {shlex.quote(code)}"


def _is_there(base: str) -> bool:
    """True if transformers can look for `base`: a folder that exists, or a name of the form of the hub's."""
    of_the_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    return of_the_hub or (bool(base) and Path(base).expanduser().is_dir())


def _text(stated: dict[str, Any], key: str) -> str:
    value = stated.get(key)
    return value if isinstance(value, str) else ""
