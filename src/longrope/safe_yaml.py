"""YAML from strangers: plain data of a bounded size, with every fault as one line.

An alias is a reference while YAML is parsed, and a copy for whatever walks over the result: nine lines of nine aliases
each stand for 400 million values. Here the values are counted with all aliases written out, before any is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from longrope.errors import LongRopeError
from longrope.input_files import require_regular

LARGEST_FILE = 1_000_000
"""Bytes of a YAML file. The parser needs about a minute for one of 10 MB."""
LARGEST_TREE = 100_000
"""Values of a document, with all aliases written out."""
_TAGS = "tag:yaml.org,2002:"
_MERGE = f"{_TAGS}merge"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml is untyped
    """Safe YAML that refuses a key given twice, of which YAML keeps the last in silence, and knows `1e-8` as a number,
    which YAML 1.1 takes for text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise LongRopeError(f"the key {twice[0]!r} is given twice (line {node.start_mark.line + 1})")
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


_Loader.add_implicit_resolver(
    f"{_TAGS}float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


_KNOWN = {*_Loader.yaml_constructors, _MERGE, f"{_TAGS}value"}


class TagError(LongRopeError):
    """A tag that asks for more than plain data, such as `!function`."""


def read_yaml(path: Path) -> str:
    """The text of a YAML file. Raises LongRopeError for anything but a regular file of UTF-8 of a bounded size."""
    try:
        return require_regular(path, LARGEST_FILE).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LongRopeError(f"cannot read {path}: {error}", code="unreadable-file") from error


def parse_yaml(text: str, called: str, wanted: str = "a mapping") -> dict[Any, Any]:
    """The mapping in `text`, as plain data; `wanted` describes it in an error.

    Raises LongRopeError, naming `called`: for anything that is no mapping in YAML, for a key that is given twice, for
    more values than LARGEST_TREE, and (TagError, `untrusted-code`) for a tag that is not YAML's own.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _require_small(node)
        for inner in _nodes(node):
            if inner.tag not in _KNOWN:
                raise TagError(f"line {inner.start_mark.line + 1} asks for {inner.tag}", code="untrusted-code")
        raw = None if node is None else loader.construct_document(node)
    except TagError as error:
        raise TagError(f"{called} is not YAML of plain data: {error.message}", code=error.code) from error
    except LongRopeError as error:
        raise error.within(called) from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:  # a list is no key
        raise LongRopeError(f"{called} is not YAML: {' '.join(str(error).split())}", code="damaged-file") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(raw, dict):
        raise LongRopeError(f"{called}: expected {wanted}, found {type(raw).__name__}", code="damaged-file")
    return raw


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Every node once."""
    seen: set[int] = set()
    waiting = [] if root is None else [root]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting += _children(node)


def _require_small(root: yaml.Node | None) -> None:
    """Raise LongRopeError where the values below `root`, with aliases written out, are too many or without end."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known is None:
            sizes[id(node)] = -1  # in work: met again below itself, it would never end
            known = sizes[id(node)] = 1 + sum(map(size, _children(node)))
        if known < 0:
            raise LongRopeError("an alias stands inside the value that it names", code="too-large")
        if known > LARGEST_TREE:
            raise LongRopeError(
                f"expected at most {LARGEST_TREE:,} values with all aliases written out, found more", code="too-large"
            )
        return known

    if root is not None:
        size(root)
