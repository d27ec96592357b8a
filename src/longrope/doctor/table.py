"""The rules of each runtime (transformers, vLLM, SGLang, llama.cpp, …) by name, from `assets/runtimes.json`.

The table holds the names of the rules, each runtime's version and the source of its rules; the rules themselves are
functions in `readings.py`, `rules.py` and `llamacpp.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    default_original_length: int | None = None
    su: bool = False
    """True if `su`, the old name of `longrope`, is known."""


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
    types_families: Mapping[str, list[str]] = field(default_factory=dict)
    """Further RoPE types whose rules are known for single families."""
    attention: Literal["stated", "stated-4", "mscale", "lengths", "none"] = "stated"
    yarn_reads: list[str] = field(default_factory=lambda: ["attention_factor", "mscale", "truncate"])
    """The optional keys of `yarn` that it reads: attention_factor (m), attn_factor (times m), mscale (with
    mscale_all_dim, both or neither), mscale-alone (each by itself), truncate (the ramp's ends as whole numbers)."""
    yarn_unknown: list[str] = field(default_factory=list)
    """Keys of `yarn` of which it is not known whether it reads them."""
    yarn_factor: Literal["stated", "lengths"] = "stated"
    engine: Literal["target", "original", "default"] = "target"
    """The length that an engine or context is started with."""
    limits: list[Literal["config", "derived", "tokenizer"]] = field(default_factory=list)
    """The caps of the length it serves: max_position_embeddings, the tokenizer's model_max_length."""
    files: FilesRule | None = None
    files_families: Mapping[str, FilesRule] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    only: list[str] | None = None
    """Families it has LongRoPE for; None for all."""
    otherwise: Literal["dropped", "refused"] = "dropped"
    otherwise_says: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Families that it stops at when they have LongRoPE, and why."""
    drops: Mapping[str, str] = field(default_factory=dict)
    """Families for which it computes plain RoPE whatever RoPE type is stated, but those of `types_families`."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Families whose rule is not known, and why."""
    nested_elsewhere: Literal["error", "default", "refused"] = "error"
    """The outcome of one dictionary per layer type in a class that has one RoPE for all."""
    renames_su: bool = False
    multiplies: bool = False
    crossing: str = ""
    """The fate of cached keys when a text grows past the switch."""
    crossing_families: Mapping[str, str] = field(default_factory=dict)
    recomputes_keys: list[str] = field(default_factory=list)
    """Families whose `generate` computes cached keys again when a text grows past the switch."""
    notes: list[str] = field(default_factory=list)

    def types_of(self, family: str) -> list[str]:
        """The RoPE types whose rules are known for `family`."""
        return [*self.types, *self.types_families.get(family, [])]

    def needs_of(self, family: str) -> list[str]:
        """The keys without which the RoPE dictionary of `family` is an error."""
        return self.needs if self.files is None else self.files_rule(family).needs

    def files_rule(self, family: str) -> FilesRule:
        """The places where this runtime looks for the RoPE of `family`."""
        rule = self.files_families.get(family, self.files)
        if rule is None:
            raise ValueError(f"the table says nothing about where {self.name} looks in config.json")
        return rule


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelClass:
    """The differences of a model type's transformers class from Llama's, where the RoPE is read.

    The suffixes _4 and _5 mark values of transformers 4.57 and 5 alone.
    """

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
    only_5: bool = False
    """True if transformers 4.57 has no such class."""
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


def _runtime(row: dict[str, Any]) -> Runtime:
    files = row.get("files")
    families = {family: FilesRule(**files | changes) for family, changes in row.get("files_families", {}).items()}
    return Runtime(**row | {"files": FilesRule(**files) if files else None, "files_families": families})


@cache
def _file() -> dict[str, Any]:
    text = resources.files("longrope").joinpath("assets", "runtimes.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    if content["schema"] != SCHEMA:
        raise ValueError(f"assets/runtimes.json has schema {content['schema']!r}, this code reads {SCHEMA!r}")
    return content
