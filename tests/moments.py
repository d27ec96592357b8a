"""The states of a folder that kills leave: copies of it before every file operation of a job that runs in this process.

A process that is killed with SIGKILL leaves what the operating system has of its files at that moment: no `finally` and
no buffer. A copy of the folder, taken before an operation, is that state. Python's audit events tell of opening,
renaming, linking and removing; writes that have no event (`os.write`, the weights that safetensors and torch write) are
wrapped. Where files have grown since the copy before, there is a second copy with half of what was added.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

_EVENTS = {"os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_active: Moments | None = None
_hooked = False


class Moments:
    """Copies of the folder `folder` in `copies`, in the order of the operations; equal ones follow each other once."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = folder, copies
        self.operations = 0
        self.states: list[Path] = []
        self._last: dict[str, bytes | None] = {}
        self._sizes: dict[int, int] = {}
        self._busy = False

    def before(self, *paths: object) -> None:
        """An operation on `paths` comes: copy the folder if one of them lies in it."""
        if self._busy or not any(self._is_inside(path) for path in paths):
            return
        self._busy = True
        try:
            self.operations += 1
            self._copy()
        finally:
            self._busy = False

    def _is_inside(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.folder)

    def _copy(self) -> None:
        found = content(self.folder)
        if self.states and found == self._last:
            return
        sizes = {name: (self.folder / name).stat() for name, data in found.items() if data is not None}
        # By its number, so that a file that was renamed has not grown.
        grown = {name: self._sizes.get(at.st_ino, 0) for name, at in sizes.items()}
        cut = {name: (old + sizes[name].st_size) // 2 for name, old in grown.items() if sizes[name].st_size > old + 1}
        if cut and self.states:  # the write itself was cut off
            torn = self._add()
            for name, size in cut.items():
                os.truncate(torn / name, size)
        self._add()
        self._last, self._sizes = found, {at.st_ino: at.st_size for at in sizes.values()}

    def _add(self) -> Path:
        state = self.copies / f"{len(self.states):03}"
        if self.folder.exists():
            _copy(self.folder, state)
        else:
            state.with_suffix(".none").mkdir(parents=True)
        self.states.append(state)
        return state

    def put_back(self, state: Path) -> None:
        """Make the folder what it was in `state`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if state.is_dir():
            _copy(state, self.folder)


def _copy(folder: Path, to: Path) -> None:
    """Copy a folder with its symbolic and hard links."""
    copied: dict[int, str] = {}

    def copy(source: str, target: str) -> None:
        number = os.stat(source).st_ino
        if number in copied:
            os.link(copied[number], target)
        else:
            copied[number] = target
            shutil.copyfile(source, target)

    shutil.copytree(folder, to, symlinks=True, copy_function=copy)


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with its bytes, every folder with None."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


@contextmanager
def moments(folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moments]:
    """Watch `folder` in the block; the last copy is of what is there at its end."""
    global _active, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # for good
        _hooked = True
    watched = Moments(folder.absolute(), copies)
    with monkeypatch.context() as patch:
        _wrap(patch, os, "write", lambda handle, *_: watched.before(_path_of(handle)))
        _wrap(patch, os, "ftruncate", lambda handle, *_: watched.before(_path_of(handle)))
        _wrap(patch, safetensors.torch, "save_file", lambda tensors, path, *_: watched.before(path))
        _wrap(patch, torch, "save", lambda value, path, *_: watched.before(path))
        import transformers.modeling_utils as modeling

        _wrap(patch, modeling, "safe_save_file", lambda tensors, path, *_: watched.before(path))
        _active = watched
        try:
            yield watched
        finally:
            _active = None
    watched.before(folder)


def _wrap(patch: pytest.MonkeyPatch, module: Any, name: str, before: Callable[..., None]) -> None:
    real = getattr(module, name)

    def wrapped(*arguments: Any, **more: Any) -> Any:
        before(*arguments)
        return real(*arguments, **more)

    patch.setattr(module, name, wrapped)


def _path_of(handle: int, name: str = "") -> str:
    return (
        os.path.join(os.readlink(f"/proc/self/fd/{handle}"), name) if name else os.readlink(f"/proc/self/fd/{handle}")
    )


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    watched = _active
    if watched is None or watched._busy:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITING:
            watched.before(path)
    elif event in _EVENTS:
        paths = [entry for entry in arguments if isinstance(entry, str | bytes | os.PathLike)]
        handles = [entry for entry in arguments if isinstance(entry, int) and not isinstance(entry, bool) and entry > 2]
        if handles and event in ("os.remove", "os.rmdir"):  # relative to an open folder, as shutil.rmtree does it
            paths = [_path_of(handles[0], os.fsdecode(path)) for path in paths]
        watched.before(*paths)


def digest(files: dict[str, bytes | None]) -> str:
    """One hash over all that is in a folder."""
    total = hashlib.sha256()
    for name, data in sorted(files.items()):
        total.update(f"{name}\0{'' if data is None else hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()
