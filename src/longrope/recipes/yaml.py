"""Recipes as YAML: the built-in ones and files, with every fault as one line that says where it is."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from longrope.errors import LongRopeError
from longrope.recipes.schema import EvaluateStage, ExportStage, Recipe, Stage
from longrope.units import parse_length

BUILT_IN = ("longrope", "longrope2", "quick")


def load_recipe(name: str, original_length: int) -> Recipe:
    """The built-in recipe `name`, or that of a YAML file, for a model with a window of `original_length` tokens.

    Paths of texts in a file are relative to it. Raises LongRopeError, on one line with the stage, for any fault.
    """
    text, called, folder = _read(name)
    raw = _mapping(text, called)
    try:
        return _from_folder(Recipe.model_validate(raw, context={"original_length": original_length}), folder)
    except LongRopeError as error:
        raise error.within(called) from error


def recipe_model(name: str) -> tuple[str | None, int | None]:
    """The model that a recipe is for and its original window, where it names them.

    Raises LongRopeError when it is no recipe, or the window is no length.
    """
    text, called, _ = _read(name)
    raw = _mapping(text, called)
    model, length = raw.get("model"), raw.get("original_length")
    try:
        return model if isinstance(model, str) else None, None if length is None else parse_length(length)
    except LongRopeError as error:
        raise error.within(f"{called}: original_length") from error


def _read(name: str) -> tuple[str, str, Path]:
    """The YAML of a built-in recipe or of a file, its name for errors, and the folder that its paths start from."""
    if name in BUILT_IN:
        text = resources.files("longrope").joinpath("assets", "recipes", f"{name}.yaml").read_text("utf-8")
        return text, f"the recipe {name}", Path()
    path = Path(name).expanduser()
    if not path.is_file():
        raise LongRopeError(
            f"there is no recipe {name!r}: expected {', '.join(BUILT_IN)} or a YAML file (recipes/*.yaml are examples)"
        )
    try:
        return path.read_text("utf-8"), str(path), path.parent
    except (OSError, UnicodeDecodeError) as error:
        raise LongRopeError(f"cannot read the recipe {path}: {error}") from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml is untyped
    """Safe YAML that refuses a key given twice, of which YAML keeps the last in silence, and knows `1e-8` as a number,
    which YAML 1.1 takes for text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merged = "tag:yaml.org,2002:merge"
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merged]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise LongRopeError(f"the key {twice[0]!r} is given twice (line {node.start_mark.line + 1})")
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping(text: str, called: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text, Loader=_Loader)
    except LongRopeError as error:
        raise error.within(called) from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:  # a list is no key
        raise LongRopeError(f"{called} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise LongRopeError(f"{called}: expected a mapping with 'stages', found {type(raw).__name__}")
    return raw


def _from_folder(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its texts found from the folder it lies in."""

    def found(sources: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if sources is None:
            return None
        return tuple(
            source if source.startswith(("book:", "hf:")) else str(folder / Path(source).expanduser())
            for source in sources
        )

    def with_texts(stage: Stage) -> Stage:
        if isinstance(stage, ExportStage):
            return stage
        changed: dict[str, Any] = {"data": found(stage.data)}
        if isinstance(stage, EvaluateStage) and stage.settings.qa_file is not None:
            changed["settings"] = stage.settings.replace(qa_file=folder / stage.settings.qa_file.expanduser())
        return stage.model_copy(update=changed)

    return recipe.model_copy(
        update={
            "stages": tuple(map(with_texts, recipe.stages)),
            "data": found(recipe.data),
            "eval_data": found(recipe.eval_data),
        }
    )
