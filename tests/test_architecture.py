"""ARCHITECTURE.md says what the house is: its tree is that of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def architecture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "scripts/architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tree_is_up_to_date(architecture: ModuleType) -> None:
    """`python scripts/architecture.py` writes it."""
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    assert architecture.written(page, ["tree"]) == page


def test_every_file_says_what_it_is(architecture: ModuleType) -> None:
    lines = {path: architecture.first_sentence(path) for path in architecture.PACKAGE.rglob("*.py")}
    assert {path.name for path, line in lines.items() if not line} == set()


def test_no_circles(architecture: ModuleType) -> None:
    assert architecture.circles(architecture.imports()) == []
    circle = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert architecture.circles(circle) == [["a", "b", "c"]]


def test_every_folder_has_its_tests() -> None:
    """tests/ has the rooms of src/."""
    rooms = {path.name for path in (ROOT / "src/longrope").iterdir() if (path / "__init__.py").is_file()}
    tested = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert rooms - tested == set()
    assert tested - rooms - {"runtimes"} == set()
