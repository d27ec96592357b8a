"""Settings: every fault in one line that names the setting, what was expected and what was found."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError

from longrope.errors import LongRopeError
from longrope.settings import Settings
from longrope.units import Length


class Inner(Settings):
    rank: int = Field(8, ge=1)
    """A nested setting."""


class Sample(Settings):
    method: Literal["one", "two"] = "one"
    """A choice."""
    samples: int | None = Field(None, ge=1, le=9)
    """A bounded number."""
    rate: float = Field(0.5, gt=0.0, lt=1.0, allow_inf_nan=False)
    """A number between."""
    length: Length = 64
    """A length."""
    names: tuple[str, ...] = Field((), max_length=2)
    """Names."""
    inner: Inner | None = None
    """Settings of settings."""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sample": 3}, "unknown setting `sample`; did you mean samples?"),
        ({"zzz": 3}, "unknown setting `zzz`; known: method, samples, rate, length, names, inner"),
        ({"method": "three"}, "expected `method` to be 'one' or 'two'; found 'three'"),
        ({"samples": 0}, "expected `samples` of at least 1, found 0"),
        ({"samples": 10}, "expected `samples` of at most 9, found 10"),
        ({"samples": 1.5}, "expected a whole number for `samples`, found 1.5"),
        ({"rate": 0}, "expected `rate` above 0, found 0"),
        ({"rate": 1}, "expected `rate` below 1, found 1"),
        ({"rate": float("nan")}, "expected a number for `rate`, found nan"),
        ({"length": "64 tokens"}, "`length`: a length must be a positive whole number of tokens"),
        ({"names": "a"}, "expected a list for `names`, found 'a'"),
        ({"inner": {"rank": 0}}, "expected `rank` of at least 1, found 0"),
        ({"inner": {"ranks": 1}}, "unknown setting `ranks`; did you mean rank?"),
        ({"names": ["a"] * 100}, "expected `names` to be a valid value"),
    ],
)
def test_a_fault_is_one_line(given: dict[str, Any], said: str) -> None:
    for make in (lambda: Sample(**given), lambda: Sample().replace(**given)):
        with pytest.raises(LongRopeError) as error:
            make()
        assert error.value.code == "invalid-setting"
        assert said in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 250


def test_replace_makes_another_and_changes_nothing() -> None:
    first = Sample(length="2k", inner={"rank": 4})
    second = first.replace(samples=2)
    assert (second.length, second.samples, second.inner) == (2048, 2, Inner(rank=4))
    assert first.samples is None
    with pytest.raises(ValidationError, match="frozen"):
        first.samples = 3  # type: ignore[misc]


def test_settings_come_back_from_their_json() -> None:
    settings = Sample(samples=3, names=["a"], inner=Inner())
    assert Sample.model_validate_json(settings.model_dump_json()) == settings


def test_every_setting_has_a_description() -> None:
    from longrope.evaluation.config import EvalConfig
    from longrope.search.config import SearchConfig
    from longrope.train.config import FinetuneConfig

    for config in (SearchConfig, EvalConfig, FinetuneConfig):
        assert all(field.description for field in config.model_fields.values())
