"""The path of one number: the frames of the package between a command and the model's forward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import longrope

PACKAGE = Path(longrope.__file__).parent


def frames() -> list[str]:
    """The functions of the package on the stack, outermost first, each file once in a row."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            found.append(path.relative_to(PACKAGE).as_posix())
        frame = frame.f_back  # type: ignore[assignment]
    return list(dict.fromkeys(reversed(found)))


@pytest.mark.parametrize("method", ["gradient", "longrope"])
def test_files_from_the_command_to_the_forward(
    method: str, cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    own = LlamaForCausalLM.forward

    def forward(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        seen.append(frames())
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    budget = ["--population", 2, "--iterations", 0] if method == "longrope" else ["--steps", 1, "--no-continuation"]
    ran = cli(
        "search", checkpoint, "--target-length", 128, "--data", texts / "search.txt", "--samples", 1, "-o",
        tmp_path / "run", "--method", method, *budget,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    path = [
        "cli/search.py",
        "search/run.py",
        f"search/{'gradient' if method == 'gradient' else 'evolution'}.py",
        "search/evaluator.py",
        "search/objective.py",
        "models/scoring.py",
    ]
    inside = [files for files in seen if path[2] in files]
    assert inside
    for files in inside:
        starts = ["search/start.py"] if "search/start.py" in files else []  # one file more while the start is chosen
        expected = [*path[:3], *starts, *path[3:]]
        assert [file for file in files if file not in ("cli/main.py", "cli/verb.py", "models/chunked.py")] == expected
    assert any("search/start.py" not in files for files in inside)
