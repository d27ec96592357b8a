"""Files that are written in full or not at all, never overwritten, and written by one process at a time.

JSON and text are written atomically; a `LineLog` is an append-only file of whole lines; a `FolderLock` keeps a second
process out of a run folder. Locks are the operating system's locks on the files themselves (by `filelock`): a process
that is killed leaves no lock behind. On Windows a locked file cannot be read by other processes meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

from filelock import lock_descriptor, unlock_descriptor

from longrope.errors import LongRopeError, one_line
from longrope.input_files import LARGEST_JSON, refuse_special
from longrope.run_files import LOCK

ANOTHER_FOLDER = "choose another `output_dir`"
_ANOTHER_FILE = "choose another `output`"


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
        raise LongRopeError(
            f"cannot write {path}: {error.strerror}; nothing was changed", code="output-not-writable"
        ) from error


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` of `value` as indented JSON; NaN and infinity are refused because JSON has neither."""
    write_text_atomic(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises LongRopeError, naming the path: `missing-file` when there is no such file, `damaged-file` when it holds
    anything else than a JSON object.
    """
    refuse_special(path, LARGEST_JSON)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise LongRopeError(f"cannot read {path}: {error.strerror}", code="missing-file") from error
    except OSError as error:
        raise LongRopeError(f"cannot read {path}: {error.strerror}", code="unreadable-file") from error
    except UnicodeDecodeError as error:
        raise LongRopeError(f"expected JSON in {path}, found bytes that are no UTF-8", code="damaged-file") from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises LongRopeError (`damaged-file`), naming `where`, when it holds anything else."""
    value = parse_json_value(text, where)
    if not isinstance(value, dict):
        raise LongRopeError(f"expected a JSON object in {where}, found {type(value).__name__}", code="damaged-file")
    return value


def parse_json_value(text: str, where: str) -> Any:
    """The JSON value in `text`. Raises LongRopeError (`damaged-file`), naming `where`, when it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LongRopeError(
            f"expected JSON in {where}, found something else: {one_line(error)}", code="damaged-file"
        ) from error


def json_number(value: float | None) -> float | str | None:
    """`value` as JSON can hold it and `float` reads it back: NaN and infinity become their names."""
    return value if value is None or math.isfinite(value) else str(value)


def json_ready(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity become None, tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return value


def check_output_folder(path: Path) -> None:
    """Check that `path` is free for new output. Creates nothing.

    A lock file alone, which a killed process can leave, does not count as content. Raises LongRopeError
    (`output-exists`) when `path` is a file or a folder with anything in it.
    """
    if path.exists() and not path.is_dir():
        raise LongRopeError(
            f"expected a folder for the output, found a file at {path}", code="output-exists", hint=ANOTHER_FOLDER
        )
    try:
        full = path.is_dir() and any(entry.name != LOCK for entry in path.iterdir())
    except OSError as error:
        raise LongRopeError(
            f"cannot read the output folder {path}: {error.strerror}", code="output-not-writable", hint=ANOTHER_FOLDER
        ) from error
    if full:
        raise LongRopeError(
            f"the output folder {path} is not empty; nothing is overwritten", code="output-exists", hint=ANOTHER_FOLDER
        )


def check_output_file(path: Path) -> None:
    """Check that a new file can be written at `path`. Creates nothing.

    Raises LongRopeError: `output-exists` when something is there, `output-not-writable` when its folder cannot be
    written.
    """
    if path.exists():
        raise LongRopeError(f"{path} exists; nothing is overwritten", code="output-exists", hint=_ANOTHER_FILE)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LongRopeError(
            f"cannot write {path}: {error.strerror}", code="output-not-writable", hint=_ANOTHER_FILE
        ) from error


def new_output_folder(path: Path) -> Path:
    """Create `path` for new output.

    Raises LongRopeError: `output-exists` when it is a file or has anything in it, `output-not-writable` when it cannot
    be written.
    """
    check_output_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise LongRopeError(
            f"cannot write to the output folder {path}: {error.strerror}",
            code="output-not-writable",
            hint=ANOTHER_FOLDER,
        ) from error
    return path


class _LockedFile:
    """An open file, locked against other processes until it is closed. Use it in a `with` block."""

    def __init__(self, path: Path, flags: int, busy: str) -> None:
        """Open and lock `path`. Raises OSError where it cannot be opened, LongRopeError (`locked`) where another
        process has it; the message is `busy`.
        """
        self.path = path
        self._handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) | flags, 0o644)
        try:
            if not lock_descriptor(self._handle, blocking=False):
                raise LongRopeError(busy, code="locked", hint="wait for it or stop it")
        except BaseException:
            os.close(self._handle)
            raise

    def close(self) -> None:
        """Unlock and close."""
        unlock_descriptor(self._handle)
        os.close(self._handle)

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
    """An append-only JSONL file with one writer: every line is whole, and the first says which run it is of.

    A subclass reads its lines in `_load`. Use `create` or `resume`, in a `with` block.
    """

    schema: ClassVar[str] = ""
    """The `schema` in the first line."""
    another: ClassVar[str] = _ANOTHER_FILE
    """The hint where the file is of another run."""

    def __init__(self, path: Path, *, new: bool) -> None:
        """Open and lock `path`, which `new` creates.

        Raises LongRopeError: `locked` where another process writes it, `output-exists` where a new one is there
        already, `not-resumable` where there is none to go on with, `output-not-writable` where it cannot be opened.
        """
        flags = os.O_APPEND | (os.O_CREAT | os.O_EXCL if new else 0)
        try:
            super().__init__(path, flags, f"another process is writing {path}")
        except FileExistsError as error:
            hint = f"continue it with `resume=True`, or {self.another}"
            raise LongRopeError(f"{path} exists", code="output-exists", hint=hint) from error
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not new:
                raise nothing_to_resume(path) from error
            raise LongRopeError(f"cannot write {path}: {error.strerror}", code="output-not-writable") from error

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Self:
        """A new file with `header` as its first line. Raises LongRopeError as opening and writing do."""
        line = json.dumps({"schema": cls.schema, **header}, allow_nan=False)
        log = cls(path, new=True)
        try:
            log.write(line)
        except BaseException:  # an empty file could be neither resumed nor created again
            log.close()
            path.unlink()
            raise
        return log

    @classmethod
    def resume(cls, path: Path, header: dict[str, Any]) -> Self:
        """The file at `path` with its lines, ready to go on.

        Raises LongRopeError when there is none, when a line is damaged, or when the file is of another run than
        `header`: results of other settings, texts or models are not comparable.
        """
        log = cls(path, new=False)
        try:
            log._load(json.loads(json.dumps(header)))
        except BaseException:
            log.close()
            raise
        return log

    def _load(self, header: dict[str, Any]) -> None:
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
        """Append a line in full; where that fails, or on Ctrl-C, remove the part already written.

        Raises LongRopeError (`output-not-writable`); the lines before are kept.
        """
        data = f"{line}\n".encode()
        size = os.fstat(self._handle).st_size
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except BaseException as error:
            self.cut(size)
            if not isinstance(error, OSError):
                raise
            kept, hint = "it is valid up to here", "make room and continue with `resume=True`"
            if not size:
                kept, hint = "nothing was kept", "make room and start again"
            raise LongRopeError(
                f"cannot write {self.path}: {error.strerror}; {kept}", code="output-not-writable", hint=hint
            ) from error

    def cut(self, size: int) -> None:
        """Remove everything after the first `size` bytes."""
        os.ftruncate(self._handle, size)


def nothing_to_resume(path: Path) -> LongRopeError:
    """The error where the log `path` is missing."""
    return LongRopeError(f"there is no {path} to resume", code="not-resumable", hint="start without `resume=True`")
