"""One line for each error: usage errors of cyclopts, and the library's with their arguments turned into options."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from cyclopts import CycloptsError, MissingArgumentError

SYNONYMS = (
    ("output_dir", "output"),
    ("model", "run_or_model", "checkpoint", "folder"),
    ("data", "search_data"),
    ("eval_data", "evaluation_data"),
    ("scaling", "scaling_path"),
)
"""Arguments of library functions and parameters of verbs that mean the same."""


def usage_error(error: CycloptsError) -> str:
    """What is wrong with the options themselves."""
    error.verbose = False
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        if error.argument.tokens or error.keyword:
            return f"expected a value after {error.keyword or error.argument.name}"
        verb = " ".join(error.command_chain or ())
        return f"expected {error.argument.name}, found none: see longrope {verb} --help"
    return " ".join(str(error).split()).removesuffix(".")


def options_by_name(arguments: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """The options of a verb by the argument of the library that each of them stands for."""
    found = {argument.field_info.name: argument.names for argument in arguments if argument.names != ("*",)}
    for names in SYNONYMS:
        known = next((found[name] for name in names if name in found), None)
        if known is not None:
            found = dict.fromkeys(names, known) | found
    return found


def in_options(text: str, options: dict[str, tuple[str, ...]]) -> str:
    """`text` of the library with its arguments in backticks as options: `resume=True` as --resume, `output_dir` as -o.

    Backticks around anything else go away, and text without them is not touched.
    """

    def option(match: re.Match[str]) -> str:
        name, equals, value = match[1].partition("=")
        names = next((options[part] for part in reversed(name.split(".")) if part in options), None)
        if names is None:
            return match[1]
        negative = [other for other in names if other.startswith("--no-")]
        if value == "False" and negative:
            return negative[0]
        if not equals or value in ("True", "False"):
            return names[0]
        return f"{names[0]} {value.strip(chr(34) + chr(39))}"

    return re.sub(r"`([^`]+)`", option, text)
