"""Files that are written in full or not at all and never overwritten: text and JSON, and the checks of outputs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError, one_line
from longrope.input_files import LARGEST_JSON, refuse_special
from longrope.run_files import FINETUNE_IDENTITY, SEARCH_LOG
from longrope.written import note, occupied_by, publish, sweep, sweep_links, temporary

ANOTHER_FOLDER = "choose another `output_dir`"
ANOTHER_FILE = "choose another `output`"


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_text(text: str) -> str:
    """Hexadecimal SHA-256 of `text` as UTF-8."""
    return sha256_bytes(text.encode())


def write_text_atomic(path: Path, text: str, *, new: bool = False) -> None:
    """Write `text` to `path` in full or not at all: a reader never sees half a file, a full disk leaves the old one.

    With `new`, a file that is there already, even one that has just appeared, is kept. Raises LongRopeError:
    `output-not-writable`, or `output-exists` with `new`.
    """
    made = temporary(path)
    try:
        try:
            with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(made, 0o644)
            note(path.parent, {path.name: sha256_text(text)})
            if new:
                publish(made, path)
            else:
                os.replace(made, path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise LongRopeError(
            f"cannot write {path}: {error.strerror}; nothing was changed", code="output-not-writable"
        ) from error


def write_json_atomic(path: Path, value: Any, *, new: bool = False) -> None:
    """`write_text_atomic` of `value` as indented JSON; NaN and infinity are refused because JSON has neither."""
    write_text_atomic(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n", new=new)


def keep_or_write_json(path: Path, value: Mapping[str, Any], *, but: Collection[str] = ()) -> None:
    """Write `value` to `path` as JSON, or keep the file that is there, which must hold the same.

    For the result of a job that may have been stopped after it wrote it. Keys in `but`, and keys that only one of the
    two has, may differ: other versions leave others. Raises LongRopeError: `damaged-file` where another value stands
    there, else what reading and writing raise.
    """
    if not os.path.lexists(path):
        write_json_atomic(path, value, new=True)
        return
    hint = "put it back, or move it to another place to have it written again"
    try:
        differing = differences(read_json(path), json.loads(json.dumps(value)), but)
    except LongRopeError as error:
        raise LongRopeError(error.message, code=error.code, hint=hint) from error
    if differing:
        raise LongRopeError(
            f"{path} is not what this run came to: {', '.join(differing)} differ", code="damaged-file", hint=hint
        )


def differences(found: Any, wanted: Any, but: Collection[str], place: str = "") -> list[str]:
    """The places (`outer.inner`) at which two JSON values differ.

    Keys in `but`, and keys of an object that only one of the two has, are not looked at.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() & wanted.keys() - set(but))
        inner = [(found[key], wanted[key], f"{place}.{key}" if place else key) for key in keys]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        inner = [(one, other, place) for one, other in zip(found, wanted, strict=True)]
    else:
        return [] if found == wanted else [place]
    return list(dict.fromkeys(differing for one in inner for differing in differences(one[0], one[1], but, one[2])))


def read_json(path: Path, limit: int = LARGEST_JSON) -> dict[str, Any]:
    """The JSON object in the file `path`, of at most `limit` bytes.

    Raises LongRopeError, naming the path: `missing-file` when there is no such file, `damaged-file` when it holds
    anything else than a JSON object.
    """
    refuse_special(path, limit)
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

    Nothing counts that a process can leave that was killed before it had anything to keep (`occupied_by`). Raises
    LongRopeError (`output-exists`) when `path` is a file or a folder with anything else in it.
    """
    if path.exists() and not path.is_dir():
        raise LongRopeError(
            f"expected a folder for the output, found a file at {path}", code="output-exists", hint=ANOTHER_FOLDER
        )
    try:
        full = occupied_by(path) is not None
    except OSError as error:
        raise LongRopeError(
            f"cannot read the output folder {path}: {error.strerror}", code="output-not-writable", hint=ANOTHER_FOLDER
        ) from error
    if full:
        begun = any((path / state).exists() for state in (SEARCH_LOG, FINETUNE_IDENTITY))
        raise LongRopeError(
            f"the output folder '{path}' is not empty; nothing is overwritten",
            code="output-exists",
            hint=f"go on with the run in it by `resume`, or {ANOTHER_FOLDER}" if begun else ANOTHER_FOLDER,
        )


class NewOutput:
    """The output of a run that may still be refused: the folders that it makes, and the files that it says."""

    def __init__(self, folder: Path) -> None:
        self._folders = [place for place in (folder, *folder.parents) if not place.exists()]
        self._written: list[Path] = []

    def wrote(self, *paths: Path) -> None:
        """Files of the run that nobody misses if it is refused, and folders that are empty then."""
        self._written += paths

    def keep(self) -> None:
        """The run has begun: from here on its output is what it can be resumed from."""
        self._folders, self._written = [], []

    def remove(self) -> None:
        """Remove the files, and the folders as far as they are empty then."""
        for path in [*self._written, *self._folders]:
            with suppress(OSError):  # a folder that is not empty is somebody's
                path.rmdir() if path.is_dir() else path.unlink()


@contextmanager
def nothing_left_if_refused(folder: Path) -> Iterator[NewOutput]:
    """Removes the output in `folder` again when an error ends the block before it was kept.

    For a new run. Ctrl-C and other stops are no refusal: what there is stays.
    """
    output = NewOutput(folder)
    try:
        yield output
    except Exception:
        output.remove()
        raise


def check_output_file(path: Path) -> None:
    """Check that a new file can be written at `path`. Creates nothing.

    Raises LongRopeError: `output-exists` when something is there, `output-not-writable` when its folder cannot be
    written.
    """
    if os.path.lexists(path):  # a link to nothing is something, too
        sweep_links(path.parent)
        raise _exists(path)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LongRopeError(
            f"cannot write {path}: {error.strerror}", code="output-not-writable", hint=ANOTHER_FILE
        ) from error


def _exists(path: Path) -> LongRopeError:
    return LongRopeError(f"{path} exists; nothing is overwritten", code="output-exists", hint=ANOTHER_FILE)


def refuse_links(*paths: Path) -> None:
    """Raise LongRopeError (`output-exists`) where one of `paths`, a place inside of a run folder, is a symbolic link: a
    run would write through it, into another folder.
    """
    for path in paths:
        if path.is_symlink():
            raise LongRopeError(
                f"{path} is a symbolic link; a run writes into its own folder only",
                code="output-exists",
                hint="remove the link, or choose another `output_dir`",
            )


def new_output_folder(path: Path) -> Path:
    """Create `path` for new output; what a killed process left there is removed.

    Raises LongRopeError: `output-exists` when it is a file or has anything in it, `output-not-writable` when it cannot
    be written.
    """
    check_output_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        sweep(path)
    except OSError as error:
        raise LongRopeError(
            f"cannot write to the output folder {path}: {error.strerror}",
            code="output-not-writable",
            hint=ANOTHER_FOLDER,
        ) from error
    return path
