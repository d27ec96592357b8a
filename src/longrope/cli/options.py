"""Options of the command line: those that several verbs share, and how a configuration becomes options.

A verb is a function under `@verb`. Its parameter `config: Annotated[SearchConfig, Options("Search")]` becomes one
option for each setting of `SearchConfig`: name, type, help and default are written in the configuration alone. The verb
receives the finished `SearchConfig`.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter
from cyclopts.types import NonNegativeInt
from pydantic import BaseModel, Field, create_model, model_validator

from longrope.cli.common import set_verbosity
from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.settings import Settings

OUTPUT = Group("Output", sort_key=9)


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
            default = self.defaults.get(
                name, ... if info.is_required() else info.get_default(call_default_factory=True)
            )
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


def _needs_tensorboard(_kind: Any, log_dir: Path | None) -> None:
    """Refuse --log-dir before any work where tensorboard is not installed."""
    if log_dir is not None and find_spec("tensorboard") is None:
        raise LongRopeError(
            "`log_dir` needs TensorBoard, which is not installed",
            code="missing-dependency",
            hint='pip install "tensorboard"',
        )


Model = Annotated[
    str, Parameter(help="A model folder, the folder of a run, a hub name (owner/model), 'tiny' or 'tiny-512x'.")
]
Data = Annotated[
    list[str] | None,
    Parameter(
        name="--data",
        metavar="TEXT",
        negative=(),
        help="Text: .txt(.gz|.xz), a folder, .jsonl, .parquet, book:NAME or hf:NAME. May be repeated.",
    ),
]
TargetLength = Annotated[str, Parameter(metavar="TOKENS", help="The new window L' in tokens: 4096, 128k, 2M.")]
Resume = Annotated[bool, Parameter(help="Continue the interrupted run in the output folder.")]
Seed = Annotated[NonNegativeInt, Parameter(help="Seed of everything random.")]
LogDir = Annotated[
    Path | None, Parameter(help="Write TensorBoard scalars to this folder.", validator=_needs_tensorboard)
]
Json = Annotated[
    bool,
    Parameter(name="--json", group=OUTPUT, help="Print one JSON object on standard output and nothing else there."),
]
Verbose = Annotated[
    bool,
    Parameter(name=("--verbose", "-v"), group=OUTPUT, help="Log each step, and the traceback of an unexpected error."),
]
Quiet = Annotated[bool, Parameter(name=("--quiet", "-q"), group=OUTPUT, help="No progress and no remarks.")]

LOADING = "Loading the model"
Load = Annotated[LoadOptions, Options(LOADING, place=5)]
ConfigOnly = Annotated[LoadOptions, Options(LOADING, only=("original_length", "trust_remote_code"), place=5)]
"""For verbs that read a model's config and no weights."""


def output(help: str) -> Parameter:
    """The option -o of a verb."""
    return Parameter(name=("-o", "--output"), help=help)


def json_object(name: str, path: Path | None) -> dict[str, Any]:
    """The JSON object in the file that the option `name` names; empty without one."""
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LongRopeError(f"cannot read `{name}` {path}: {error}", code="damaged-file") from error
    if not isinstance(value, dict):
        raise LongRopeError(
            f"expected a JSON object in `{name}` {path}, found {type(value).__name__}", code="damaged-file"
        )
    return value
