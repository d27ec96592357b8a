"""The argument that carries a cache: `cache` in transformers from 5.24 on, `past_key_values` in releases before it.

Signatures decide, not versions: the code of a checkpoint may use one name where the installed transformers uses the
other. A cache under a name that a function does not know is left unused without an error, and the text is then wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import Cache

from longrope.errors import LongRopeError

CACHE_NAMES = ("cache", "past_key_values")


def cache_argument(*functions: Callable[..., Any]) -> str:
    """The name under which the first of `functions` that takes a cache takes it: its own parameter, not its `**`.

    Raises LongRopeError when none has such a parameter.
    """
    for function in functions:
        parameters = inspect.signature(function).parameters
        for name in CACHE_NAMES:
            if name in parameters:
                return name
    raise LongRopeError(
        f"expected {functions[0].__qualname__} to take {' or '.join(CACHE_NAMES)}, found neither among its arguments",
        code="no-cache",
        hint="use a version of transformers that longrope was tested with",
    )


def forward_argument(module: nn.Module) -> str:
    """`cache_argument` of the forward of `module`, or of its class's, for which a wrapper may stand in."""
    return cache_argument(module.forward, type(module).forward)


def with_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments by which `module` uses `cache` and adds to it; for None, those of a forward without a cache."""
    return {"use_cache": False} if cache is None else {forward_argument(module): cache, "use_cache": True}


def arguments_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the call `function(*args, **kwargs)` by name, those that its `**` takes among them."""
    signature = inspect.signature(function)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def take_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache out of `arguments`, whatever name it has there; None where there is none.

    Raises LongRopeError for more than one.
    """
    found = [name for name, value in arguments.items() if name in CACHE_NAMES or isinstance(value, Cache)]
    caches = {name: cache for name in found if (cache := arguments.pop(name)) is not None}
    if len(caches) > 1:
        raise LongRopeError(
            f"expected one cache, found {' and '.join(sorted(caches))}", code="no-cache", hint="give one of them"
        )
    return next(iter(caches.values()), None)
