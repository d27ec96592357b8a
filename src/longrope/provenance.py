"""Provenance of an output: versions, commit, processor, command, and when it was made in how much time."""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
import time
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
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
    """The provenance of an output written now: `versions`, `machine`, `processor`, `command`; `gpu` and `commit` where
    they are known.
    """
    found = {
        "versions": versions(),
        "machine": platform.machine(),
        "processor": processor(),
        "gpu": gpu(),
        "commit": commit(),
        "command": command_line(),
    }
    return {name: value for name, value in found.items() if value is not None}


CIRCUMSTANCES = frozenset(
    ("versions", "machine", "processor", "gpu", "commit", "command", "finished", "seconds", "resumed")
)
"""The keys of `record` and `finished`: they may differ where the same job comes to the same end again."""


def finished(started: float) -> dict[str, Any]:
    """The time at which an output is finished, and the seconds since `started`, a value of `time.perf_counter()`."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"finished": now, "seconds": round(time.perf_counter() - started, 1)}


@cache
def processor() -> str | None:
    """The model of the CPU."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        found = None
    return found[1].strip() if found else platform.processor() or None


def gpu() -> str | None:
    """The models of the GPUs that torch can use, with their number; None without torch or without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


@cache
def commit() -> str | None:
    """The commit of longrope: of a checkout, or of an installation from a repository; None where it is not known."""
    try:
        installed = metadata.distribution("longrope").read_text("direct_url.json")
        found = json.loads(installed or "{}").get("vcs_info", {}).get("commit_id")
        if isinstance(found, str):
            return found
        git = Path(__file__).resolve().parents[2] / ".git"
        head = (git / "HEAD").read_text("utf-8").strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        if (git / name).is_file():
            return (git / name).read_text("utf-8").strip()
        packed = (git / "packed-refs").read_text("utf-8").splitlines()
        return next((line.partition(" ")[0] for line in packed if line.endswith(f" {name}")), None)
    except (OSError, ValueError, AttributeError, metadata.PackageNotFoundError):
        return None
