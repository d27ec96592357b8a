"""The JSON of `RopeScaling`: bit-exact round trips, and every kind of file that is not a scaling."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import SCHEMA, RopeScaling, Window

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def scalings(draw: st.DrawFn) -> RopeScaling:
    pairs = draw(st.integers(1, 6))
    geometry = RopeGeometry(
        rotary_dim=2 * pairs,
        base=draw(st.floats(1, 1e9, exclude_min=True)),
        original_length=draw(st.integers(2, 10**6)),
    )
    lengths = draw(st.lists(st.integers(1, 10**7), min_size=1, max_size=3, unique=True))
    windows = tuple(
        Window(
            length,
            tuple(draw(st.lists(st.floats(1e-3, 1e9), min_size=pairs, max_size=pairs))),
            draw(st.integers(0, 256)),
            draw(positive),
        )
        for length in sorted(lengths)
    )
    return RopeScaling(geometry, windows, draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3)))


def _bits(scaling: RopeScaling) -> list[str]:
    numbers = [scaling.geometry.base]
    for window in scaling.windows:
        numbers += [*window.factors, window.attention_factor]
    return [number.hex() for number in numbers]


@given(scalings())
def test_round_trip_is_bit_exact(scaling: RopeScaling) -> None:
    again = RopeScaling.from_json(scaling.to_json())
    assert again == scaling
    assert _bits(again) == _bits(scaling)
    assert again.to_json() == scaling.to_json()


def _example() -> RopeScaling:
    geometry = RopeGeometry(rotary_dim=8, base=1e4, original_length=256)
    provenance = {"λ": "ünïcode", "seed": 0}
    return RopeScaling.extended(geometry, 2048, (1.0, 1.1, 0.1 + 0.2, 8.5), 4, 1.0 / 3.0, provenance)


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    _example().save(path)
    assert RopeScaling.load(path) == _example()
    assert RopeScaling.load(str(path)) == _example()
    assert path.read_text(encoding="utf-8") == _example().to_json()
    assert json.loads(path.read_bytes()) == {
        "schema": "longrope.scaling/1",
        "rotary_dim": 8,
        "base": 10000.0,
        "original_length": 256,
        "windows": [
            {"max_length": 256, "factors": [1.0] * 4, "start_tokens": 0, "attention_factor": 1 / 3},
            {"max_length": 2048, "factors": [1.0, 1.1, 0.1 + 0.2, 8.5], "start_tokens": 4, "attention_factor": 1 / 3},
        ],
        "provenance": {"λ": "ünïcode", "seed": 0},
    }


def test_whole_numbers_are_factors_too() -> None:
    document = json.loads(_example().to_json())
    document["windows"][0]["factors"] = [1, 1, 1, 1]
    document["base"] = 10000
    assert RopeScaling.from_json(json.dumps(document)) == _example()


def _set(*path: Any, value: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


def _drop(*path: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("schema", value="longrope.scaling/2"),
            f"expected a scaling with schema '{SCHEMA}'; found schema 'longrope",
        ),
        (_drop("schema"), f"expected a scaling with schema '{SCHEMA}'; found JSON without it"),
        (_drop("base"), "the scaling lacks base"),
        (_drop("windows"), "the scaling lacks windows"),
        (_drop("provenance"), "the scaling lacks provenance"),
        (_set("extra", value=1), "the scaling has unknown keys: 'extra'"),
        (_set("rotary_dim", value="8"), "rotary_dim must be a whole number"),
        (_set("rotary_dim", value=7), "rotary_dim must be even"),
        (_set("rotary_dim", value=16), r"windows\[0\].factors must hold 8 factors for rotary_dim 16; found 4"),
        (_set("base", value=None), "base must be a finite number"),
        (_set("original_length", value=256.5), "original_length must be a whole number"),
        (_set("windows", value={}), "windows must be a list"),
        (_set("windows", value=[]), "windows must hold at least one"),
        (_set("windows", value=[3]), r"windows\[0\] must be a JSON object; found 3"),
        (_set("provenance", value=[1]), "provenance must be a JSON object"),
        (_drop("windows", 1, "factors"), r"windows\[1\] lacks factors"),
        (_set("windows", 1, "n_hat", value=4), r"windows\[1\] has unknown keys: 'n_hat'"),
        (_set("windows", 1, "start_tokens", value=1.5), r"windows\[1\].start_tokens must be"),
        (_set("windows", 1, "start_tokens", value=True), r"windows\[1\].start_tokens must be"),
        (_set("windows", 1, "attention_factor", value="1"), r"windows\[1\].attention_factor must be"),
        (_set("windows", 1, "factors", value="1,2"), r"windows\[1\].factors must be a sequence"),
        (_set("windows", 1, "factors", 2, value=None), r"windows\[1\].factors\[2\] must be"),
        (_set("windows", 1, "factors", 2, value=10**400), r"windows\[1\].factors\[2\] must be a finite number"),
        (_set("windows", 1, "factors", 2, value=float("nan")), "expected finite numbers; found NaN"),
        (_set("windows", 1, "max_length", value=256), "windows must have strictly increasing"),
    ],
)
def test_wrong_fields(tmp_path: Path, change: Any, message: str) -> None:
    document = json.loads(_example().to_json())
    change(document)
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps(document))
    with pytest.raises(LongRopeError, match=f"^{re.escape(str(path))}: {message}") as caught:
        RopeScaling.load(path)
    assert caught.value.code == "damaged-file"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a scaling: expected JSON, found"),
        (b"not json", "is not a scaling: expected JSON, found"),
        (b"\xff\xfe\x00\x01", "is not a scaling: .* not UTF-8"),
        (b"[" * 100_000, "is not a scaling: expected JSON, found"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "is not a scaling: expected JSON, found"),
        (b"[]", "expected a scaling with schema"),
        (b"null", "expected a scaling with schema"),
        (b'{"model_type": "llama"}', "expected a scaling with schema .* found JSON without it"),
        (b'{"schema": "a", "schema": "longrope.scaling/1"}', "expected every key once"),
        (b'{"schema": "longrope.scaling/1", "base": 1e999}', "the scaling lacks"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "scaling.json"
    path.write_bytes(content)
    with pytest.raises(LongRopeError, match=message) as caught:
        RopeScaling.load(path)
    assert caught.value.code == "damaged-file"
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused() -> None:
    text = _example().to_json().rstrip()
    for end in range(len(text)):
        with pytest.raises(LongRopeError, match="expected JSON"):
            RopeScaling.from_json(text[:end])


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match=r"cannot read the scaling .*missing\.json': No such file"):
        RopeScaling.load(tmp_path / "missing.json")
    with pytest.raises(LongRopeError, match="cannot read the scaling"):
        RopeScaling.load(tmp_path)
    with pytest.raises(LongRopeError, match="cannot write"):
        _example().save(tmp_path / "no" / "scaling.json")
