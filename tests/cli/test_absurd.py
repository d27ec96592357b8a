"""Absurd values: each number option of each verb, and each file argument, with all that nobody means; one line each.

The options are read from the command line's own parsers, so a new option is tried as soon as it exists.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from longrope.cli.main import VERBS, options_of
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from tests.conftest import Ran

NUMBERS = ("-1", "100000000000000000000", "1e308", "nan", "inf", "-inf", "1e400", "", "many")
"""Refused by every option that takes a number."""
ZERO, FRACTION = "0", "1.5"


LIMIT = 6  # seconds


class Work(BaseException):
    """Work has begun: the values were accepted."""


class Hang(BaseException):
    """Neither an end nor work that was told of."""


def too_long(*_: object) -> None:
    raise Hang


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a verb's work begins, `Work` is raised; a verb that neither works nor ends fails the test."""

    def begun(*_: object, **__: object) -> None:
        raise Work

    monkeypatch.setattr("longrope.search.evaluator.LoggedEvaluator.__call__", begun)
    monkeypatch.setattr("longrope.train.finetune._run_trainer", begun)
    monkeypatch.setattr("longrope.evaluation.run.run_tasks", begun)


def numeric(verb: str) -> list[str]:
    """The options of a verb that take a number: an int, a float or a length."""
    names = []
    for argument in options_of(verb):
        kinds = {argument.hint, *get_args(argument.hint)}
        named = argument.parameter.metavar == "TOKENS" or argument.name in NUMBERS_AS_TEXT
        if argument.names != ("*",) and argument.name.startswith("-") and (kinds & {int, float} or named):
            names.append(argument.name)
    return names


NUMBERS_AS_TEXT = ("--attention-factor", "--start-tokens", "--needle-depth", "--lengths")
"""Options that take names too."""
ZERO_IS_FINE = (
    "--seed",
    "--iterations",
    "--knots",
    "--start-tokens",
    "--needle-depth",
    "--warmup",
    "--weight-decay",
)
NEEDS = {
    "--population": ("--method", "longrope"),
    "--iterations": ("--method", "longrope"),
    "--steps": ("--method", "gradient"),
    "--knots": ("--method", "gradient"),
    "--learning-rate": ("--method", "gradient"),
    "--evaluations": ("--method", "cma"),
    "--needle-depth": ("--objective", "needle", "--target-length", "512"),
    "--lora-alpha": ("--lora", "2"),
    "--threshold": ("--suite", "ruler"),
    "--share": ("--suite", "ruler"),
    "--trials": ("--suite", "passkey"),
    "--depths": ("--suite", "needle"),
    "--needles": ("--suite", "needle"),
    "--workers": (),
}
"""What else must be given for an option to mean something."""


@pytest.fixture
def scaling(tmp_path: Path) -> Path:
    geometry = RopeGeometry(rotary_dim=32, base=10000.0, original_length=64)
    RopeScaling.extended(geometry, 128, [1.0] * 8 + [2.0] * 8).save(tmp_path / "scaling.json")
    return tmp_path / "scaling.json"


@pytest.fixture
def commands(checkpoint: Path, texts: Path, scaling: Path, tmp_path: Path) -> dict[str, tuple[object, ...]]:
    """A command of every verb that would be accepted."""
    out, data = ("-o", tmp_path / "out"), ("--data", texts / "search.txt")
    return {
        "inspect": ("inspect", checkpoint),
        "plan": ("plan", checkpoint, "--target-length", 128),
        "search": ("search", checkpoint, "--target-length", 128, *data, *out),
        "finetune": ("finetune", checkpoint, "--scaling", scaling, "--length", 128, "--batch", 2, *data, *out),
        "extend": ("extend", checkpoint, "--target-length", 128, *data, "--eval-data", texts / "other.txt", *out),
        "eval": ("eval", checkpoint, "--lengths", 64, *data),
        "export": ("export", checkpoint, "--scaling", scaling, *out),
        "doctor": ("doctor", checkpoint),
        "fix-config": ("fix-config", checkpoint, "--scaling", scaling, "--to", "hf"),
        "presets": ("presets", "--from-file", tmp_path / "factors.csv", "--model", checkpoint, "--target-length", 128),
        "report": ("report", tmp_path),
    }


def changed(command: tuple[object, ...], option: str, value: str) -> tuple[object, ...]:
    """`command` with an option's value, in the place of one that it has."""
    parts = list(command)
    if option in parts:
        at = parts.index(option)
        del parts[at : at + 2]
    more = [part for part in NEEDS.get(option, ()) if command[0] not in ("finetune", "plan") or part[2:] == "lora"]
    if command[0] == "finetune" and option == "--lora-alpha":
        more = ["--lora", "2"]
    return (*parts, *more, f"{option}={value}")


def outcome(cli: Callable[..., Ran], command: tuple[object, ...]) -> str:
    """The refusal, or `accepted`."""
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        ran = cli(*command)
    except Work:
        return "accepted"
    except Hang:
        return "still at work"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if ran.code == 0:
        return "accepted"
    said = ran.err.splitlines()
    if ran.code != 2 or len(said) != 1:
        return f"exit code {ran.code}: {ran.err}"
    return said[0]


CASES = [(verb, option) for verb in VERBS for option in numeric(verb)]


@pytest.mark.parametrize(("verb", "option"), CASES, ids=lambda value: value)
def test_numbers(verb: str, option: str, commands: dict[str, Any], cli: Callable[..., Ran], tmp_path: Path) -> None:
    wrong = []
    for value in (*NUMBERS, ZERO):
        command = changed(commands[verb], option, value)
        said = outcome(cli, command)
        accepted = not said.startswith("longrope: error: ")
        if accepted != (value == ZERO and option in ZERO_IS_FINE):
            wrong.append((value, said))
        if accepted:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert not (tmp_path / "out").exists(), command
    assert not wrong
