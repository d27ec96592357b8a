"""Absurd values: each number option of each verb, and each file argument, with all that nobody means; one line each.

The options are read from the command line's own parsers, so a new option is tried as soon as it exists.
"""

from __future__ import annotations

import os
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

NUMBERS = ("-1", "100000000000000000000", "nan", "1e308", "inf", "-inf", "1e400", "", "many")
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
    "--needle-depth": ("--method", "longrope", "--objective", "needle", "--target-length", "512"),
    "--lora-alpha": ("--lora", "2"),
    "--threshold": ("--suite", "ruler"),
    "--share": ("--suite", "ruler"),
    "--trials": ("--suite", "needle"),
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


@pytest.mark.parametrize("values", [(*NUMBERS[:3], ZERO), pytest.param(NUMBERS[3:], marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize(("verb", "option"), CASES, ids=str)
def test_numbers(
    verb: str,
    option: str,
    values: tuple[str, ...],
    commands: dict[str, Any],
    cli: Callable[..., Ran],
    tmp_path: Path,
) -> None:
    wrong = []
    for value in values:
        command = changed(commands[verb], option, value)
        said = outcome(cli, command)
        accepted = not said.startswith("longrope: error: ")
        if accepted != (value == ZERO and option in ZERO_IS_FINE):
            wrong.append((value, said))
        if accepted:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert not (tmp_path / "out").exists(), command
    assert not wrong


def files(verb: str) -> list[str]:
    """The options and positional arguments of a verb that name a file or a folder to read."""
    found = []
    for argument in options_of(verb):
        kinds = {argument.hint, *get_args(argument.hint)}
        texts = argument.name in FILES_AS_TEXT
        if argument.names != ("*",) and (kinds & {Path} or texts) and argument.name not in WRITTEN:
            found.append(argument.name)
    return found


FILES_AS_TEXT = ("MODEL", "--data", "--eval-data", "--recipe", "--against", "--original", "--tasks", "NAME", "--model")
WRITTEN = ("-o", "--log-dir", "--figures")
SUFFIX = {
    "--data": ".txt",
    "--eval-data": ".txt",
    "--recipe": ".yaml",
    "--against": ".json",
    "--tasks": ".yaml",
    "--gguf": ".gguf",
    "--from-file": ".csv",
    "CHECKPOINT": ".gguf",
}
WITH = {
    "--tasks": ("--suite", "retention"),
    "--qa-file": ("--suite", "ruler,perplexity", "--ruler-tasks", "qa_1"),
    "--original": ("--against", "original"),
    "--gguf": ("--to", "gguf"),
}
ODD = ("pipe", "folder", "empty", "binary", "device", "missing", "circle", "nul", "large", "list", "deep", "digits")


def odd_file(folder: Path, kind: str, suffix: str) -> str:
    """A file that is none of what a verb reads."""
    path = folder / f"odd-{kind}{suffix or '.json'}"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "binary":
            path.write_bytes(bytes(range(256)) * 100)
        case "device":
            path.symlink_to("/dev/zero")
        case "circle":
            path.symlink_to(path.name)
        case "nul":
            return "a\0b"
        case "large":
            with path.open("wb") as file:
                file.truncate(10**10)  # sparse: it takes no room
        case "list":
            path.write_text("[1, 2, 3]")
        case "deep":
            path.write_text("[" * 100_000)
        case "digits":
            path.write_text('{"schema": ' + "9" * 10_000 + "}")
    return str(path)


@pytest.mark.parametrize("kinds", [ODD[:3], pytest.param(ODD[3:], marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize(("verb", "option"), [(verb, name) for verb in VERBS for name in files(verb)], ids=str)
def test_files(
    verb: str,
    option: str,
    kinds: tuple[str, ...],
    commands: dict[str, Any],
    cli: Callable[..., Ran],
    tmp_path: Path,
) -> None:
    wrong = []
    for kind in kinds:
        if kind in ("list", "deep", "digits") and SUFFIX.get(option) == ".txt":
            continue  # text like any other
        place = odd_file(tmp_path, kind, SUFFIX.get(option, ""))
        parts = list(commands[verb])
        if option.startswith("-"):
            while option in parts:
                at = parts.index(option)
                del parts[at : at + 2]
            more = [part for part in WITH.get(option, ()) if verb != "finetune"]
            if option == "--recipe":
                parts = ["extend", parts[1], "-o", tmp_path / "out"]
            parts += [*more, option, place]
        elif len(parts) > 1 and verb != "presets":
            parts[1] = place
        else:
            parts = [parts[0], place]
        said = outcome(cli, tuple(parts))
        if not said.startswith("longrope: error: ") or len(said) > 1000:
            wrong.append((kind, said[:300]))
        if (tmp_path / "out").exists():
            wrong.append((kind, "an output is left"))
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not wrong
