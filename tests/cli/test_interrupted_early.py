"""Ctrl-C while the command line is imported: one line and exit code 130, no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WAIT = """
import builtins, sys, time
real = builtins.__import__
def slow(name, *given, **named):
    if name == {name!r}:
        print("here", flush=True)
        time.sleep(30)
    return real(name, *given, **named)
builtins.__import__ = slow
sys.argv = ["longrope", *{arguments!r}]
from longrope.__main__ import main
main()
"""


@pytest.mark.parametrize("name", ["cyclopts", "longrope.cli.errors", "pydantic", "longrope.cli.verb", "torch"])
def test_while_a_module_is_imported(name: str, tmp_path: Path) -> None:
    """The process is stopped in the import of `name`, whatever the speed of the machine."""
    code = WAIT.format(name=name, arguments=["inspect", "tiny"])
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, cwd=tmp_path) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "here\n"
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=60)
    assert (started.returncode, said) == (130, "longrope: interrupted\n")


@pytest.mark.slow
def test_at_any_moment(tmp_path: Path) -> None:
    """From 0.1 s on, when the interpreter itself has started."""
    for at in range(10, 400, 13):
        command = [sys.executable, "-m", "longrope", "inspect", "tiny"]
        with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=tmp_path) as started:
            time.sleep(at / 100)
            started.send_signal(signal.SIGINT)
            _, said = started.communicate(timeout=60)
        assert "Traceback" not in said, at
        # A process that Python is ending already is killed by the signal, which shells call 130 too.
        assert started.returncode in (130, 0, -signal.SIGINT), (at, said)
