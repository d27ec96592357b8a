"""An append-only file of lines with one writer: it is locked, and every line in it is whole."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from longrope.errors import LongRopeError


class LineLog:
    """An open file, locked against other processes until it is closed. Use it in a `with` block."""

    def __init__(self, path: Path, *, new: bool) -> None:
        """Open and lock; `new` creates the file.

        Raises OSError where it cannot be opened, is there already (`new`) or is not (else), and LongRopeError when
        another process has it.
        """
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_EXCL if new else 0), 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._handle)
            raise LongRopeError(f"another process is writing {path}; wait for it or stop it") from error

    def write_first(self, line: str) -> None:
        """Write the first line of a new file, or delete it: an empty one could be neither resumed nor created again.

        Raises OSError.
        """
        try:
            self.write(line)
        except BaseException:
            self.close()
            self.path.unlink()
            raise

    def write(self, line: str) -> None:
        """Append a line. Half a line is no line: where it cannot be written, or on Ctrl-C, what is there is taken back.

        Raises OSError.
        """
        data = f"{line}\n".encode()
        size = os.fstat(self._handle).st_size
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except BaseException:
            self.cut(size)
            raise

    def cut(self, size: int) -> None:
        """Drop what is behind the first `size` bytes."""
        os.ftruncate(self._handle, size)

    def close(self) -> None:
        os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
