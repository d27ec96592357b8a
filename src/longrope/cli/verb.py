"""A verb of the command line: a function whose configurations become options.

A verb is a function under `@verb`. Its parameter `config: Annotated[SearchConfig, Options("Search")]` becomes one
option for each setting of `SearchConfig`: name, type, help and default are written in the configuration alone. The verb
receives the finished `SearchConfig`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter
from pydantic import BaseModel, Field, create_model, model_validator
from pydantic_core import PydanticUndefined

from longrope.cli.common import set_verbosity
from longrope.settings import Settings

OUTPUT = Group("Output", sort_key=9)
Verbose = Annotated[
    bool,
    Parameter(name=("--verbose", "-v"), group=OUTPUT, help="Log each step, and the traceback of an unexpected error."),
]
Quiet = Annotated[bool, Parameter(name=("--quiet", "-q"), group=OUTPUT, help="No progress and no remarks.")]


@dataclass(frozen=True)
class Options:
    """Turns the settings of a configuration into the options of one group of the help.

    `of`: the configuration, where the verb's parameter is a dict: the verb then receives what was given, as text.
    `only`, `without`: the settings that become options. `names`: options that are not called like their setting.
    `defaults`: defaults of this verb that differ, `helps`: help that differs. `switches`: bools given as on or off.
    """

    group: str
    of: type[Settings] | None = None
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    helps: Mapping[str, str] = field(default_factory=dict)
    switches: tuple[str, ...] = ()
    place: int = 1

    def read(self, hint: Any) -> tuple[Any, Callable[..., Any], bool]:
        """The type that cyclopts reads for a parameter annotated `hint`, the function that makes the parameter's value
        of the given options, and whether one of them must be given."""
        config: type[Settings] = self.of or hint
        make: Callable[..., Any] = dict if self.of else config
        fields: dict[str, Any] = {}
        for name, info in config.model_fields.items():
            if name in self.without or (self.only and name not in self.only):
                continue
            default = ... if info.is_required() else None if info.default is PydanticUndefined else info.default
            default = self.defaults.get(name, default)
            option = self.names.get(name, f"--{name.replace('_', '-')}")
            is_list = get_origin(info.annotation) is tuple
            kind: Any = str if is_list or name in self.switches else info.annotation
            if name in self.switches:
                default = "on" if default else "off"
            elif is_list:
                default = ",".join(map(str, default))
            kind = kind if default is not None else kind | None
            parameter = Parameter(
                name=option,
                negative=f"--no-{option.removeprefix('--')}" if default is True else (),
                choices=("on", "off") if name in self.switches else None,
                metavar="TOKENS" if name.endswith("length") else None,
            )
            text = self.helps.get(name, info.description or "").replace("`", "")
            if self.defaults.get(name) is not None:
                text = text.partition(" Default:")[0]
            fields[name] = (Annotated[kind, parameter], Field(default, description=" ".join(text.split())))
        lists = [name for name in fields if get_origin(config.model_fields[name].annotation) is tuple]

        def made(_view: type[BaseModel], given: dict[str, Any], _handler: Any) -> Any:
            parts = {name: split_names(given[name]) for name in lists if name in given}
            return make(**given | parts)

        wrap: Any = model_validator(mode="wrap")
        view = create_model(config.__name__, __validators__={"made": wrap(classmethod(made))}, **fields)
        required = any(info.is_required() for info in view.model_fields.values())
        group = Group(self.group, sort_key=self.place)
        return Annotated[view, Parameter(name="*", group=group)], make, required


def verb(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Make `function` a verb: configurations among its parameters become options, and --verbose and --quiet are added.

    The function's first line is the verb's help. It returns the exit code, or None for 0.
    """
    hints = get_type_hints(function, include_extras=True)
    makers: dict[str, Callable[..., Any]] = {}
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint, default = hints[name], parameter.default
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Options):
                hint, makers[name], required = mark.read(get_args(hint)[0])
                default = inspect.Parameter.empty if required else None
        parameters.append(parameter.replace(annotation=hint, default=default))
    for name, hint in (("verbose", Verbose), ("quiet", Quiet)):
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint))

    @functools.wraps(function)
    def command(*values: Any, verbose: bool = False, quiet: bool = False, **named: Any) -> int | None:
        set_verbosity(verbose, quiet)
        for name, make in makers.items():
            if named.get(name) is None:
                named[name] = make()
        return function(*values, **named)

    del command.__wrapped__  # cyclopts reads what is set here
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def split_names(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
