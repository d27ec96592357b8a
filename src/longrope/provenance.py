"""What every output records about how it was made: versions, machine and command."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib import metadata
from typing import Any


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    names = ("longrope", "torch", "transformers", "tokenizers", "numpy", "safetensors")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def command_line() -> str:
    """The command that runs now, ready to paste."""
    program = sys.argv[0].rsplit("/", 1)[-1] if sys.argv else "python"
    return shlex.join([program, *sys.argv[1:]])


def record() -> dict[str, Any]:
    """`versions`, `machine` and `command`, for the provenance of an output."""
    return {"versions": versions(), "machine": platform.machine(), "command": command_line()}
