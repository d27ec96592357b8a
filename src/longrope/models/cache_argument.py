"""The argument that carries a cache: `cache` in transformers from 5.24 on, `past_key_values` in releases before it.

Signatures decide, not versions: the code of a checkpoint may use one name where the installed transformers uses the
other. A cache under a name that a function does not know is left unused without an error, and the text is then wrong.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from torch import nn
from transformers import Cache, DynamicCache

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


def cache_fault(model: nn.Module, base: nn.Module) -> str:
    """The reason why the classes of a family cannot go on from a text in a dynamic cache; empty where none is known.

    `base` is `model` below its head. A family may take no cache there, or one of a class of its own, or keep the last
    tokens only in a cache whose text it attends to as a whole.
    """
    try:
        name = forward_argument(base)
    except LongRopeError as error:
        return error.message
    kinds = [kind for kind in _annotated(base, name) if isinstance(kind, type) and issubclass(kind, Cache)]
    if kinds and not any(issubclass(DynamicCache, kind) for kind in kinds):
        return f"it wants a cache of its own, {kinds[0].__name__}"
    code = sys.modules[type(base).__module__]
    made_here = type(base).__module__.startswith("transformers.")  # code of a checkpoint may make masks anywhere
    masks = [name for name in vars(code) if "mask" in name and ("sliding" in name or "chunked" in name)]
    if made_here and not masks and "create_masks_for_generate" not in vars(code):
        layers: list[Any] = list(DynamicCache(config=model.config).layers)
        if any(getattr(layer, "is_sliding", False) for layer in layers):
            return "it attends to the whole text, but its cache keeps a sliding window of it"
    return ""


def _annotated(module: nn.Module, argument: str) -> tuple[Any, ...]:
    """The classes in the annotation of an argument of the module's forward; none where it cannot be read."""
    try:
        hint = get_type_hints(type(module).forward).get(argument)
    except Exception:  # names that exist for type checkers only
        return ()
    return get_args(hint) or (hint,)


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
