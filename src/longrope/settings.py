"""The base of every configuration: typed, frozen, validated where it is made, with errors of one line.

A subclass writes each setting once: name, type, bounds, default, and a docstring below it. Validation, the options of
the command line and their help, the keys of recipes, the JSON beside every output and the tables of the docs are made
from that.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidatorFunctionWrapHandler, model_validator

from longrope.checks import LARGEST_SEED as LARGEST_SEED
from longrope.checks import MOST as MOST
from longrope.checks import shown
from longrope.errors import LongRopeError


class Settings(BaseModel):
    """A frozen configuration; unknown settings are refused.

    Raises LongRopeError, naming the setting, when a value is out of range or of the wrong type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=False)

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Self:
        try:
            made: Self = handler(value)
        except ValidationError as error:
            raise LongRopeError(describe(error, cls), code="invalid-setting") from error
        return made

    def replace(self, **changes: Any) -> Self:
        """The same settings with `changes`, validated again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault of `error` in one sentence: which setting, what was expected, what was found."""
    fault = error.errors(include_url=False)[0]
    name = ".".join(map(str, fault["loc"])) or model.__name__
    context, found = fault.get("ctx", {}), shown(fault["input"])
    match fault["type"]:
        case "greater_than_equal":
            return f"expected `{name}` of at least {context['ge']:.10g}, found {found}"
        case "greater_than":
            return f"expected `{name}` above {context['gt']:.10g}, found {found}"
        case "less_than_equal":
            return f"expected `{name}` of at most {context['le']:.10g}, found {found}"
        case "less_than":
            return f"expected `{name}` below {context['lt']:.10g}, found {found}"
        case "literal_error":
            return f"expected `{name}` to be {context['expected']}; found {found}"
        case "extra_forbidden":
            return f"unknown setting `{name}`; {suggestion(name, model.model_fields)}"
        case "missing":
            return f"expected a value for `{name}`, found none"
        case "too_short":
            return f"expected at least {context['min_length']} of `{name}`, found none"
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return f"expected a whole number for `{name}`, found {found}"
        case "float_parsing" | "float_type" | "finite_number":
            return f"expected a number for `{name}`, found {found}"
        case "bool_parsing" | "bool_type":
            return f"expected true or false for `{name}`, found {found}"
        case "tuple_type":
            return f"expected a list for `{name}`, found {found}"
        case "value_error":
            return f"`{name}`: {context['error']}"
    return f"expected `{name}` to be a valid value ({fault['msg']}), found {found}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean …?` for a name that is close to a known one; else all that are known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
