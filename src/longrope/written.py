"""The files that a run has written: their names while they are made, and the record that says which are its own.

A file or folder is made under a temporary name and then renamed, so that its name stands for the whole of it. A name
`.longrope-NAME.RANDOM.tmp` is that of a file `NAME` that a killed process had not finished: `sweep` removes it.

A folder in which a run may have to remove or replace a file keeps a record, `.written.jsonl`: a line for every file
that the run has written there, with the file's hash, added before the file gets its name. A file that the record does
not have, or that has changed since, is somebody else's: `remove_own` refuses.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from longrope.errors import LongRopeError
from longrope.run_files import JSON_FILES, LOCK, WRITTEN

_TEMPORARY = re.compile(r"\.longrope-(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_RANDOM = r"(?=[a-z]*[0-9_])[a-z0-9_]{8}"  # no word
_OLDER = re.compile(rf"\.partial-{_RANDOM}|\.({'|'.join(map(re.escape, sorted(JSON_FILES)))})\.{_RANDOM}")
"""The temporary names of versions before `temporary`: of an unfinished checkpoint, and of files with these names."""
_LOG = b'{"schema": "longrope.'
_FIRST_LINE = 1 << 24  # bytes: more than the first line of a log ever has
_LONGEST = 100  # bytes of a name that are repeated in its temporary one: file systems allow 255
Known = dict[str, set[str]]
"""Names -> the hashes that they were written with. A name that ends in `/` is a folder that is the run's as a whole."""


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- temporary names


def temporary(path: Path) -> Path:
    """A new name beside `path`, for the file or folder that will be renamed to it."""
    return path.with_name(f".longrope-{_stem(path.name)}.{secrets.token_hex(4)}.tmp")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder under a temporary name of `path`, removed at the end of the block unless it was renamed."""
    made = temporary(path)
    made.mkdir()
    try:
        yield made
    finally:
        _delete_with_moved(made)


def is_temporary(name: str) -> bool:
    """True if `name` is one that `temporary` gives, or gave in earlier versions."""
    return _stem_of(name) is not None


def _stem_of(name: str) -> str | None:
    """The name of the file that `name` is a temporary name of, as `_stem` gives it; None where it is none."""
    found = _TEMPORARY.fullmatch(name) or _OLDER.fullmatch(name)
    return found and (found[1] or "")


def sweep(folder: Path, *names: str) -> None:
    """Remove what killed processes left of the files `names` in `folder`; of all files where no name is given.

    Only for a process that alone writes these files. The files that a killed `move_up` had moved are removed, too.
    """
    stems = {_stem(name) for name in names}
    with suppress(OSError):
        for entry in sorted(folder.iterdir()):
            found = _stem_of(entry.name)
            if found is not None and (not stems or found in stems):
                _delete_with_moved(entry)


def sweep_links(folder: Path) -> None:
    """Remove the temporary names in `folder` of files that have their own name too: `publish` was killed in between.

    Safe while other processes write there: what they have not finished stays.
    """
    with suppress(OSError):
        for entry in sorted(folder.iterdir()):
            if is_temporary(entry.name) and entry.is_file() and not entry.is_symlink() and entry.stat().st_nlink > 1:
                _delete(entry)


def discard(path: Path) -> None:
    """Remove a file or folder that is the caller's; a kill in between leaves only what `sweep` removes."""
    gone = temporary(path)
    path.rename(gone)
    _delete(gone)


def publish(made: Path, path: Path) -> None:
    """Rename the whole file `made` to `path`. A log there that is not begun counts as none.

    Raises FileExistsError where anything else has that name, even if it appeared in this moment.
    """
    if is_unbegun(path):
        made.replace(path)
        return
    try:
        os.link(made, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        made.rename(path)
    else:
        made.unlink()


def is_unbegun(path: Path) -> bool:
    """True if `path` is a log of this package without a whole first line, as a power cut can leave one.

    A log begins with its schema; an empty file is one, too.
    """
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline(_FIRST_LINE)
    return not first.endswith(b"\n") and (first.startswith(_LOG) or _LOG.startswith(first))


def move_up(made: Path, last: str) -> None:
    """Move all that is in the temporary folder `made` into the folder around it, the file `last` at the end.

    A kill in between leaves what `sweep` removes: `made` keeps a record of what was to be moved. If the folder that the
    files get to is in one with a record, they are added to that.
    """
    begin_record(made)
    hashes = {name: sha256_file(made / name) for name in sorted(_files(made)) if name != WRITTEN}
    note(made, hashes)
    note(made.parent.parent, {f"{made.parent.name}/{name}": digest for name, digest in hashes.items()})
    for path in sorted(made.iterdir(), key=lambda path: (path.name == last, path.name)):
        if path.name != WRITTEN:
            path.rename(made.parent / path.name)


def occupied_by(folder: Path) -> Path | None:
    """The first thing in `folder` that somebody could miss; None where there is none, or no folder.

    Locks, records, logs that are not begun, what `sweep` removes, and folders with nothing else in them do not count.
    """
    return _occupied_by(folder, set()) if folder.is_dir() else None


def _occupied_by(folder: Path, moved: set[Path]) -> Path | None:
    entries = sorted(folder.iterdir())
    moved = moved.union(*(_half_moved(entry) for entry in entries if is_temporary(entry.name)))
    for entry in entries:
        if entry.name in (LOCK, WRITTEN) or is_temporary(entry.name) or entry in moved:
            continue
        if entry.suffix == ".jsonl" and is_unbegun(entry):
            continue
        if entry.is_symlink() or not entry.is_dir():
            return entry
        if (found := _occupied_by(entry, moved)) is not None:
            return found
    return None


def _half_moved(made: Path) -> list[Path]:
    """The files that `move_up` had moved out of the folder `made` when it was killed; none where it had moved all."""
    if not has_record(made) or list(_files(made)) == [WRITTEN]:
        return []
    around = made.parent.resolve()
    targets = {made.parent / name: hashes for name, hashes in recorded(made).items() if not name.endswith("/")}
    return [
        path for path, hashes in targets.items() if _matches(path, hashes) and path.resolve().is_relative_to(around)
    ]


# --- the record


def begin_record(folder: Path) -> None:
    """Begin the record of `folder`, or go on with it."""
    with suppress(FileExistsError):
        (folder / WRITTEN).touch(exist_ok=False)


def has_record(folder: Path) -> bool:
    """True if `folder` keeps a record."""
    return (folder / WRITTEN).is_file()


def note(folder: Path, hashes: Mapping[str, str]) -> None:
    """Add files (name in `folder` -> hash) to the record before they get these names; a name that ends in `/` is a
    folder that the run makes, whatever will be in it. Does nothing where the folder has no record.

    Raises OSError where the record cannot be written.
    """
    lines = "".join(f"{json.dumps({'file': name, 'sha256': digest})}\n" for name, digest in hashes.items())
    with suppress(FileNotFoundError):
        handle = os.open(folder / WRITTEN, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0))
        try:
            # The line before may have been cut off by a power cut: what cannot be read says nothing.
            os.write(handle, f"\n{lines}".encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def recorded(folder: Path) -> Known:
    """The record of `folder`; empty where it has none. A line that cannot be read says nothing, nor does one about a
    place outside of the folder.
    """
    known: Known = {}
    with suppress(OSError):
        for line in (folder / WRITTEN).read_bytes().split(b"\n"):
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                name, digest = str(entry["file"]), str(entry["sha256"])
                if not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts:
                    known.setdefault(name, set()).add(digest)
    return known


def foreign(path: Path) -> Path | None:
    """The first file at or in `path` that the records there do not have, or not as it is now; None where there is none.

    The records are that of the folder around `path` and those in it. A symbolic link is always foreign.
    """
    if not os.path.lexists(path):
        return None
    return _foreign(path, path.name, recorded(path.parent))


def _foreign(path: Path, name: str, known: Known) -> Path | None:
    if is_temporary(path.name):
        return None
    if path.is_symlink() or not path.is_dir():
        unbegun = path.suffix == ".jsonl" and is_unbegun(path)
        return None if unbegun or _matches(path, known.get(name, set())) else path
    if f"{name}/" in known:
        return None
    inner = known | {f"{name}/{below}": hashes for below, hashes in recorded(path).items()}
    for entry in sorted(path.iterdir()):
        if entry.name not in (LOCK, WRITTEN) and (found := _foreign(entry, f"{name}/{entry.name}", inner)) is not None:
            return found
    return None


def require_own(path: Path) -> None:
    """Raise LongRopeError (`not-ours`) where `path` holds anything that the run has not written as it is now."""
    if (found := foreign(path)) is not None:
        raise LongRopeError(
            f"{found} is not a file that this run has written, or has changed since; nothing is deleted or replaced",
            code="not-ours",
            hint="move it to another place, then go on",
        )


def remove_own(path: Path) -> None:
    """Remove the file or folder `path`, if there is one. Raises LongRopeError as `require_own` does."""
    require_own(path)
    if os.path.lexists(path):
        discard(path)


def _matches(path: Path, hashes: set[str]) -> bool:
    """True if `path` is a file with one of these hashes; a name that cannot be one of a file is none."""
    try:
        return bool(hashes) and path.is_file() and not path.is_symlink() and sha256_file(path) in hashes
    except (OSError, ValueError):
        return False


def _files(folder: Path) -> Iterator[str]:
    """The files in `folder` and below, by relative path."""
    for path in folder.rglob("*"):
        if not path.is_dir() or path.is_symlink():
            yield path.relative_to(folder).as_posix()


def _delete_with_moved(made: Path) -> None:
    for path in _half_moved(made):
        path.unlink()
    _delete(made)


def _delete(path: Path) -> None:
    """Remove a file, a link or a folder; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _stem(name: str) -> str:
    long = len(name.encode("utf-8", "surrogateescape")) > _LONGEST
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest() if long else name
