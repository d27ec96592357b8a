"""The name of the cache's argument, found in signatures; the functions around it that generation rests on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache

from longrope.errors import LongRopeError
from longrope.models.cache_argument import (
    CACHE_NAMES,
    arguments_of,
    cache_argument,
    forward_argument,
    take_cache,
    with_cache,
)
from tests.models.families import tiny_model, tokens


def test_a_name_is_a_parameter() -> None:
    def new(ids: Any, cache: Any = None) -> None: ...

    def old(ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...

    def neither(ids: Any, **kwargs: Any) -> None: ...

    assert [cache_argument(new), cache_argument(old), cache_argument(neither, old)] == [*CACHE_NAMES, "past_key_values"]
    with pytest.raises(LongRopeError, match="to take cache or past_key_values, found neither") as error:
        cache_argument(neither)
    assert error.value.code == "no-cache"


@pytest.mark.parametrize("wrap", [functools.wraps, lambda own: lambda wrapper: wrapper])
def test_a_wrapped_forward(wrap: Any) -> None:
    """Accelerate's hooks keep the signature of the forward that they wrap, other wrappers have none."""
    model = tiny_model("llama")
    own = model.forward

    @wrap(own)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    plain = forward_argument(model)
    model.forward = wrapper
    assert forward_argument(model) == plain
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(5), **with_cache(model, cache))
    assert cache.get_seq_length() == 5


def test_arguments_by_name() -> None:
    def function(first: int, second: int = 2, **others: int) -> None: ...

    assert arguments_of(function, (1,), {"third": 3}) == {"first": 1, "third": 3}
    assert arguments_of(function, (1, 5), {}) == {"first": 1, "second": 5}
    with pytest.raises(TypeError):
        arguments_of(function, (), {})


def test_the_cache_is_taken_out() -> None:
    cache: Cache = DynamicCache()
    for name in (*CACHE_NAMES, "anything"):
        arguments = {name: cache, "use_cache": True}
        assert take_cache(arguments) is cache
        assert name not in arguments
    assert take_cache({"cache": None, "past_key_values": cache}) is cache
    assert take_cache({"use_cache": True}) is None
    with pytest.raises(LongRopeError, match="expected one cache, found cache and past_key_values"):
        take_cache(dict.fromkeys(CACHE_NAMES, cache))
