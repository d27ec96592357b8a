"""The rules of each runtime (transformers, vLLM, SGLang, llama.cpp, …) by name, from `assets/runtimes.json`.

The table holds the names of the rules, each runtime's version and the source of its rules; the rules themselves are
functions in `readings.py`, `rules.py` and `llamacpp.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

SCHEMA = "longrope.runtimes/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesRule:
    """The places where a runtime that parses config.json itself looks for each value, in its order."""

    dict: list[str]
    """Keys of the RoPE dictionary."""
    type: list[str]
    """Keys of its type."""
    base: list[str]
    """`top` for a top-level rope_theta, else the dictionary that holds it."""
    original_length: list[Literal["top", "dict"]]
    needs: list[str] = field(default_factory=list)
    """Keys without which the dictionary is an error."""
    base_required: bool = False
    default_base: float | None = None
    """The base where it finds none; None where it is not known, but that of nearly all is 10,000."""
    default_original_length: int | None = None
    su: bool = False
    """True if `su`, the old name of `longrope`, is known."""


@dataclass(frozen=True, slots=True)
class Group:
    """Families for which a runtime differs from its row of the table."""

    families: Sequence[str]
    changes: Mapping[str, Any]
    """The fields of the row that differ, and their values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One row of the table.

    Texts may hold {path}, {family}, {repair} (advice for its config.json), {switch} (L), {target} (L'), {engine} and
    {inside} (the largest context of llama.cpp that takes the short factors).
    """

    name: str
    label: str
    version: str
    evidence: Literal["run", "read"]
    """`run`: the runtime itself computed with checkpoints, and its logits were compared; `read`: its source was."""
    source: str
    counted: bool
    """True if a verdict counts for the exit code when no runtime is named."""
    reads: Literal["transformers-5", "transformers-4", "files", "gguf"]
    switch: Literal["forward", "at", "past", "engine", "context", "always"]
    switch_says: str
    advice: str
    """Advice where it applies a window at lengths that are not its own."""
    advice_always_long: str = ""
    """Advice in the place of `advice` where L is so small that no context takes the short factors ({inside} is 0)."""
    repair: str = "{repair}"
    """Advice where it drops, changes or refuses the scaling."""
    types: list[str] = field(default_factory=list)
    """The RoPE types whose rules are known; the verdict on others is unknown."""
    own_types: list[str] = field(default_factory=list)
    """Further RoPE types whose rules are known for a family, whatever `stops` or `plain` says of the rest."""
    attention: Literal["stated", "stated-4", "mscale", "lengths", "none"] = "stated"
    yarn_reads: list[str] = field(default_factory=lambda: ["attention_factor", "mscale", "truncate"])
    """The optional keys of `yarn` that it reads: attention_factor (m), attn_factor (times m), mscale (with
    mscale_all_dim, both or neither), mscale-alone (each by itself), truncate (the ramp's ends as whole numbers)."""
    yarn_unknown: list[str] = field(default_factory=list)
    """Keys of `yarn` of which it is not known whether it reads them."""
    yarn_factor: Literal["stated", "lengths"] = "stated"
    engine: Literal["target", "original", "default"] = "target"
    """The length that an engine or context is started with."""
    limited: bool = False
    """True if it serves no longer texts than its engine is started for, whatever chooses the window."""
    limits: list[Literal["config", "derived", "tokenizer"]] = field(default_factory=list)
    """The caps of the length it serves: max_position_embeddings, the tokenizer's model_max_length."""
    files: FilesRule | None = None
    needs: list[str] = field(default_factory=list)
    only: list[str] | None = None
    """Families it has LongRoPE for; None for all."""
    otherwise: Literal["dropped", "refused"] = "dropped"
    otherwise_says: str = ""
    lacks: str = ""
    """The reason why it refuses every checkpoint of a family."""
    stops: str = ""
    """The reason why it refuses a checkpoint of a family that has a RoPE type, but for `own_types`."""
    plain: str = ""
    """The reason why it computes plain RoPE for a family whatever RoPE type is stated, but for `own_types`."""
    as_yarn: str = ""
    """The reason why it computes YaRN for a family whatever RoPE type is stated."""
    unlooked: str = ""
    """The reason why the rule of a family is not known."""
    by_family: bool = False
    """True if every family has code of its own that reads config.json, so that nothing is known of one that is not in
    the table."""
    groups: Sequence[Group] = ()
    """Families that differ from the row."""
    nested_elsewhere: Literal["error", "default", "refused"] = "error"
    """The outcome of one dictionary per layer type in a class that has one RoPE for all."""
    renames_su: bool = False
    multiplies: bool = False
    crossing: str = ""
    """The fate of cached keys when a text grows past the switch."""
    recomputes_keys: bool = False
    """True if `generate` computes cached keys again when a text grows past the switch."""
    notes: list[str] = field(default_factory=list)

    def of(self, family: str) -> Runtime:
        """This row as it holds for `family`."""
        changes: dict[str, Any] = {}
        for group in self.groups:
            if family in group.families:
                changes |= group.changes
        if "files" in changes and self.files is not None:
            changes["files"] = replace(self.files, **changes["files"])
        return replace(self, **changes)

    def knows(self, family: str) -> bool:
        """True if the rule of `family` is known."""
        return not self.by_family or self.names(family) or family in known_families()

    def names(self, family: str) -> bool:
        """True if the row says something of `family` by name."""
        return family in (self.only or ()) or any(family in group.families for group in self.groups)

    @property
    def known_types(self) -> list[str]:
        """The RoPE types whose rules are known."""
        return [*self.types, *self.own_types]

    @property
    def needed(self) -> list[str]:
        """The keys without which the RoPE dictionary is an error."""
        return self.needs if self.files is None else self.files.needs


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelClass:
    """The differences of a model type's transformers class from Llama's, where the RoPE is read.

    The suffixes _4 and _5 mark values of transformers 4.57 and 5 alone.
    """

    length: int | None = None
    """The default of max_position_embeddings."""
    base: float = 10_000.0
    base_4: float | None = None
    partial: float = 1.0
    """The share of a head's dimensions that rotates."""
    head_dim: int | Literal["none"] | None = None
    """The default of head_dim; `none`: the class leaves it None; None: hidden_size/num_attention_heads."""
    head_dim_4: Literal["none"] | None = None
    original_length: int | None = None
    """The default of the top-level original_max_position_embeddings."""
    layers: Literal["flat", "declared", "nested"] = "flat"
    """`declared`: a class with layer types and one RoPE for all; `nested`: one RoPE per layer type."""
    keys_4: int | None = None
    """The number of keys that it insists on in rope_scaling."""
    mscale: bool = False
    """True if it reads short_mscale and long_mscale."""
    short_only_5: bool = False
    """True if its rotary module turns by the short factors at every length."""


@cache
def runtimes() -> dict[str, Runtime]:
    """All runtimes by name, in the order of the table."""
    return {row["name"]: _runtime(row) for row in _file()["runtimes"]}


def as_of() -> str:
    """The day of the table, ISO 8601."""
    return str(_file()["as_of"])


def model_class(family: str) -> ModelClass:
    """The differences of the class of a model type; a model type that is not in the table is taken to be like Llama."""
    return ModelClass(**_file()["classes"].get(family, {}))


def known_families() -> frozenset[str]:
    """The model types in the table."""
    return frozenset(_file()["classes"])


@cache
def types_4() -> frozenset[str]:
    """The model types that transformers 4.57 has a config class for."""
    return frozenset(_file()["types_4"])


def _runtime(row: dict[str, Any]) -> Runtime:
    files = row.get("files")
    groups = tuple(
        Group(group["families"], {name: value for name, value in group.items() if name != "families"})
        for group in row.get("groups", ())
    )
    return Runtime(**row | {"files": FilesRule(**files) if files else None, "groups": groups})


@cache
def _file() -> dict[str, Any]:
    text = resources.files("longrope").joinpath("assets", "runtimes.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    if content["schema"] != SCHEMA:
        raise ValueError(f"assets/runtimes.json has schema {content['schema']!r}, this code reads {SCHEMA!r}")
    return content
