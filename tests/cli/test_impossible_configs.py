"""A config.json with impossible values: one line from each verb that reads it, before a model is built."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Ran

COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "head_dim",
    "max_position_embeddings",
)
VALUES = (0, -1, 10**9 * 10**9, 10**20, 2.5, "two", [], {}, True, float("nan"), 1e300)
ROPE = (
    {"rope_theta": 0},
    {"rope_theta": -1.0},
    {"rope_theta": float("nan")},
    {"rope_theta": float("inf")},
    {"rope_theta": "ten"},
    {"rope_type": "linear", "factor": 0},
    {"rope_type": "linear", "factor": -2.0},
    {"rope_type": "linear", "factor": float("nan")},
    {"rope_type": "yarn", "factor": "four"},
    {"rope_type": "yarn", "factor": 1e308},
    {"rope_type": "yarn", "factor": 10**400},
    {"rope_type": "yarn", "factor": float("nan")},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e308},
    {"rope_type": "linear", "factor": 1e308},
    {"rope_type": "linear", "factor": -1e308},
    {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 10**400},
    {"rope_type": "longrope", "short_factor": [], "long_factor": [], "attention_factor": 10**400},
    {"rope_type": "longrope", "short_factor": [], "long_factor": []},
    {"rope_type": "longrope", "short_factor": [1] * 16, "long_factor": [0] * 16},
    {"rope_type": "longrope", "short_factor": [1] * 16, "long_factor": ["a"] * 16},
    {"rope_type": "longrope", "short_factor": [1] * 16, "long_factor": [float("nan")] * 16},
    {"rope_type": 3},
    {"rope_type": ["longrope"]},
    {"partial_rotary_factor": 0},
    {"partial_rotary_factor": -1},
    {"partial_rotary_factor": float("inf")},
    {"partial_rotary_factor": 1e300},
)


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "model")
    return tmp_path / "model"


def outcomes(cli: Callable[..., Ran], model: Path, **changes: object) -> list[tuple[str, str]]:
    """What is wrong with the outcome of the verbs for a changed config: verb and said."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads((model / "whole.json").read_text()) | changes))
    wrong = []
    for verb in (("inspect", model), ("doctor", model), ("plan", model, "--target-length", "1k")):
        ran = cli(*verb)
        if ran.code != 2 or not ran.err.startswith("longrope: error: ") or ran.err.count("\n") != 1:
            wrong.append((verb[0], f"{ran.code}: {(ran.err or ran.out)[:200]}"))
    return wrong


@pytest.mark.parametrize("name", COUNTS)
def test_sizes(name: str, model: Path, cli: Callable[..., Ran]) -> None:
    shutil.copy(model / "config.json", model / "whole.json")
    wrong = {}
    for value in VALUES:
        if found := outcomes(cli, model, **{name: value}):
            wrong[str(value)] = found
    assert not wrong


@pytest.mark.parametrize(
    "inside",
    [
        {"vision_config": {"num_hidden_layers": 10**9}},
        {"thinker_config": {"audio_config": {"d_model": 10**9}}},
        {"n_layer": 10**9},
    ],
    ids=str,
)
def test_sizes_of_the_parts_inside(inside: dict[str, object], model: Path, cli: Callable[..., Ran]) -> None:
    shutil.copy(model / "config.json", model / "whole.json")
    assert not outcomes(cli, model, **inside)


@pytest.mark.parametrize("number", range(len(ROPE)))
def test_rope(number: int, model: Path, cli: Callable[..., Ran]) -> None:
    whole = json.loads((model / "config.json").read_text())
    shutil.copy(model / "config.json", model / "whole.json")
    parameters = {"rope_type": "default", "rope_theta": 10000.0} | ROPE[number]
    assert "rope_parameters" in whole
    faults = outcomes(cli, model, rope_parameters=parameters)
    # The doctor has a verdict on most of them, which is no error.
    assert not [one for one in faults if one[0] != "doctor" or "Trace" in one[1] or "unexpected error" in one[1]]
