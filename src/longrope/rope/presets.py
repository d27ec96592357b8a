"""The rescale factors that the authors published, by name: 30 LongRoPE tables, two of LongRoPE2, two of Phi-3.

They are package data under the MIT licence of their authors, whose notice is in the file. A table is for one model:
LLaMA2-7B, Mistral-7B-v0.1, Meta-Llama-3-8B, Phi-4-mini-instruct, or one of the Phi-3 family. For any other model it is
an example, not a result.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from longrope.errors import LongRopeError
from longrope.rope.closed_forms import su_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetRow:
    """One preset in a listing; lengths in tokens."""

    name: str
    model: str
    original_length: int
    """L that the factors are relative to."""
    target_length: int
    """L', the window the factors are for."""
    ratio: float
    """s = L'/L."""
    finetuned_length: int
    """The window the model had been fine-tuned to when the factors were searched."""
    rotary_dim: int
    base: float
    role: str
    """`fine-tuning factors`, `second interpolation` (without further training), `recovery` (of a short window), …"""
    monotone: bool
    """True if no factor is below its predecessor; some of the Mistral tables are not monotone."""
    two_windows: bool = False
    """True if texts of up to L tokens have factors of their own."""
    note: str = ""


def preset_names() -> list[str]:
    """The names of all presets, in the order of the file."""
    return [table["name"] for table in _file()["tables"]]


def preset_table() -> list[PresetRow]:
    """One row per preset, in the order of `preset_names`."""
    return [
        PresetRow(
            name=table["name"],
            model=table["model"],
            original_length=table["original_length"],
            target_length=table["window"],
            ratio=table["window"] / table["original_length"],
            finetuned_length=table["finetuned_length"],
            rotary_dim=table["head_dim"],
            base=table["rope_theta"],
            role=table["role"],
            monotone=table["monotone"],
            two_windows=_short(table) is not None,
            note=table.get("note", ""),
        )
        for table in _file()["tables"]
    ]


def presets_for(model: str, geometry: RopeGeometry | None = None) -> list[PresetRow]:
    """The presets whose model is `model`, by its name: `meta-llama/Llama-2-7b-hf` is the published LLaMA2-7B.

    With the `geometry` of the model, those that fit it where its name is not known: the factors of another model with
    the same rotary dimension, base and original length.
    """
    rows = preset_table()
    name = _letters(model.rstrip("/").rpartition("/")[2])
    named = [row for row in rows if _letters(row.model) in name]
    if named or geometry is None:
        return named
    shape = (geometry.rotary_dim, geometry.base, geometry.original_length)
    return [row for row in rows if (row.rotary_dim, row.base, row.original_length) == shape]


def _letters(name: str) -> str:
    """A model's name without case and punctuation."""
    return "".join(filter(str.isalnum, name.lower()))


def preset(name: str) -> RopeScaling:
    """Look up the published rescale factors `name`, as a scaling relative to the original RoPE of their model.

    A LongRoPE table is one window. LongRoPE2's tables keep factors of 1 up to L, and those of Phi-3 have short factors
    there, so they have two. The published files state no attention factor; the one here is what the authors' code
    computes for them by default, √(1 + ln s/ln L) at the length of the table (1 for a window of L tokens), in a table
    of two windows for both, as there.

    Raises LongRopeError, with the names that come close, when there is no such preset.
    """
    tables = {table["name"]: table for table in _file()["tables"]}
    if name not in tables:
        close = difflib.get_close_matches(name, tables, n=3)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else f"there are {len(tables)}, from {min(tables)} to {max(tables)}; `longrope presets` lists them"
        )
        raise LongRopeError(f"expected the name of a preset, found {name!r}", code="unknown-preset", hint=hint)
    table = tables[name]
    geometry = RopeGeometry(
        rotary_dim=table["head_dim"], base=table["rope_theta"], original_length=table["original_length"]
    )
    factor, short = su_attention_factor(geometry, table["window"]), _short(table)
    windows = [] if short is None else [Window(table["original_length"], tuple(short), attention_factor=factor)]
    windows.append(Window(table["window"], tuple(table["factors"]), attention_factor=factor))
    scaling = RopeScaling(geometry, tuple(windows))
    kept = ("model", "role", "finetuned_length", "note")
    return scaling.with_provenance(
        origin="published factors",
        preset=name,
        **{key: table[key] for key in kept if key in table},
        **({key: _file()[key] for key in ("source", "licence", "copyright")} | _own_source(table)),
        attention_factor="not in the published file; the default of the authors' code (su)",
    )


def _short(table: dict[str, Any]) -> list[float] | None:
    """The factors up to L of a table with two windows."""
    if "short_factors" in table:
        return list(table["short_factors"])
    return [1.0] * len(table["factors"]) if table["role"].startswith("LongRoPE2") else None


def _own_source(table: dict[str, Any]) -> dict[str, str]:
    return {"source": table["source"]} if "source" in table else {}


@cache
def _file() -> dict[str, Any]:
    text = resources.files("longrope").joinpath("assets", "presets.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
