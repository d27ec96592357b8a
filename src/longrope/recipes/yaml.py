"""Recipes as YAML: the built-in ones and files, with every fault as one line that says where it is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from longrope.errors import LongRopeError
from longrope.recipes.schema import SETTINGS, STAGES, EvaluateStage, ExportStage, Recipe, Stage
from longrope.units import parse_length

BUILT_IN = ("longrope", "longrope2", "quick")


def load_recipe(name: str, original_length: int) -> Recipe:
    """The built-in recipe `name`, or that of a YAML file, for a model with a window of `original_length` tokens.

    Paths of texts in a file are relative to it. Raises LongRopeError, on one line with the stage, for what is wrong.
    """
    text, called, folder = _read(name)
    raw = _mapping(text, called)
    context = {"original_length": original_length}
    try:
        return _from_folder(Recipe.model_validate(raw, context=context), folder)
    except ValidationError as error:
        raise LongRopeError(f"{called}: {_first(error, raw)}") from error
    except LongRopeError as error:
        raise LongRopeError(f"{called}: {_where(raw, context)}{error}") from error


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
        raise LongRopeError(f"{called}: original_length: {error}") from error


def _read(name: str) -> tuple[str, str, Path]:
    """The YAML of a built-in recipe or of a file, what to call it in errors, and the folder its paths start from."""
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
        raise LongRopeError(f"{called}: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:  # a list is no key
        raise LongRopeError(f"{called} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise LongRopeError(f"{called}: expected a mapping with 'stages', found {type(raw).__name__}")
    return raw


def _first(error: ValidationError, raw: Mapping[str, Any]) -> str:
    """The first fault as one line: where, what was found, what was expected."""
    fault = error.errors(include_url=False)[0]
    place = list(fault["loc"])
    where, known = "", tuple(Recipe.model_fields)
    if len(place) > 1 and place[0] == "stages" and isinstance(place[1], int):
        stage = raw["stages"][place[1]]
        kind = str(stage.get("stage")) if isinstance(stage, dict) else ""
        where, known = f"stage {place[1] + 1}{f' ({kind})' if kind in STAGES else ''}: ", _keys(kind)
        place = [part for part in place[2:] if part not in (kind, "settings")]
    key = ".".join(map(str, place))
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        if len(place) > 1:
            return f"{where}unknown key {key!r}"
        close = difflib.get_close_matches(key, known, 1)
        return f"{where}unknown key {key!r}; " + (
            f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        )
    if fault["type"].startswith("union_tag"):
        return f"{where}expected 'stage' to be one of {', '.join(STAGES)}"
    if fault["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}the key {key!r} is missing"
    said = fault["msg"].replace("a valid tuple", "a list")
    return f"{where}{key + ': ' if key else ''}{said}; found {fault['input']!r:.80}"


def _where(raw: Mapping[str, Any], context: dict[str, int]) -> str:
    """`stage 2 (search): ` for the first stage whose settings are refused; nothing where it is none of them."""
    stages = raw.get("stages")
    for place, stage in enumerate(stages if isinstance(stages, list) else [], start=1):
        try:
            TypeAdapter(Stage).validate_python(stage, context=context)
        except LongRopeError:
            return f"stage {place} ({stage['stage']}): "
        except ValidationError:
            pass
    return ""


def _keys(kind: str) -> tuple[str, ...]:
    """The keys a stage of this kind can have."""
    if kind not in STAGES:
        return ()
    own = (name for name in STAGES[kind].model_fields if name != "settings")
    return (*own, *SETTINGS[kind].model_fields) if kind in SETTINGS else tuple(own)


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
