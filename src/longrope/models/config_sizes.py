"""The sizes in a config.json, checked before a class of transformers builds lists and layers of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope.checks import shown
from longrope.errors import LongRopeError
from longrope.storage import read_json

_LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**40,
}
"""Name -> its largest value: some hundred times that of any model that was published."""


def check_sizes(values: Mapping[str, Any], where: str) -> None:
    """Raise LongRopeError (`invalid-config`) for a size in the content of a config.json that no model can have.

    A size may be absent, null, or a list with one for each layer. `where` names the file.
    """
    inner = values.get("text_config")
    for part in (values, inner) if isinstance(inner, Mapping) else (values,):
        for name, largest in _LARGEST.items():
            found = part.get(name)
            sizes = found if isinstance(found, list) and found else [found]
            for size in sizes if found is not None else ():
                if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= largest:
                    raise LongRopeError(
                        f"expected {name} of {where} to be a whole number of 1 to {largest}; found {shown(size)}",
                        code="invalid-config",
                    )


def check_config_file(path: Path) -> None:
    """`check_sizes` of a config.json, where it is there and holds an object; the loader says what else is wrong."""
    try:
        whole = read_json(path)
    except LongRopeError:
        return
    check_sizes(whole, str(path))
