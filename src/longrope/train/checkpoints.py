"""Which of the Trainer's checkpoints a run may go on from: whole ones, that this run itself wrote.

They hold optimizer and random states in torch's own format, so none that came from elsewhere is ever opened. A
checkpoint is sealed when it is complete, by a manifest with the run's identity: one that a killed process left half
written has none.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from longrope.errors import LongRopeError
from longrope.storage import write_json_atomic

SEAL = "longrope.json"
_PREFIX = "checkpoint-"


def seal(folder: Path, run: str) -> None:
    """Say that `folder` is complete and of this `run`."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    write_json_atomic(folder / SEAL, {"run": run, "files": files})


def last_sealed(root: Path, run: str) -> Path | None:
    """The latest whole checkpoint of this `run` in `root`; what was left half written is removed.

    Raises LongRopeError when one is of another run or its files have changed.
    """
    last = None
    for folder in sorted(root.glob(f"{_PREFIX}*"), key=_step):
        if not (folder / SEAL).is_file():
            shutil.rmtree(folder)
            continue
        try:
            manifest = json.loads((folder / SEAL).read_text("utf-8"))
            owner, files = manifest["run"], dict(manifest["files"])
        except (ValueError, TypeError, KeyError) as error:
            raise LongRopeError(f"{folder / SEAL} is damaged; remove {folder} to go on from the one before") from error
        if owner != run:
            raise LongRopeError(
                f"{folder} is a checkpoint of another run and is not opened; remove it, or choose another -o"
            )
        found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
        if found != files:
            changed = sorted(set(found.items()) ^ set(files.items()))[0][0]
            raise LongRopeError(
                f"{folder} is not as it was written ({changed}); remove it to go on from the one before"
            )
        last = folder
    return last


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


def _step(folder: Path) -> int:
    step = folder.name.removeprefix(_PREFIX)
    if not step.isdecimal():
        raise LongRopeError(f"expected only checkpoint-N in {folder.parent}, found {folder.name}; choose another -o")
    return int(step)
