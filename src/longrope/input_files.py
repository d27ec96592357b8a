"""Files from a user or a stranger: regular files of a bounded size, and files that lie inside their folder.

A FIFO would block its reader for ever, a device never ends, and a link in a folder from elsewhere can name any file of
this machine. All of them are refused before they are opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from longrope.errors import LongRopeError
from longrope.quantities import format_bytes

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


LARGEST_JSON = 64_000_000
"""Bytes of a JSON file that is read at once: parsed it takes some ten times as much."""
LARGEST_RECORD = 512_000_000
"""The same of scaling.json and finetune.json, which name every text that weights have seen: 73 bytes each, and again in
what later trainings carry."""


def refuse_special(path: str | os.PathLike[str], limit: int | None = None) -> None:
    """Raise LongRopeError for a path that must not be opened: `unreadable-file` for a named pipe, a device or a socket,
    `too-large` for a file of more than `limit` bytes. Anything else is left to its reader, a missing file too.
    """
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # a ValueError for a name with a NUL
        return
    kind = next((name for test, name in _KINDS if test(found.st_mode)), "")
    if kind not in ("", "a folder"):
        raise LongRopeError(f"cannot read {path}: expected a file, found {kind}", code="unreadable-file")
    if limit is not None and not kind and found.st_size > limit:
        raise LongRopeError(
            f"cannot read {path}: expected at most {format_bytes(limit)}, found {format_bytes(found.st_size)}",
            code="too-large",
        )


def require_regular(path: str | os.PathLike[str], limit: int | None = None) -> Path:
    """`path` as a Path, where it is a regular file (links are followed) of at most `limit` bytes. Opens nothing.

    Raises LongRopeError, naming the path: `missing-file` where nothing is there, `unreadable-file` for a folder, a
    named pipe, a device or a socket, and for a place that cannot be looked at, `too-large` above the limit.
    """
    path = Path(path)
    refuse_special(path, limit)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError as error:
        raise LongRopeError(f"cannot read {path}: {error.strerror}", code="missing-file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LongRopeError(f"cannot read {path}: {reason}", code="unreadable-file") from error
    if is_folder:
        raise LongRopeError(f"cannot read {path}: expected a file, found a folder", code="unreadable-file")
    return path


def require_inside(folder: Path, files: Iterable[Path]) -> None:
    """Raise LongRopeError (`not-inside`) unless each of `files`, which are paths below `folder`, is a regular file
    inside of it, all links followed.

    `folder` itself may be reached by links. In a snapshot of the hub's cache (`models--…/snapshots/REVISION`) the files
    are links into `models--…/blobs`, which counts as inside.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parents[1] / "blobs")
    for file in files:
        try:
            target = file.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
            reason = getattr(error, "strerror", None) or "its links go round in a circle"
            raise LongRopeError(f"cannot read {file}: {reason}", code="not-inside") from error
        if not any(target.is_relative_to(place) for place in allowed):
            raise LongRopeError(
                f"{file} is a link out of its folder, to {target}; files of a checkpoint lie inside of it",
                code="not-inside",
                hint="if you trust it, put a copy of the file in the place of the link",
            )
        require_regular(target)
