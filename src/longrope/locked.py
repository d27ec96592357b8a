"""Files that one process at a time works with: the lock of a folder, and append-only logs of lines with checksums.

Locks are the operating system's locks on the files themselves (by `filelock`): a process that is killed leaves no lock
behind. On Windows a locked file cannot be read by other processes meanwhile.
"""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

from filelock import lock_descriptor, unlock_descriptor

from longrope.errors import LongRopeError
from longrope.run_files import LOCK
from longrope.storage import ANOTHER_FILE, ANOTHER_FOLDER
from longrope.written import is_unbegun, publish, temporary

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The numbers of the OSError where there is no room left."""
_CHECKSUM = re.compile(r'(?:, )?"crc32": "[0-9a-f]{8}"\}\Z')


class _LockedFile:
    """An open file, locked against other processes until it is closed. Use it in a `with` block."""

    def __init__(self, path: Path, flags: int, busy: str) -> None:
        """Open and lock `path`, never through a symbolic link. Raises OSError where it cannot be opened, LongRopeError
        (`locked`) where another process has it; the message is `busy`.
        """
        self.path = path
        flags |= os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._handle = os.open(path, flags, 0o644)
        try:
            if not lock_descriptor(self._handle, blocking=False):
                raise LongRopeError(busy, code="locked", hint="wait for it or stop it")
        except BaseException:
            os.close(self._handle)
            raise

    def require_there(self) -> None:
        """Raise LongRopeError (`output-removed`) where the file has been removed or replaced since it was opened."""
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except OSError:
            there = False
        if not there:
            raise LongRopeError(
                f"{self.path}, which this run is writing, was removed or replaced: what follows would be lost",
                code="output-removed",
                hint="put it back and continue with `resume=True`, or start again",
            )

    def close(self) -> None:
        """Unlock and close."""
        self._finish()
        unlock_descriptor(self._handle)
        os.close(self._handle)

    def _finish(self) -> None:
        """Called by `close` before the file is unlocked; here it does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FolderLock(_LockedFile):
    """A folder in which one process works at a time: its lock is on the file `name` in it, which is never written.

    The file is left behind; `check_output_folder` does not count a `.lock`.
    """

    def __init__(self, folder: Path, busy: str, *, name: str = LOCK, create: bool = True) -> None:
        """Lock `folder`, which exists; `create` makes the file where it is missing.

        `busy` is the message where another process works there. Raises LongRopeError: `locked` where one does,
        `output-not-writable` where the file cannot be opened or locked.
        """
        try:
            super().__init__(folder / name, os.O_CREAT if create else 0, busy)
        except OSError as error:
            raise LongRopeError(
                f"cannot write to the run folder {folder}: {error.strerror}",
                code="output-not-writable",
                hint=ANOTHER_FOLDER,
            ) from error


class LineLog(_LockedFile):
    """An append-only file of JSON objects, one a line, with one writer; the first line says which run it is of.

    Every line ends in a checksum, `"crc32"`; a log of a version without them goes on with them. A last line that was
    cut off is dropped when the log is resumed. A subclass takes the lines in `_load`. Use `create` or `resume`, in a
    `with` block.
    """

    schema: ClassVar[str] = ""
    """The `schema` in the first line."""
    another: ClassVar[str] = ANOTHER_FILE
    """The hint where the file is of another run."""

    def __init__(self, path: Path) -> None:
        """Open and lock `path`.

        Raises LongRopeError: `locked` where another process writes it, `not-resumable` where there is no such file,
        `output-not-writable` where it cannot be opened.
        """
        try:
            super().__init__(path, os.O_APPEND, f"another process is writing {path}")
        except FileNotFoundError as error:
            raise nothing_to_resume(path) from error
        except OSError as error:
            raise LongRopeError(f"cannot write {path}: {error.strerror}", code="output-not-writable") from error

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Self:
        """A new file with `header` as its first line: it appears with that line, or not at all. A log without a whole
        first line counts as none. Raises LongRopeError (`output-exists`, or as opening and writing do).
        """
        line = with_checksum(json.dumps({"schema": cls.schema, **header}, allow_nan=False))
        made = temporary(path)
        try:
            if os.path.lexists(path) and not is_unbegun(path):
                raise FileExistsError(path)
            handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
            try:
                _write_all(handle, f"{line}\n".encode())
                os.fsync(handle)
            finally:
                os.close(handle)
            publish(made, path)
        except FileExistsError as error:
            hint = f"continue it with `resume=True`, or {cls.another}"
            raise LongRopeError(f"{path} exists", code="output-exists", hint=hint) from error
        except OSError as error:
            raise LongRopeError(
                f"cannot write {path}: {error.strerror}; nothing was kept",
                code="output-not-writable",
                hint="make room and start again" if error.errno in FULL else "",
            ) from error
        finally:
            made.unlink(missing_ok=True)
        return cls(path)

    @classmethod
    def resume(cls, path: Path, header: dict[str, Any]) -> Self:
        """The file at `path` with its lines, ready to go on.

        Raises LongRopeError when there is none or one without a first line, when a line is damaged, or when the file is
        of another run than `header`: results of other settings, texts or models are not comparable.
        """
        log = cls(path)
        try:
            if is_unbegun(path):
                raise nothing_to_resume(path)
            content = log.read()
            log._load(json.loads(json.dumps(header)), content)
            log.cut(content.rfind(b"\n") + 1)
        except BaseException:
            log.close()
            raise
        return log

    def _load(self, header: dict[str, Any], content: bytes) -> None:
        """Read the lines of a file whose first line must be of the run of `header`."""
        raise NotImplementedError

    def read(self) -> bytes:
        """The whole file, read by the handle that holds the lock: on Windows no other could."""
        os.lseek(self._handle, 0, os.SEEK_SET)
        pieces = []
        while piece := os.read(self._handle, 1 << 20):
            pieces.append(piece)
        return b"".join(pieces)

    def write(self, line: str) -> None:
        """Append the JSON object `line` in full, with its checksum; where that fails, or on Ctrl-C, remove the part
        already written.

        Raises LongRopeError: `output-not-writable`, the lines before are kept; `output-removed` where the file is gone.
        """
        self.require_there()
        size = os.fstat(self._handle).st_size
        try:
            _write_all(self._handle, f"{with_checksum(line)}\n".encode())
        except BaseException as error:
            self.cut(size)
            if not isinstance(error, OSError):
                raise
            raise LongRopeError(
                f"cannot write {self.path}: {error.strerror}; it is valid up to here",
                code="output-not-writable",
                hint="make room and continue with `resume=True`",
            ) from error

    def _finish(self) -> None:
        """Have all lines on the disk before any result that follows from them."""
        with suppress(OSError):
            os.fsync(self._handle)

    def cut(self, size: int) -> None:
        """Remove everything after the first `size` bytes."""
        os.ftruncate(self._handle, size)


def has_lines(path: Path) -> bool:
    """True if there is a log at `path` to resume: a file with a whole first line."""
    return path.is_file() and not is_unbegun(path)


def nothing_to_resume(path: Path) -> LongRopeError:
    """The error where the log `path` is missing or has no first line."""
    return LongRopeError(f"there is no {path} to resume", code="not-resumable", hint="start without `resume=True`")


def with_checksum(line: str) -> str:
    """The JSON object `line` with its CRC-32 as the last field."""
    return f'{line[:-1]}{", " if len(line) > 2 else ""}"crc32": "{zlib.crc32(line.encode()):08x}"}}'


def log_lines(content: bytes) -> tuple[list[str], int | None]:
    """The whole lines of a log without their checksums, and the number of the first one whose checksum is wrong (1: the
    first line), or missing although the first line has one. Bytes that are no text are replaced: no checksum fits them.
    """
    lines = content[: content.rfind(b"\n") + 1].decode("utf-8", "replace").split("\n")[:-1]
    bodies: list[str] = []
    wrong = None
    for number, line in enumerate(lines, start=1):
        found = _CHECKSUM.search(line)
        body = line if found is None else line[: found.start()] + "}"
        right = with_checksum(body) == line if found else not bodies or _CHECKSUM.search(lines[0]) is None
        if not right and wrong is None:
            wrong = number
        bodies.append(body)
    return bodies, wrong


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
