"""A small recipe of every kind of stage on the random checkpoint with a window of 64 tokens: some ten seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from longrope.recipes.schema import Recipe
from longrope.recipes.yaml import load_recipe
from tests.checkpoints import WINDOW, words

FEW = {"method": "longrope", "population": 4, "iterations": 1, "samples": 1}
TRAIN = {"stage": "finetune", "batch": 2, "learning_rate": 1e-3, "warmup": 0, "save_every": 1}
SEARCH_4, SEARCH_8, TRAIN_4, TRAIN_8, SEARCH_16, RECOVER, EVALUATE, EXPORT = STAGES = (
    {"stage": "search", "target": "4x", **FEW},
    {"stage": "search", "target": "8x", **FEW},
    {**TRAIN, "target": "4x", "steps": 3},
    {**TRAIN, "target": "8x", "steps": 2},
    {"stage": "search", "target": "16x", **FEW},
    {"stage": "recover", "lengths": ["1x", "2x"], **FEW},
    {"stage": "evaluate", "lengths": ["1x", "16x"], "against": ["none"], "samples": 2},
    {"stage": "export", "to": "hf", "allow_lossy": True},
)
FOLDERS = (
    "01-search-256",
    "02-search-512",
    "03-finetune-256",
    "04-finetune-512",
    "05-search-1k",
    "06-recover",
    "07-evaluate",
    "08-export",
)


def write_recipe(folder: Path, *stages: dict[str, Any], **more: Any) -> Path:
    """A recipe file with texts beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("texts.txt", "other.txt"), start=1):
        (folder / name).write_text(words(2000, seed), "utf-8")
    content = {"data": ["texts.txt"], "eval_data": ["other.txt"], "stages": list(stages)} | more
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def recipe(folder: Path, *stages: dict[str, Any], **more: Any) -> Recipe:
    return load_recipe(str(write_recipe(folder, *stages, **more)), WINDOW)


def without_times(path: Path) -> Any:
    """The content of a file of a run, without its times and the hash of a file with times."""
    if path.suffix == ".html":
        return re.sub(r"<div><dt>(Date|Time)</dt>.*?</div>", "", path.read_text("utf-8"))
    if path.name not in ("stage.json", "search.json", "eval.json", "extend.json"):
        return path.read_bytes()
    document = json.loads(path.read_text("utf-8"))
    found = {key: value for key, value in document.items() if key not in ("finished", "seconds", "resumed")}
    if path.name == "stage.json":
        found["sha256"] = {name: digest for name, digest in found["sha256"].items() if name != "eval.json"}
    return found
