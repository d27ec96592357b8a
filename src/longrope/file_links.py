"""Files that share their bytes on disk with others: clones where the file system has them, else links, else copies.

A clone (reflink) shares its blocks until one of the two is written, so it is safe and costs nothing; Btrfs, XFS and
bcachefs make them. A hard link is a second name of the same file: a program that writes into it in place writes into
the other, too (safetensors up to 0.7 does). All files of this package are made under a new name and renamed.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from longrope.written import temporary

CLONED, LINKED, COPIED, ABSENT = "cloned", "hard-linked", "copied", "not in this folder"
"""The ways that a file comes to its place; ABSENT where it did not."""
_FICLONE = 0x40049409  # ioctl_ficlone(2), Linux
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of link(2) that say that these two places cannot have a link: other file systems, other owners, no support."""


def share(source: Path, target: Path) -> str:
    """Give `source`, all links followed, the new name `target`, with as little new room on disk as can be.

    Returns CLONED, LINKED or COPIED. Raises OSError where `target` exists or cannot be written.
    """
    real = source.resolve(strict=True)  # link(2) links to a symbolic link itself, which files of the hub's cache are
    if _clone(real, target):
        return CLONED
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(real, target)
        return COPIED
    return LINKED


def _clone(source: Path, target: Path) -> bool:
    """True if `target` was made as a clone of `source`; else nothing is there."""
    try:
        from fcntl import ioctl
    except ImportError:  # Windows
        return False
    with source.open("rb") as old:
        new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            ioctl(new, _FICLONE, old.fileno())
        except OSError:  # by file system and system: EOPNOTSUPP, ENOTTY, EXDEV, EINVAL, …
            target.unlink()
            return False
        finally:
            os.close(new)
    return True


def separate(folder: Path, pattern: str) -> None:
    """Give every file `pattern` of `folder` bytes of its own, where it is a hard link, so that it may be written."""
    for path in sorted(folder.glob(pattern)):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
            made = temporary(path)
            try:
                shutil.copyfile(path, made)
                os.replace(made, path)
            finally:
                with suppress(FileNotFoundError):
                    made.unlink()
