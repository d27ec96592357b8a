"""The container of a GGUF file: the byte ranges of its keys and tensors, found without loading a tensor.

The `gguf` package's own reader builds an object for every string of the vocabulary: 9 s and 0.7 GB for one of 128,000
tokens. Byte ranges are enough to copy a file with a few keys changed and every other byte as it was.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError, one_line
from longrope.input_files import require_regular

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types of fixed size -> their code in `struct`."""
F32 = 0
_READABLE = (2, 3)  # version 1 had 32-bit counts; llama.cpp reads 2 and 3
_MOST_DIMS = 4  # GGML_MAX_DIMS
_LONGEST_NAME = 2**16  # bytes of a key, by the format's description
_MOST_STRINGS = 2**23  # of one array: vocabularies and merges have some 10^5
_SMALLEST_KEY, _SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes of a record: a header's counts must fit the file
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a GGUF file."""

    type: int
    value: Any
    """A number, a bool or a string; None for an array, whose items are not read."""
    start: int
    end: int
    """Byte range of the whole record: name, type and value."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a GGUF file, and the byte range of its data."""

    dims: tuple[int, ...]
    """The fastest first, as GGUF counts them."""
    type: int
    """Its ggml type."""
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The keys and tensors of one file, in its order."""

    path: Path
    version: int
    keys: dict[str, Key]
    tensors: dict[str, TensorInfo]
    alignment: int

    def value(self, name: str, default: Any = None) -> Any:
        """The value of a key that is no array, or `default` where the file lacks it."""
        return self.keys[name].value if name in self.keys else default


def read_gguf(path: Path) -> GgufFile:
    """Read the container of the GGUF file `path`.

    Raises LongRopeError when the file is none, or truncated or damaged (`damaged-file`), or big-endian, of version 1
    or one part of several (`unsupported-gguf`).
    """
    require_regular(path)
    # ggml type -> elements and bytes of one block
    sizes = {int(kind): size for kind, size in gguf_package().GGML_QUANT_SIZES.items()}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != MAGIC:
                raise LongRopeError(f"expected a GGUF file, found another kind of file at {path}", code="damaged-file")
            found = _parse(path, data, sizes)
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        code = "missing-file" if isinstance(error, FileNotFoundError) else "damaged-file"
        raise LongRopeError(f"cannot read the GGUF file {path}: {one_line(error)}", code=code) from error
    except struct.error as error:
        raise _damaged(path, "is truncated: it ends inside its header") from error
    count = found.value("split.count", 1)
    if isinstance(count, int) and count > 1:
        raise _one_part(path, count)
    return found


def _one_part(path: Path, count: int) -> LongRopeError:
    """The refusal of a split file, with the first part that is not beside it."""
    named = _SPLIT_NAME.fullmatch(path.name)
    if named is not None and int(named["count"]) == count:
        for index in range(1, count + 1):
            part = path.with_name(f"{named['stem']}-{index:05}-of-{count:05}.gguf")
            if not part.is_file():
                return LongRopeError(
                    f"{path} is one part of {count}, and {part.name} is missing beside it",
                    code="missing-file",
                    hint="fetch it, then join them with llama.cpp's llama-gguf-split --merge",
                )
    return LongRopeError(
        f"{path} is one part of {count}",
        code="unsupported-gguf",
        hint="join them with llama.cpp's llama-gguf-split --merge first",
    )


def read_array(file: GgufFile, name: str) -> list[Any]:
    """The items of an array of `file`, numbers or strings. Raises LongRopeError (`damaged-file`) where it has none."""
    key = file.keys.get(name)
    if key is None or key.type != ARRAY:
        found = "none" if key is None else f"a value of type {key.type}"
        raise _damaged(file.path, f"is damaged: expected a list as {name}, found {found}")
    with file.path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        cursor.skip(key.start)
        cursor.string()
        cursor.number("I")
        item, count = cursor.number("I"), cursor.number("Q")
        if item == STRING:
            return [cursor.string() for _ in range(count)]
        start = cursor.skip(count * struct.calcsize("<" + SCALARS[item]))
        return list(struct.unpack_from(f"<{count}{SCALARS[item]}", data, start))


class _Cursor:
    """A place in the bytes that moves as values are read. Past the end, `struct.error` is raised."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def skip(self, size: int) -> int:
        """Move by `size` bytes; returns the place before."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise struct.error("past the end")
        return start

    def string(self, longest: int | None = None) -> str:
        size = self.number("Q")
        if longest is not None and size > longest:
            raise struct.error(f"a name of {size} bytes")
        start = self.skip(size)
        return self.data[start : start + size].decode("utf-8", "surrogateescape")


def _parse(path: Path, data: mmap.mmap, sizes: dict[int, tuple[int, int]]) -> GgufFile:
    cursor = _Cursor(data)
    cursor.skip(len(MAGIC))
    version = cursor.number("I")
    if version not in _READABLE:
        found = "a big-endian file" if version and version & 0xFFFF == 0 else f"version {version}"
        raise LongRopeError(
            f"expected little-endian GGUF of version 2 or 3, found {found} in {path}",
            code="unsupported-gguf",
            hint="convert the model again",
        )
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    if tensor_count * _SMALLEST_TENSOR + key_count * _SMALLEST_KEY > len(data):
        counts = f"{tensor_count} tensors and {key_count} keys in {len(data)} bytes"
        raise _damaged(path, f"is truncated or damaged: its header says {counts}")
    keys: dict[str, Key] = {}
    for _ in range(key_count):
        start = cursor.at
        name, kind = cursor.string(_LONGEST_NAME), cursor.number("I")
        if name in keys:
            raise _damaged(path, f"is damaged: it has the key {name!r} twice")
        keys[name] = Key(kind, _value(path, cursor, kind), start, cursor.at)
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name, rank = cursor.string(_LONGEST_NAME), cursor.number("I")
        if rank > _MOST_DIMS:
            raise _damaged(path, f"is damaged: a tensor with {rank} dimensions")
        if name in infos:
            raise _damaged(path, f"is damaged: it has the tensor {name!r} twice")
        dims = tuple(cursor.number("Q") for _ in range(rank))
        infos[name] = (dims, cursor.number("I"), cursor.number("Q"))
    alignment = keys[ALIGNMENT_KEY].value if ALIGNMENT_KEY in keys else ALIGNMENT
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _damaged(path, f"is damaged: {ALIGNMENT_KEY} {alignment!r}")
    base = padded(cursor.at, alignment)
    tensors: dict[str, TensorInfo] = {}
    for name, (dims, kind, offset) in infos.items():
        if kind not in sizes:
            raise LongRopeError(
                f"{path}: tensor {name!r} has the unknown ggml type {kind}",
                code="unsupported-gguf",
                hint="a newer gguf package may know it",
            )
        block, size = sizes[kind]
        if offset % alignment or (dims[0] if dims else 1) % block:
            raise _damaged(path, f"is damaged: tensor {name!r} of {dims} elements at byte {offset} of its data")
        tensors[name] = TensorInfo(dims, kind, base + offset, math.prod(dims) // block * size)
    end = max((tensor.start + tensor.size for tensor in tensors.values()), default=cursor.at)
    if end > len(data):
        raise _damaged(path, f"is truncated: its tensors need {end} bytes, it has {len(data)}")
    return GgufFile(path, version, keys, tensors, alignment)


def _value(path: Path, cursor: _Cursor, kind: int) -> Any:
    """Read a value of type `kind`, or step over it when it is an array."""
    if kind in SCALARS:
        return cursor.number(SCALARS[kind])
    if kind == STRING:
        return cursor.string()
    if kind != ARRAY:
        raise _damaged(path, f"is damaged: a value of type {kind}")
    item, count = cursor.number("I"), cursor.number("Q")
    if item in SCALARS:
        cursor.skip(count * struct.calcsize("<" + SCALARS[item]))
    elif item == STRING:
        if count > _MOST_STRINGS:
            raise _damaged(path, f"is damaged: an array of {count} strings")
        for _ in range(count):
            cursor.skip(cursor.number("Q"))
    else:
        raise _damaged(path, f"is damaged: an array of type {item}")
    return None


def _damaged(path: Path, fault: str) -> LongRopeError:
    return LongRopeError(f"the GGUF file {path} {fault}", code="damaged-file", hint="fetch it again")


@contextmanager
def alone(path: Path) -> Iterator[dict[str, str]]:
    """The arguments by which transformers loads the GGUF file `path` and nothing that lies beside it.

    From its own folder, transformers would take a tokenizer.json or an adapter that is there in place of the file's.
    """
    with tempfile.TemporaryDirectory(prefix="longrope-gguf-") as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": path.name}


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def gguf_package() -> Any:
    """The optional `gguf` package. Raises LongRopeError (`missing-dependency`) when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise LongRopeError(
            "GGUF files need the gguf package",
            code="missing-dependency",
            hint='install it with: pip install "longrope[gguf]"',
        ) from error
    return gguf
