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
_OTHER_NAMES = dict.fromkeys(("n_layer", "n_layers", "num_layers", "depth"), 10_000)
_OTHER_NAMES |= dict.fromkeys(("n_embd", "d_model", "embed_dim"), 2**20)
"""Names that the same sizes have in some families, and in the models of images and sound beside a language model."""


def check_sizes(values: Mapping[str, Any], where: str) -> None:
    """Raise LongRopeError (`invalid-config`) for a size in the content of a config.json that no model can have.

    A size may be absent, null, or a list with one for each layer. `where` names the file. Of the parts inside that are
    no language model, which may lack a size or have 0, only those that are too large are refused.
    """
    inner, parts = values.get("text_config"), [(values, where)]
    while parts:
        part, place = parts.pop()
        parts += [(found, f"{name} of {place}") for name, found in part.items() if isinstance(found, Mapping)]
        for name, largest in (_LARGEST | _OTHER_NAMES).items():
            found = part.get(name)
            sizes = found if isinstance(found, list) and found else [found]
            for size in sizes if found is not None else ():
                number = size if isinstance(size, int) and not isinstance(size, bool) else 0
                strict = name in _LARGEST and (part is values or part is inner)
                if number > largest or (strict and number < 1):
                    raise LongRopeError(
                        f"expected {name} of {place} to be a whole number of 1 to {largest}; found {shown(size)}",
                        code="invalid-config",
                    )


def check_config_file(path: Path) -> None:
    """`check_sizes` of a config.json, where it is there and holds an object; the loader says what else is wrong."""
    try:
        whole = read_json(path)
    except LongRopeError:
        return
    check_sizes(whole, str(path))
