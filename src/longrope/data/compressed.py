"""Files as bytes: plain, or decompressed (`.gz`, `.xz`, `.zst`) without ever trusting the size that they unpack to."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from longrope.errors import LongRopeError
from longrope.input_files import refuse_special

COMPRESSIONS = ("", ".gz", ".xz", ".zst")
"""Endings of a file that may follow the one of its format."""

_RATIO, _ALWAYS = 200, 256 * 1024**2  # text is packed 2 to 10 times
_PIECE = 4096  # bytes decompressed at once: 4 bytes of Zstandard can hold 128 KiB
_WINDOW = 2**31  # of `zstd --long=31`, the largest that there is


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed where it ends in `.gz`, `.xz` or `.zst`.

    Raises LongRopeError, naming the path: `unreadable-file` where it cannot be read, is cut off, or unpacks to more
    than 200 times its size and 256 MiB; `missing-dependency` for `.zst` without zstandard.
    """
    refuse_special(path)
    try:
        with path.open("rb") as file:
            unpacked = _unpacked(path, file)
            if unpacked is None:
                yield file
                return
            size = path.stat().st_size
            with io.BufferedReader(_Bounded(path, unpacked, max(_ALWAYS, _RATIO * size))) as bounded:
                yield cast("IO[bytes]", bounded)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise LongRopeError(f"cannot read {path}: {reason}", code="unreadable-file") from error


def _unpacked(path: Path, file: IO[bytes]) -> Any:
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(fileobj=file)
        case ".xz":
            return lzma.LZMAFile(file)
        case ".zst":
            return _Zstandard(path, file)
    return None


class _Bounded(io.RawIOBase):
    """The bytes of `source`, at most `limit` of them."""

    def __init__(self, path: Path, source: Any, limit: int) -> None:
        self.path, self.source, self.limit, self.found = path, source, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.source.read(len(buffer))
        self.found += len(piece)
        if self.found > self.limit:
            raise LongRopeError(
                f"{self.path} unpacks to more than {self.limit // 1024**2} MiB, {_RATIO} times its size or more: that "
                "is no text",
                code="unreadable-file",
                hint="unpack it yourself if it is",
            )
        buffer[: len(piece)] = piece
        return len(piece)


class _Zstandard:
    """`read` of a Zstandard file of one or several frames; one that is cut off is an error, as in gzip and xz."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise LongRopeError(
                f"reading {path} needs zstandard, which is not installed",
                code="missing-dependency",
                hint="pip install 'longrope[train]'",
            ) from error
        self._file, self._error = file, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj
        self._frame: Any = None
        self._packed = self._unpacked = b""

    def read(self, size: int) -> bytes:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_PIECE)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends before its last Zstandard frame does")
                break
            self._frame = self._frame or self._new()
            try:
                self._unpacked = self._frame.decompress(self._packed)
            except self._error as error:
                raise OSError(f"no Zstandard: {error}") from error
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        piece, self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return piece
