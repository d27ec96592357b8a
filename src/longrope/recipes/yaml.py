"""Recipes as YAML: the built-in ones and files, with every fault as one line that says where it is."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.recipes.schema import EvaluateStage, ExportStage, Recipe, Stage
from longrope.safe_yaml import parse_yaml, read_yaml
from longrope.units import parse_length

_SHIPPED = resources.files("longrope").joinpath("assets", "recipes")
BUILT_IN = tuple(sorted(file.name.removesuffix(".yaml") for file in _SHIPPED.iterdir() if file.name.endswith(".yaml")))
"""The recipes that come with the package, by name."""
_WANTED = "a mapping with 'stages'"


def load_recipe(name: str, original_length: int) -> Recipe:
    """The built-in recipe `name`, or that of a YAML file, for a model with a window of `original_length` tokens.

    Paths of texts in a file are relative to it. Raises LongRopeError, on one line with the stage, for any fault.
    """
    text, called, folder = _read(name)
    raw = parse_yaml(text, called, _WANTED)
    try:
        return _from_folder(Recipe.model_validate(raw, context={"original_length": original_length}), folder)
    except LongRopeError as error:
        raise error.within(called) from error


def recipe_model(name: str) -> tuple[str | None, int | None]:
    """The model that a recipe is for and its original window, where it names them.

    Raises LongRopeError when it is no recipe, or the window is no length.
    """
    text, called, _ = _read(name)
    raw = parse_yaml(text, called, _WANTED)
    model, length = raw.get("model"), raw.get("original_length")
    try:
        return model if isinstance(model, str) else None, None if length is None else parse_length(length)
    except LongRopeError as error:
        raise error.within(f"{called}: original_length") from error


def _read(name: str) -> tuple[str, str, Path]:
    """The YAML of a built-in recipe or of a file, its name for errors, and the folder that its paths start from."""
    if name in BUILT_IN:
        text = _SHIPPED.joinpath(f"{name}.yaml").read_text("utf-8")
        return text, f"the recipe {name}", Path()
    path = Path(name).expanduser()
    if not path.exists() or path.is_dir():
        raise LongRopeError(f"there is no recipe {name!r}: expected {', '.join(BUILT_IN)} or a YAML file")
    return read_yaml(path), str(path), path.parent


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
