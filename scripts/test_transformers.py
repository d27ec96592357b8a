"""Run the tests that rest on transformers with another release of it than `.venv` has.

    make test-transformers                         # the newest on PyPI
    make test-transformers TRANSFORMERS=5.25.0

The environment is an overlay: a virtual environment that sees the packages of `.venv` and has its own transformers,
with what that release needs anew. A release that longrope does not know, and refuses, is let in here. Where `newest` is
such a release, a failure is printed and is no failure of this run: users cannot meet it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from packaging.version import Version

from longrope.transformers_version import KNOWN

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = ROOT / ".venv-transformers"
TESTS = ("tests/models", "tests/export", "tests/doctor", "tests/standalone")
SIGNATURES = "tests/models/test_transformers_signatures.py"


def main(wanted: str) -> int:
    version = newest() if wanted == "newest" else Version(wanted)
    known = Version(KNOWN[0]) <= version and version.release[:2] <= Version(KNOWN[1]).release
    print(f"transformers {version}{'' if known else ', which longrope refuses'}", flush=True)
    python = overlay(version)
    pytest = [str(python), "-m", "pytest", "-p", "no:cacheprovider"]
    code = subprocess.call([*pytest, "-q", "-m", "slow", "-k", "every_family", SIGNATURES], cwd=ROOT)
    code = subprocess.call([*pytest, "-n", "auto", "--dist", "worksteal", *TESTS], cwd=ROOT) or code
    if not known:
        outcome = "fail with" if code else "pass with"
        print(f"the tests {outcome} transformers {version}, which is not among the known releases yet: see")
        print("src/longrope/transformers_version.py", flush=True)
    return 0 if wanted == "newest" and not known else code


def newest() -> Version:
    """The release that `pip install transformers` takes here."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    found = subprocess.run([*command, "--report", "-", "transformers"], capture_output=True, text=True, check=True)
    return Version(json.loads(found.stdout)["install"][0]["metadata"]["version"])


def overlay(version: Version) -> Path:
    """The interpreter of an environment with transformers `version` over the packages of this one."""
    home = OVERLAYS / str(version)
    python, stamp = home / "bin" / "python", home / "complete"
    if stamp.is_file() and stamp.read_text("utf-8") == sys.prefix:
        return python
    venv.create(home, clear=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    # The first line ends up behind the environment's own packages. The second lets an unknown release in.
    (packages / "a_parent.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n", "utf-8"
    )
    last = ".".join(map(str, max(version.release[:2], Version(KNOWN[1]).release)))
    first = ".".join(map(str, min(version.release[:2], Version(KNOWN[0]).release)))
    known = f"import longrope.transformers_version as known; known.KNOWN = ({first!r}, {last!r})\n"
    if (first, last) != KNOWN:
        (packages / "b_known.pth").write_text(known, "utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, f"transformers=={version}"], check=True)
    stamp.write_text(sys.prefix, "utf-8")
    return python


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
