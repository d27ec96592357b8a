"""The RoPE settings in a checkpoint folder's config.json and tokenizer_config.json, as they stand there.

Nothing here knows a runtime: `readings.py` holds how each of them reads the settings.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.checks import LARGEST_FACTOR, positive_number, shown, whole_number
from longrope.doctor.table import ModelClass, model_class
from longrope.errors import LongRopeError
from longrope.models.adapters import adapter_config_of, adapter_error
from longrope.models.checkpoint_files import RECORD
from longrope.models.config_sizes import check_sizes
from longrope.rope.geometry import LARGEST_DIM
from longrope.run_files import SCALING
from longrope.storage import read_json

DICTIONARIES = ("rope_scaling", "rope_parameters")
BY_HAND = "edit config.json"
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """The language model's part of a config.json, as it stands in the file."""

    path: Path
    """The checkpoint's folder."""
    values: Mapping[str, Any]
    family: str
    """model_type."""
    length: int
    """max_position_embeddings, or the class's own where the file has none: L'."""
    tokenizer_length: int | None
    """model_max_length of tokenizer_config.json; None where it limits nothing."""
    record: Mapping[str, Any]
    """The record that `longrope export` leaves in config.json; empty for other checkpoints."""

    @property
    def model_class(self) -> ModelClass:
        """The differences of transformers' class of this family from Llama's."""
        return model_class(self.family)

    @property
    def query_scale(self) -> float:
        """The factor that an export folded into the queries' weights, which scales all logits; 1 where none is."""
        return positive_number(f"{RECORD}.query_scale", self.record.get("query_scale", 1.0))

    @property
    def repair(self) -> str:
        """The advice to repair this config.json: the command, where there is a scaling.json to write it from."""
        command = f"longrope fix-config {shlex.quote(str(self.path))}"
        return command if (self.path / SCALING).is_file() else BY_HAND

    def dictionary(self, name: str) -> dict[str, Any]:
        """A copy of `rope_scaling` or `rope_parameters`; empty where the file has none."""
        value = self.values.get(name)
        return dict(value) if isinstance(value, Mapping) else {}

    @property
    def stated_type(self) -> str:
        """The RoPE type that some dictionary states under some key, `su` as longrope; `default` where none does."""
        for name in DICTIONARIES:
            entry = self.dictionary(name)
            for one in (entry, *(item for item in entry.values() if isinstance(item, Mapping))):
                for stated in (one.get("rope_type"), one.get("type")):
                    if stated is not None and stated != "default":
                        return "longrope" if stated == "su" else str(stated)
        return "default"

    @property
    def base(self) -> float | None:
        """The top-level rope_theta (`rotary_emb_base` in GPT-NeoX); None where there is none."""
        value = self.values.get("rope_theta", self.values.get("rotary_emb_base"))
        return None if value is None else positive_number("rope_theta", value)

    @property
    def original_length(self) -> int | None:
        """The top-level original_max_position_embeddings; None where there is none."""
        value = self.values.get(ORIGINAL)
        return None if value is None else whole_number(ORIGINAL, value, 2)

    def rotary_dim(self, parameters: Mapping[str, Any]) -> int:
        """Dimensions of a head that rotate, where a share in `parameters` goes before one at the top level.

        Raises LongRopeError when config.json does not say how large a head is.
        """
        size = self._rotary_dim(parameters)
        if not 2 <= size <= LARGEST_DIM:
            raise LongRopeError(
                f"expected 2 to {LARGEST_DIM} rotary dimensions in {self.path}; found {size}", code="damaged-file"
            )
        return size

    def _rotary_dim(self, parameters: Mapping[str, Any]) -> int:
        latent = self.values.get("qk_rope_head_dim")
        if latent is not None:
            return whole_number("qk_rope_head_dim", latent, 2)
        head_dim = self.values.get("head_dim")
        if head_dim is None:
            default = self.model_class.head_dim
            head_dim = default if isinstance(default, int) else self._head_share()
        places = (parameters.get("partial_rotary_factor"), self.values.get("partial_rotary_factor"))
        shares = (*places, self.values.get("rotary_pct"), self.model_class.partial)
        share = positive_number("partial_rotary_factor", next(share for share in shares if share is not None))
        return int(whole_number("head_dim", head_dim, 2) * share)

    def _head_share(self) -> int:
        hidden, heads = self.values.get("hidden_size"), self.values.get("num_attention_heads")
        if hidden is None or heads is None:
            raise LongRopeError(
                f"expected head_dim, or hidden_size and num_attention_heads, in {self.path}/config.json; found neither",
                code="damaged-file",
            )
        return whole_number("hidden_size", hidden, 2) // whole_number("num_attention_heads", heads, 1)


def read_checkpoint_config(folder: Path) -> CheckpointConfig:
    """Read the settings in the checkpoint folder `folder`.

    Raises LongRopeError when it has no config.json (`no-such-model`), or one that is damaged or states no length.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (adapter := adapter_config_of(folder)) is not None:
            raise adapter_error(adapter, str(adapter.parent))
        raise LongRopeError(
            f"expected a checkpoint folder with a config.json, found none in {folder}", code="no-such-model"
        )
    whole = read_json(path)
    inner = whole.get("text_config")
    values = inner if isinstance(inner, dict) and "num_hidden_layers" not in whole else whole
    for name in DICTIONARIES:
        if not isinstance(values.get(name), dict | None):
            raise LongRopeError(
                f"expected {name} of {path} to be an object or null; found {shown(values[name])}", code="damaged-file"
            )
        _check_factor(values.get(name) or {}, f"{name} of {path}")
    record = whole.get(RECORD)
    family = str(values.get("model_type", "unknown"))
    stated = values.get("max_position_embeddings", model_class(family).length)  # Gemma 3 4B leaves it to the class
    length = whole_number(f"max_position_embeddings of {path}", stated, 2)
    check_sizes(whole, str(path))
    return CheckpointConfig(
        path=folder,
        values=values | {"max_position_embeddings": length},
        family=family,
        length=length,
        tokenizer_length=_tokenizer_length(folder),
        record=record if isinstance(record, dict) else {},
    )


def _check_factor(dictionary: Mapping[str, Any], where: str) -> None:
    """Raise LongRopeError for a factor beyond all that can be computed with; of others, each runtime says its own."""
    for entry in (dictionary, *(inner for inner in dictionary.values() if isinstance(inner, Mapping))):
        factor = entry.get("factor")
        if isinstance(factor, int | float) and not abs(factor) <= LARGEST_FACTOR:
            raise LongRopeError(
                f"expected factor in {where} of at most {LARGEST_FACTOR:g}; found {shown(factor)}", code="damaged-file"
            )


def _tokenizer_length(folder: Path) -> int | None:
    path = folder / "tokenizer_config.json"
    limit = read_json(path).get("model_max_length") if path.is_file() else None
    return limit if isinstance(limit, int) and limit > 0 else None  # int(1e30), "no limit", limits nothing
