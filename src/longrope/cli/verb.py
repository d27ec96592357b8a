"""A verb of the command line: a function whose configurations become options.

A verb is a function under `@verb`. Its parameter `config: Annotated[SearchConfig, Options("Search")]` becomes one
option for each setting of `SearchConfig`: name, type, help and default are written in the configuration alone. The verb
receives the finished `SearchConfig`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter
from pydantic import BaseModel, Field, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from longrope.cli.common import log, set_verbosity
from longrope.cli.stopping import stopping, unwind_on_interrupt
from longrope.errors import LongRopeError
from longrope.provenance import command_line
from longrope.settings import Settings
from longrope.units import parse_duration

OUTPUT = Group("Output", sort_key=9)
Verbose = Annotated[
    bool,
    Parameter(
        name=("--verbose", "-v"),
        group=OUTPUT,
        help="Details in what is printed, a log of each step, the traceback of an unexpected error.",
    ),
]
TimeLimit = Annotated[
    str | None,
    Parameter(
        name="--time-limit",
        metavar="TIME",
        help="Stop after this time, such as 3h55m or 03:55:00, so that --resume goes on. Exit code 75, as after SIGTERM"
        " and SIGUSR1.",
    ),
]
Quiet = Annotated[bool, Parameter(name=("--quiet", "-q"), group=OUTPUT, help="No progress and no remarks.")]


@dataclass(frozen=True)
class Options:
    """Turns the settings of a configuration into the options of one group of the help.

    `of`: the configuration, where the verb's parameter is a dict: the verb then receives the given settings, as text.
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
        """For a parameter annotated `hint`: the type that cyclopts reads in its place, the function that makes the
        parameter's value when no option is given, and whether one of them must be given.

        The type is a pydantic model with the same fields, each with its option. It converts nothing: the configuration
        gets the text of the command line, so that every error is the configuration's.
        """
        config: type[Settings] = self.of or hint
        make: Callable[..., Any] = dict if self.of else config
        chosen = [name for name in self.only or config.model_fields if name not in self.without]
        methods_of: Mapping[str, tuple[str, ...]] = getattr(config, "OF_METHODS", {})
        fields: dict[str, Any] = {
            name: self._field(name, config.model_fields[name], methods_of.get(name, ())) for name in chosen
        }
        lists = [name for name in chosen if get_origin(config.model_fields[name].annotation) is tuple]

        def made(_view: type[BaseModel], given: dict[str, Any], _handler: Any) -> Any:
            return make(**given | {name: split_names(given[name], name) for name in lists if name in given})

        wrap: Any = model_validator(mode="wrap")
        view: Any = create_model(config.__name__, __validators__={"made": wrap(classmethod(made))}, **fields)
        required = any(info.is_required() for info in view.model_fields.values())
        return Annotated[view, Parameter(name="*", group=Group(self.group, sort_key=self.place))], make, required

    def _field(self, name: str, info: FieldInfo, methods: Sequence[str]) -> tuple[Any, Any]:
        """The type and the pydantic field that show the setting `name`, of `methods` alone if any, as an option."""
        option = self.names.get(name, f"--{name.replace('_', '-')}")
        text = " ".join(self.helps.get(name, info.description or "").replace("`", "").split())
        default: Any = info.default
        kind: Any = info.annotation
        if name in self.defaults:
            default = self.defaults[name]
            text = text if default is None else text.partition(" Default:")[0]
        text += f" For {', '.join(methods)}." if methods else ""
        if name in self.switches:
            default, kind = "on" if default else "off", str
        elif get_origin(kind) is tuple:
            default, kind = ",".join(map(str, default)), str
        parameter = Parameter(
            name=option,
            negative=f"--no-{option.removeprefix('--')}" if default is True else (),
            choices=("on", "off") if name in self.switches else None,
            metavar="TOKENS" if name.endswith("length") else None,
        )
        if default is None:
            kind = kind | None
        return Annotated[kind, parameter], Field(... if default is PydanticUndefined else default, description=text)


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

    long = "resume" in hints  # a job that can go on after a stop
    if long:
        limit = inspect.Parameter("time_limit", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=TimeLimit)
        parameters.append(limit)

    @functools.wraps(function)
    def command(
        *values: Any, verbose: bool = False, quiet: bool = False, time_limit: str | None = None, **named: Any
    ) -> int | None:
        unwind_on_interrupt()
        set_verbosity(verbose, quiet)
        log.info("%s", command_line())
        for name, make in makers.items():
            if named.get(name) is None:
                named[name] = make()
        if not long:
            return function(*values, **named)
        with stopping(None if time_limit is None else parse_duration(time_limit)):
            return function(*values, **named)

    del command.__wrapped__  # cyclopts reads the annotations and the signature set here
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def split_names(text: str | None, argument: str) -> tuple[str, ...]:
    """The parts of a comma-separated list; none where the option was not given.

    Raises LongRopeError where it was given and names nothing.
    """
    parts = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not parts:
        raise LongRopeError(f"expected names with commas for `{argument}`, found {text!r}", code="invalid-setting")
    return parts
