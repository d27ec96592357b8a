"""Resuming a fine-tuning run: which run owns an output folder, and from which checkpoint of the Trainer it continues.

`run.json` holds the identity of a run: model, rows, settings and versions. Only a run with the same identity continues
in its folder, and one process at a time.

The Trainer's checkpoints hold optimizer and random states in torch's own format, so a checkpoint from elsewhere is
never opened. A complete checkpoint is sealed by a manifest with the name of its run; a checkpoint that a killed process
left half written has no manifest.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.run_files import ADAPTER, CHECKPOINT, FINETUNE_IDENTITY, FINETUNE_SUMMARY
from longrope.storage import (
    FolderLock,
    check_output_folder,
    json_ready,
    new_output_folder,
    read_json,
    write_json_atomic,
)

SEAL = "longrope.json"
_PREFIX = "checkpoint-"


def check_run_folder(output_dir: Path, resume: bool) -> None:
    """Raise LongRopeError unless a new run can begin in `output_dir`, or, with `resume`, an interrupted one continue.

    Creates nothing.
    """
    if (output_dir / FINETUNE_SUMMARY).exists():  # written last
        raise LongRopeError(
            f"the run in {output_dir} is finished and nothing is overwritten",
            code="output-exists",
            hint="choose another `output_dir`",
        )
    if not resume:
        check_output_folder(output_dir)
    elif not (output_dir / FINETUNE_IDENTITY).is_file():
        raise LongRopeError(
            f"there is no run in {output_dir} to resume", code="not-resumable", hint="start without `resume=True`"
        )


@contextmanager
def claimed(output_dir: Path, identity: dict[str, Any], resume: bool) -> Iterator[str]:
    """Lock the run folder for the block and give the name of its run, drawn when the run is new.

    Raises LongRopeError when another process trains there, or when the folder's run has another identity.
    """
    if not resume:
        _begin(output_dir, {"run": secrets.token_hex(16)} | identity)
    found = read_json(output_dir / FINETUNE_IDENTITY)
    with FolderLock(output_dir, f"another process is training in {output_dir}", name=FINETUNE_IDENTITY, create=False):
        wanted = json.loads(json.dumps(json_ready(identity)))
        differing = sorted(key for key in wanted if found.get(key) != wanted[key])
        if differing or not isinstance(found.get("run"), str):
            raise LongRopeError(
                f"the run in {output_dir} is another one: {_differences(found, wanted, differing)}",
                code="other-run",
                hint="use the same settings or another `output_dir`",
            )
        for unfinished in (output_dir / CHECKPOINT, output_dir / ADAPTER, *output_dir.glob(".partial-*")):
            shutil.rmtree(unfinished, ignore_errors=True)
        yield str(found["run"])


def _begin(output_dir: Path, identity: dict[str, Any]) -> None:
    """Create the folder with its identity: in full or not at all, and by one process only."""
    new_output_folder(output_dir)
    with tempfile.TemporaryDirectory(dir=output_dir.absolute().parent, prefix=f".{output_dir.name}-") as temporary:
        written = Path(temporary) / FINETUNE_IDENTITY
        write_json_atomic(written, json_ready(identity))
        try:
            (output_dir / FINETUNE_IDENTITY).hardlink_to(written)
        except FileExistsError as error:
            raise LongRopeError(
                f"another process is training in {output_dir}", code="locked", hint="choose another `output_dir`"
            ) from error


def _differences(found: dict[str, Any], wanted: dict[str, Any], keys: Sequence[str]) -> str:
    """`settings.steps 4 (now 8), …`: the entries that differ, one level down."""
    listed = []
    for key in keys:
        was, now = found.get(key), wanted[key]
        if isinstance(was, dict) and isinstance(now, dict):
            inner = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
            listed += [f"{key}.{name} {was.get(name)!r} (now {now.get(name)!r})" for name in inner]
        else:
            listed.append(f"{key} {was!r} (now {now!r})")
    return ", ".join(listed)


def seal(folder: Path, run: str) -> None:
    """Record that the checkpoint `folder` is complete and belongs to `run`."""
    write_json_atomic(folder / SEAL, {"run": run, "files": _sizes(folder)})


def last_sealed(root: Path, run: str) -> Path | None:
    """The latest complete checkpoint of `run` in `root`; half-written checkpoints are removed.

    Raises LongRopeError when a checkpoint belongs to another run or its files have changed.
    """
    last = None
    for folder in sorted(root.glob(f"{_PREFIX}*"), key=_step):
        if not (folder / SEAL).is_file():
            shutil.rmtree(folder)
            continue
        hint = "remove it to continue from the checkpoint before"
        try:
            manifest = json.loads((folder / SEAL).read_text("utf-8"))
            owner, files = manifest["run"], dict(manifest["files"])
        except (ValueError, TypeError, KeyError) as error:
            raise LongRopeError(f"{folder / SEAL} is damaged", code="damaged-file", hint=hint) from error
        if owner != run:
            raise LongRopeError(
                f"{folder} is a checkpoint of another run and is not opened",
                code="other-run",
                hint="remove it, or choose another `output_dir`",
            )
        if (found := _sizes(folder)) != files:
            changed = sorted(set(found.items()) ^ set(files.items()))[0][0]
            raise LongRopeError(f"{folder} is not as it was written ({changed})", code="damaged-file", hint=hint)
        last = folder
    return last


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint but its seal, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _step(folder: Path) -> int:
    step = folder.name.removeprefix(_PREFIX)
    if not step.isdecimal():
        raise LongRopeError(
            f"expected only checkpoint-N in {folder.parent}, found {folder.name}",
            code="other-run",
            hint="choose another `output_dir`",
        )
    return int(step)
