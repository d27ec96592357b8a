"""Resuming a fine-tuning run: which run owns an output folder, and from which checkpoint of the Trainer it continues.

`run.json` holds the identity of a run: model, rows, settings and versions. Only a run with the same identity continues
in its folder, and one process at a time.

The Trainer's checkpoints hold optimizer and random states in torch's own format, so a checkpoint from elsewhere is
never opened. A complete checkpoint is sealed by a manifest with the name of its run and the hashes of its files; a
checkpoint that a killed process left half written has no manifest, and is in the record of the run folder.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from longrope.errors import LongRopeError, one_line
from longrope.locked import FolderLock
from longrope.run_files import ADAPTER, CHECKPOINT, FINETUNE_IDENTITY, FINETUNE_SUMMARY, SCALING, TRAINER, WRITTEN
from longrope.storage import (
    check_output_folder,
    json_ready,
    new_output_folder,
    nothing_left_if_refused,
    read_json,
    refuse_links,
    write_json_atomic,
)
from longrope.written import (
    begin_record,
    discard,
    foreign,
    note,
    occupied_by,
    remove_own,
    require_own,
    sha256_file,
    sweep,
)

SEAL = "longrope.json"
KEPT = 2  # complete checkpoints: with the last one damaged, a run goes on from the one before
_PREFIX = "checkpoint-"
_UNFINISHED = (CHECKPOINT, ADAPTER, SCALING)
"""Results that a run writes again where it was killed before its summary."""
_BEFORE = "remove it to continue from the checkpoint before"
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos", "file write failed")
_HASHING = 4  # files at a time: hashing and reading a file of gigabytes take seconds


def check_run_folder(output_dir: Path, resume: bool) -> None:
    """Raise LongRopeError unless a new run can begin in `output_dir`, or, with `resume`, an interrupted one continue.

    Creates nothing.
    """
    if (output_dir / FINETUNE_SUMMARY).exists():  # written last
        if resume:
            sweep(output_dir)
            remove_checkpoints(output_dir)  # a kill behind the summary has left them
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
    else:
        refuse_links(output_dir / TRAINER)
        for unfinished in _UNFINISHED:
            require_own(output_dir / unfinished)


@contextmanager
def claimed(output_dir: Path, identity: dict[str, Any], resume: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Lock the run folder for the block and give the name of its run, drawn when the run is new, and what to call when
    its first step is done. Of a new run that is refused before, nothing stays.

    What a killed process has left is removed.

    Raises LongRopeError when another process trains there, or when the folder's run has another identity.
    """
    if not resume:
        with nothing_left_if_refused(output_dir) as output:
            _begin(output_dir, {"run": secrets.token_hex(16)} | identity)
            output.wrote(*(output_dir / name for name in (FINETUNE_IDENTITY, TRAINER, WRITTEN)))
            with _locked(output_dir, identity) as run:
                yield run, output.keep
        return
    with _locked(output_dir, identity) as run:
        yield run, lambda: None


@contextmanager
def _locked(output_dir: Path, identity: dict[str, Any]) -> Iterator[str]:
    found = read_json(output_dir / FINETUNE_IDENTITY)
    busy = f"another process is training in {output_dir}"
    with FolderLock(output_dir, busy, name=FINETUNE_IDENTITY, create=False):
        wanted = json.loads(json.dumps(json_ready(identity)))
        differing = sorted(key for key in wanted if found.get(key) != wanted[key])
        if differing or not isinstance(found.get("run"), str):
            raise LongRopeError(
                f"the run in {output_dir} is another one: {_differences(found, wanted, differing)}",
                code="other-run",
                hint="use the same settings or another `output_dir`",
            )
        begin_record(output_dir)
        for unfinished in _UNFINISHED:
            remove_own(output_dir / unfinished)
        sweep(output_dir)
        sweep(output_dir / TRAINER)
        yield str(found["run"])


def _begin(output_dir: Path, identity: dict[str, Any]) -> None:
    """Create the folder with its identity: in full or not at all, and by one process only."""
    new_output_folder(output_dir)
    begin_record(output_dir)
    try:
        write_json_atomic(output_dir / FINETUNE_IDENTITY, json_ready(identity), new=True)
    except LongRopeError as error:
        if error.code != "output-exists":
            raise
        raise LongRopeError(
            f"another process is training in {output_dir}", code="locked", hint="choose another `output_dir`"
        ) from error


def _differences(found: dict[str, Any], wanted: dict[str, Any], keys: Sequence[str]) -> str:
    """`settings.steps 4 (now 8), …`: the entries that differ, one level down."""
    listed = []
    for key in keys:
        was, now = found.get(key), wanted[key]
        if isinstance(was, dict) and isinstance(now, dict):
            names = sorted(was.keys() | now.keys())
            pairs = [(name, *(repr(one[name]) if name in one else "unknown" for one in (was, now))) for name in names]
            listed += [f"{key}.{name} {before} (now {after})" for name, before, after in pairs if before != after]
        else:
            listed.append(f"{key} {was!r} (now {now!r})")
    return ", ".join(listed)


def begin_checkpoint(folder: Path) -> None:
    """Record that this run is about to write the checkpoint `folder` of the Trainer.

    Raises LongRopeError: `output-removed` where the run folder is gone, `output-not-writable`.
    """
    root = folder.parent
    if not (root.parent / FINETUNE_IDENTITY).is_file():
        raise LongRopeError(
            f"the run folder {root.parent} was removed while this run was training in it: what follows would be lost",
            code="output-removed",
            hint="put it back and continue with `resume=True`, or start again",
        )
    with saving(f"the checkpoint {folder}"):
        root.mkdir(exist_ok=True)
        begin_record(root)
        note(root, {f"{folder.name}/": ""})


def seal(folder: Path, run: str) -> None:
    """Record that the checkpoint `folder` is complete and belongs to `run`, with the hash of every file."""
    with saving(f"the checkpoint {folder}"):
        sizes, hashes = _sizes(folder), _hashes(folder)
    write_json_atomic(folder / SEAL, {"run": run, "files": sizes, "sha256": hashes})


def rotate(root: Path) -> None:
    """Remove the complete checkpoints in `root` but the last KEPT; a kill in between leaves them whole or swept."""
    complete = [folder for folder in sorted(root.glob(f"{_PREFIX}*"), key=_step) if (folder / SEAL).is_file()]
    for folder in complete[:-KEPT]:
        _discard(folder)


def remove_checkpoints(output_dir: Path) -> None:
    """Remove the Trainer's checkpoints of a finished run, and their folder unless it holds anything else."""
    root = output_dir / TRAINER
    if root.is_symlink() or not root.is_dir():
        return
    sweep(root)
    for folder in sorted(root.glob(f"{_PREFIX}*")):
        _discard(folder)
    if occupied_by(root) is None:
        discard(root)


def _discard(folder: Path) -> None:
    """Remove a checkpoint that this run has begun, unless a file was added to it since it was sealed."""
    with suppress(LongRopeError, OSError):
        if _sizes(folder) == _manifest(folder)[1] if (folder / SEAL).is_file() else foreign(folder) is None:
            discard(folder)


def last_sealed(root: Path, run: str) -> Path | None:
    """The latest complete checkpoint of `run` in `root`; half-written checkpoints are removed.

    Raises LongRopeError when a checkpoint belongs to another run, when the files of one have changed, in size or, those
    of the latest one, in content, or when there is one that the run has not begun.
    """
    last: Path | None = None
    for folder in sorted(root.glob(f"{_PREFIX}*"), key=_step):
        if not (folder / SEAL).is_file():
            if foreign(folder) is not None:
                raise LongRopeError(
                    f"{folder} is not a checkpoint that this run has begun",
                    code="not-ours",
                    hint="move it to another place, then go on",
                )
            discard(folder)
            continue
        owner, sizes, _ = _manifest(folder)
        if owner != run:
            raise LongRopeError(
                f"{folder} is a checkpoint of another run and is not opened",
                code="other-run",
                hint="remove it, or choose another `output_dir`",
            )
        _require_same(folder, _sizes(folder), sizes)
        last = folder
    if last is not None:
        hashes = _manifest(last)[2]
        if hashes is not None:  # a seal of a version that had none
            _require_same(last, _hashes(last), hashes)
    return last


def _manifest(folder: Path) -> tuple[str, dict[str, int], dict[str, str] | None]:
    """Run, sizes and hashes (None in older seals) of a sealed checkpoint."""
    try:
        manifest = json.loads((folder / SEAL).read_text("utf-8"))
        hashes = manifest.get("sha256")
        return manifest["run"], dict(manifest["files"]), None if hashes is None else dict(hashes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LongRopeError(f"{folder / SEAL} is damaged", code="damaged-file", hint=_BEFORE) from error


def _require_same(folder: Path, found: dict[str, Any], written: dict[str, Any]) -> None:
    if found != written:
        changed = sorted(
            name for name in found.keys() | written.keys() if found.get(name, ...) != written.get(name, ...)
        )[0]
        raise LongRopeError(f"{folder} is not as it was written ({changed})", code="damaged-file", hint=_BEFORE)


def _files(folder: Path) -> list[Path]:
    """Every file of a checkpoint but its seal."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint but its seal, by relative path."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the same files."""
    files = _files(folder)
    with ThreadPoolExecutor(_HASHING) as pool:
        hashes = pool.map(sha256_file, files)
        return {path.relative_to(folder).as_posix(): digest for path, digest in zip(files, hashes, strict=True)}


def _step(folder: Path) -> int:
    step = folder.name.removeprefix(_PREFIX)
    if not step.isdecimal():
        raise LongRopeError(
            f"expected only checkpoint-N in {folder.parent}, found {folder.name}",
            code="other-run",
            hint="choose another `output_dir`",
        )
    return int(step)


@contextmanager
def saving(what: str) -> Iterator[None]:
    """In the block, an error of writing, of whichever library, becomes a LongRopeError (`output-not-writable`)."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch raises a RuntimeError where a file cannot be written, without the reason.
        if isinstance(error, RuntimeError) and not any(said in str(error) for said in _TORCH_CANNOT_WRITE):
            raise
        raise LongRopeError(
            f"cannot write {what}: {one_line(error)}; the checkpoints before it are kept",
            code="output-not-writable",
            hint="make room and continue with `resume=True`",
        ) from error
