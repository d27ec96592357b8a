"""A kill before each file operation of each verb: the same command goes on to the files of a run that was left alone.

`tests/moments.py` takes the states. `python -m pytest tests/test_kills.py -m slow -s` prints how many there were.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrope.models.loading import open_model
from longrope.provenance import CIRCUMSTANCES
from longrope.run_files import LOCK, WRITTEN
from tests.moments import content, moments
from tests.recipes.recipes import EVALUATE, EXPORT, RECOVER, SEARCH_4, TRAIN_4, write_recipe
from tests.train.runs import TARGET, files_of_at_most, yarn_scaling

Cli = Callable[..., Any]
FEW = ["--method", "longrope", "--population", 4, "--iterations", 1, "--samples", 1]
TWO_STEPS = ["--steps", 2, "--batch", 1, "--warmup", 0, "--save-every", 1]
BEGIN_ANEW = "start without --resume"
FINISHED = ("is finished", " exists; nothing is overwritten", "is not empty; nothing is overwritten")


@pytest.fixture
def scaling(checkpoint: Path, tmp_path: Path) -> Path:
    """A scaling for the random checkpoint."""
    path = tmp_path / "given.json"
    yarn_scaling(open_model(str(checkpoint))).save(path)
    return path


def result(folder: Path) -> dict[str, Any]:
    """All that a run left, but for what differs between two runs of the same command: how often a file was written,
    when and for how long the run worked, the drawn name of a fine-tuning, the hash of a file with such a thing in it.
    """
    found: dict[str, Any] = {}
    for path, data in content(folder).items():
        name = Path(path).name
        if data is not None and name.endswith(".json"):
            found[path] = without(json.loads(data), {*CIRCUMSTANCES, "run", "sha256", "read"})
        elif name.endswith((".html", ".csv")):
            found[path] = bool(data)
        elif name not in (LOCK, WRITTEN):
            found[path] = data
    return found


def without(value: Any, keys: set[str]) -> Any:
    """A JSON value without these keys, however deep."""
    if isinstance(value, dict):
        return {key: without(inner, keys) for key, inner in value.items() if key not in keys}
    return [without(inner, keys) for inner in value] if isinstance(value, list) else value


def killed_before_each(
    cli: Cli,
    command: list[object],
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    resume: bool = True,
    every: int = 1,
) -> int:
    """Run `command`, whose files come into the folder `out`, then again from each state that a kill leaves, or from
    one in `every`.

    Returns the number of states, all of which have come to the same files.
    """
    with moments(out, tmp_path / "moments", monkeypatch) as watched:
        done = cli(*command)
    assert done.code == 0, done
    whole = result(out)
    different = []
    tried = watched.states[::every]
    for state in tried:
        watched.put_back(state)
        again = cli(*command, *(["--resume"] if resume else []))
        if again.code == 2 and BEGIN_ANEW in again.err:
            again = cli(*command)
        found = result(out)
        ended = again.code == 0 or (again.code == 2 and any(said in again.err for said in FINISHED))
        if found != whole or not ended:
            names = sorted(name for name in found.keys() | whole.keys() if found.get(name, 0) != whole.get(name, 0))
            different.append((state.name, again.code, again.err.strip()[-300:], names[:5]))
    print(f"\n{command[0]}: {watched.operations} file operations, {len(tried)} states, {len(different)} differ")
    assert different == []
    return len(tried)


@pytest.mark.slow
def test_search(cli: Cli, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out/run"
    command = ["search", checkpoint, "--target-length", 128, "--data", texts / "search.txt", *FEW, "-o", out]
    assert killed_before_each(cli, command, out.parent, tmp_path, monkeypatch) > 20


@pytest.mark.slow
def test_eval(
    cli: Cli, checkpoint: Path, texts: Path, scaling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    measured = ["--suite", "perplexity,passkey", "--lengths", TARGET, "--against", "none", "--trials", 2]
    command = ["eval", checkpoint, "--scaling", scaling, "--data", texts / "other.txt", "--samples", 1, *measured]
    assert killed_before_each(cli, [*command, "-o", out / "eval.json"], out, tmp_path, monkeypatch) > 10


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora", 2, "--adapter"]], ids=["whole", "adapter"])
def test_finetune(
    cli: Cli,
    checkpoint: Path,
    texts: Path,
    scaling: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[object],
) -> None:
    out = tmp_path / "out/run"
    steps = ["--length", TARGET, "--steps", 4, "--batch", 1, "--warmup", 0, "--save-every", 1, *more]
    command = ["finetune", checkpoint, "--scaling", scaling, "--data", texts / "search.txt", *steps, "-o", out]
    assert killed_before_each(cli, command, out.parent, tmp_path, monkeypatch) > 50


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "phi3", "gguf"])
def test_export(
    cli: Cli, checkpoint: Path, scaling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    output = out / ("model.gguf" if to == "gguf" else "model")
    command = ["export", checkpoint, "--scaling", scaling, "--to", to, "-o", output]
    states = killed_before_each(cli, command, out, tmp_path, monkeypatch, resume=False)
    assert states > (2 if to == "gguf" else 10)


@pytest.mark.slow
def test_extend(cli: Cli, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out/run"
    data = ["--data", texts / "search.txt", "--eval-data", texts / "other.txt", "--eval-samples", 1]
    command = ["extend", checkpoint, "--target-length", 128, *data, *FEW, "-o", out]
    assert killed_before_each(cli, command, out.parent, tmp_path, monkeypatch) > 60


@pytest.mark.slow
def test_a_recipe(cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out/run"
    stages = (
        SEARCH_4,
        {**TRAIN_4, "steps": 2},
        {**RECOVER, "lengths": ["1x"]},
        {**EVALUATE, "lengths": ["4x"]},
        EXPORT,
    )
    path = write_recipe(tmp_path / "recipe", *stages)
    command = ["extend", checkpoint, "--recipe", path, "-o", out]
    # Its stages write some 700 states, most of them those of the verbs above.
    assert killed_before_each(cli, command, out.parent, tmp_path, monkeypatch, resume=False, every=30) > 10


# --- a full disk


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["search", "eval", "finetune", "export", "extend"])
def test_a_disk_that_is_full(cli: Cli, checkpoint: Path, texts: Path, scaling: Path, tmp_path: Path, verb: str) -> None:
    """A limit of the size of files stands in for it: each is one line, and with room again the job comes to its end."""
    out, searched, measured = tmp_path / "out", ["--data", texts / "search.txt"], ["--eval-data", texts / "other.txt"]
    command: list[object] = {
        "search": ["search", checkpoint, "--target-length", 128, *searched, *FEW],
        "eval": ["eval", checkpoint, "--scaling", scaling, "--data", texts / "other.txt", "--lengths", 128],
        "finetune": [*("finetune", checkpoint, "--scaling", scaling), *searched, "--length", TARGET, *TWO_STEPS],
        "export": ["export", checkpoint, "--scaling", scaling],
        "extend": ["extend", checkpoint, "--target-length", 128, *searched, *measured, "--eval-samples", 1, *FEW],
    }[verb]
    command += ["-o", out / "eval.json" if verb == "eval" else out / "run"]
    if verb == "eval":
        out.mkdir()
    refused = 0
    for size in (100, 1000, 3000, 10_000, 100_000, 400_000, 600_000, None):
        resume = ["--resume"] if verb != "export" and (out / "run").exists() | bool(list(out.glob("*.jsonl"))) else []
        with files_of_at_most(size):
            ran = cli(*command, *resume)
            if ran.code == 2 and BEGIN_ANEW in ran.err:
                ran = cli(*command)
        if ran.code == 0:
            break
        refused += 1
        lines = [line for line in ran.err.splitlines() if line.startswith("longrope: error: ")]
        assert (ran.code, len(lines)) == (2, 1), (size, ran)
        assert "Traceback" not in ran.err
    assert ran.code == 0, ran
    assert refused
    print(f"\n{verb}: refused on {refused} full disks, then done")
    assert not list(out.rglob(".longrope-*"))
