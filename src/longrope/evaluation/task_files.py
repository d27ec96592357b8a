"""Task files of lm-eval from strangers: which of them are plain data, and a sandbox for their templates.

A task of lm-eval is a YAML file, and lm-eval runs the code that it names: Python beside it (`!function`, `class`),
metrics of the `evaluate` library (a folder with a script, here or on the hub), pickled data. Its templates are Jinja
without a sandbox, which can call anything. Without consent a file may hold plain data only, and its templates run in
Jinja's sandbox. The tasks that lm-eval has by name are part of lm-eval, which the user installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2.sandbox import SandboxedEnvironment

from longrope.errors import LongRopeError
from longrope.evaluation.config import HarnessTask
from longrope.safe_yaml import TagError, parse_yaml, read_yaml

_CODE = ("class", "custom_dataset", "process_docs", "process_results", "use_prompt", "unsafe_code")
"""Keys of a task that name code or what runs it; in today's lm-eval most of them by `!function` only."""
_TRUST = "trust_remote_code"
_SCRIPTS = (".py", ".pkl", ".pickle")
_PICKLES = ("pandas",)
"""Builders of `datasets` that unpickle."""


def refuse_code(tasks: Sequence[HarnessTask]) -> None:
    """Raise LongRopeError (`untrusted-code`) for a task file that runs code, itself or by a file that it includes.

    Raises LongRopeError for a file that cannot be read, too.
    """
    for task in tasks:
        if task.is_file:
            _check_file(Path(task.name), [])


def _check_file(path: Path, within: list[Path]) -> None:
    path = path.expanduser().resolve()
    if path in within:
        raise LongRopeError(f"{path} includes itself", code="damaged-file")
    try:
        raw = parse_yaml(read_yaml(path), str(path))
    except TagError as error:
        raise _untrusted(path, error.message.rpartition(": ")[2]) from error
    included = raw.get("include", [])
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise LongRopeError(f"{path}: expected file names under 'include', found {name!r}", code="damaged-file")
        _check_file(path.parent / name, [*within, path])
    _check_values(path, raw)


def _check_values(path: Path, value: Any) -> None:
    """Raise LongRopeError where a mapping anywhere in `value` names code."""
    if isinstance(value, list):
        for item in value:
            _check_values(path, item)
    elif isinstance(value, Mapping):
        for name in _CODE:
            if value.get(name) not in (None, False):
                raise _untrusted(path, f"it has the key {name!r}")
        _check_metric(path, value)
        _check_data(path, value)
        for inner in value.values():
            _check_values(path, inner)


def _check_metric(path: Path, value: Mapping[Any, Any]) -> None:
    """Raise LongRopeError for a metric that lm-eval lacks: the `evaluate` library would run its script."""
    from lm_eval.api import metrics  # noqa: F401  # fills the registry
    from lm_eval.api.registry import metric_registry

    name = value.get("metric")
    if name is not None and (value.get("hf_evaluate") or not isinstance(name, str) or name not in metric_registry):
        raise _untrusted(path, f"the metric {name!r} is not lm-eval's own")


def _check_data(path: Path, value: Mapping[Any, Any]) -> None:
    data = str(value.get("dataset_path", ""))
    if data in _PICKLES or data.endswith(_SCRIPTS):
        raise _untrusted(path, f"its data {data!r} is code, or unpickled")
    if value.get(_TRUST):
        raise _untrusted(path, f"it sets {_TRUST} by itself")


def _untrusted(path: Path, why: str) -> LongRopeError:
    return LongRopeError(
        f"the task file {path} would run code that comes with it: {why}",
        code="untrusted-code",
        hint=f"if you trust it, give `{_TRUST}=True`",
    )


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """lm-eval's templates in Jinja's sandbox for the length of a `with` block."""
    from lm_eval import utils

    open_environment = utils.env
    sandbox = SandboxedEnvironment(
        loader=open_environment.loader,
        undefined=open_environment.undefined,
        keep_trailing_newline=open_environment.keep_trailing_newline,
    )
    sandbox.filters.update(open_environment.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = open_environment
