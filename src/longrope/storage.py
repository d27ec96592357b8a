"""Writing without losing anything: atomic files, output folders never overwritten, SHA-256 of what was read.

An append-only file of lines with one writer: it is locked, and every line in it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Self

from longrope.errors import LongRopeError, one_line


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_text(text: str) -> str:
    """Hexadecimal SHA-256 of `text` as UTF-8."""
    return sha256_bytes(text.encode())


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` in full or not at all: a reader never sees half a file, a full disk leaves the old one."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise LongRopeError(f"cannot write {path}: {error.strerror}; nothing was changed") from error


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` of `value` as indented JSON; NaN and infinity are refused because JSON has neither."""
    write_text_atomic(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises LongRopeError, with the path, when it holds something else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise LongRopeError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LongRopeError(f"expected JSON in {path}, found something else: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise LongRopeError(f"expected a JSON object in {path}, found {type(value).__name__}")
    return value


def json_number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they become their names, which `float` reads."""
    return value if value is None or math.isfinite(value) else str(value)


def json_ready(value: Any) -> Any:
    """`value` as JSON can say it: numbers that are NaN or infinite, which JSON has not, become None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return value


def check_output_folder(path: Path) -> None:
    """Raise LongRopeError when `path` is a file or a folder with anything in it. Creates nothing."""
    if path.exists() and not path.is_dir():
        raise LongRopeError(f"expected a folder for the output, found a file at {path}; choose another -o")
    try:
        if path.is_dir() and any(path.iterdir()):
            raise LongRopeError(f"the output folder {path} is not empty; nothing is overwritten: choose another -o")
    except OSError as error:
        raise LongRopeError(f"cannot read the output folder {path}: {error.strerror}; choose another -o") from error


def check_output_file(path: Path) -> None:
    """Raise LongRopeError when `path` exists, or a file could not be written there. Creates nothing."""
    if path.exists():
        raise LongRopeError(f"{path} exists; nothing is overwritten: choose another -o")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LongRopeError(f"cannot write {path}: {error.strerror}; choose another -o") from error


def new_output_folder(path: Path) -> Path:
    """Create `path` for new output.

    Raises LongRopeError when it exists with anything in it, is a file, or cannot be written.
    """
    check_output_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise LongRopeError(f"cannot write to the output folder {path}: {error.strerror}; choose another -o") from error
    return path


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
