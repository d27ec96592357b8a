"""Provenance of an output: versions, machine and command."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib import metadata
from typing import Any


def versions() -> dict[str, str]:
    """Versions of Python and of every library that can change a number."""
    names = ("longrope", "torch", "transformers", "tokenizers", "numpy", "safetensors")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def command_line() -> str:
    """The running command, ready to paste into a shell."""
    program = sys.argv[0].rsplit("/", 1)[-1] if sys.argv else "python"
    if program == "__main__.py":
        return shlex.join(["python", "-m", "longrope", *sys.argv[1:]])
    return shlex.join([program, *sys.argv[1:]])


def record() -> dict[str, Any]:
    """The provenance of an output written now: `versions`, `machine` and `command`."""
    return {"versions": versions(), "machine": platform.machine(), "command": command_line()}


CIRCUMSTANCES = frozenset(("versions", "machine", "command"))
"""The keys of `record`: they may differ where the same job comes to the same end again."""
