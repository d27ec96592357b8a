"""The house keeps its shape: imports go downward through the rooms, files stay readable, nothing unsafe creeps in.

Imports are read with `ast`, so the lazy ones inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src/longrope"

# From the top down. A room imports itself, the rooms of lower levels and the root modules; rooms of one level are
# independent of one another.
LEVELS = (
    ("cli",),
    ("recipes",),
    ("costs",),
    ("report", "doctor", "train", "standalone"),
    ("export",),
    ("evaluation", "search"),
    ("models",),
    ("data",),
    ("rope",),
)
ROOMS = tuple(room for level in LEVELS for room in level)
ROOT_MODULES = (
    "callbacks",
    "progress_log",
    "checks",
    "errors",
    "input_files",
    "file_links",
    "locked",
    "provenance",
    "run_files",
    "safe_yaml",
    "settings",
    "storage",
    "quantities",
    "trackers",
    "transformers_version",
    "units",
    "written",
)
MOST_LINES = 400
# __init__.py may offer any room's functions; __main__.py starts the command line.
UNBOUND = ("__init__", "__main__")


def room_of(path: Path, package: Path) -> str:
    """`search` for search/space.py, `errors` for errors.py; `path` lies in `package`."""
    return path.relative_to(package).with_suffix("").parts[0]


def imported_modules(tree: ast.AST, module: tuple[str, ...]) -> set[str]:
    """Full names of everything that `tree`, the file of package-or-module path `module`, imports.

    `module` is the package that relative imports start from, e.g. ("longrope", "search") for search/space.py.
    For `from a import b`, `a` and `a.b` are both named, because `b` may be a module.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = module[: len(module) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def import_faults(path: Path, package: Path) -> list[str]:
    """The modules of `package` above `path` that it imports, one line each."""
    room = room_of(path, package)
    module = (package.name, *path.relative_to(package).parent.parts)
    targets = {
        name.split(".")[1]
        for name in imported_modules(ast.parse(path.read_text("utf-8")), module)
        if name.startswith(f"{package.name}.")
    }
    if room in UNBOUND:
        return []
    if room in ROOT_MODULES:
        return [f"{path}: root module {room} imports room {target}" for target in sorted(targets & set(ROOMS))]
    if room == "assets":
        return [f"{path}: assets hold data, not code"]
    if room not in ROOMS:
        return [f"{path}: {room} is neither a room nor a root module"]
    level = next(place for place, rooms in enumerate(LEVELS) if room in rooms)
    refused = {other for rooms in LEVELS[: level + 1] for other in rooms} - {room}
    return [f"{path}: room {room} imports {target}, which is not below it" for target in sorted(targets & refused)]


def circles(paths: list[Path], package: Path) -> list[list[str]]:
    """Modules of `package` that import one another in a circle, each circle once: its modules in order of import."""
    names = {}
    for path in paths:
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, list[str]] = {}
    for name, path in names.items():
        module = (package.name, *path.relative_to(package).parent.parts)
        found = imported_modules(ast.parse(path.read_text("utf-8")), module)
        # `from a import b` names a too; where b is a module, a itself is no more than its folder.
        graph[name] = sorted(
            target
            for target in found & names.keys() - {name, package.name}
            if not any(other.startswith(f"{target}.") for other in found & names.keys())
        )
    seen: set[str] = set()
    faults = []

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            faults.append(way[way.index(name) :])
        elif name not in seen:
            seen.add(name)
            for target in graph[name]:
                visit(target, [*way, name])

    for name in sorted(graph):
        visit(name, [])
    return faults


def safety_faults(path: Path) -> list[str]:
    """Uses of pickle, torch.load, os.environ or a shell in `path`, one line each."""
    faults = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        found = None
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "environ", "getenv"}
            found = next((name for name in names if name.split(".")[0] in unsafe), None)
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            found = dotted if dotted in {"torch.load", "os.environ", "os.getenv", "os.system"} else None
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            found = None if isinstance(node.value, ast.Constant) and node.value.value is False else "shell=True"
        if found:
            faults.append(f"{path}:{getattr(node, 'lineno', 0)}: {found}")
    return faults


def length_faults(path: Path) -> list[str]:
    """One line when `path` has more than MOST_LINES lines."""
    lines = len(path.read_text("utf-8").splitlines())
    return [f"{path}: {lines} lines, at most {MOST_LINES}: give the second topic its own file"] * (lines > MOST_LINES)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_there_is_something_to_check() -> None:
    assert {room_of(path, PACKAGE) for path in sources()} >= {*ROOT_MODULES, "rope"}


def test_imports_go_downward() -> None:
    assert [fault for path in sources() for fault in import_faults(path, PACKAGE)] == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    inside = [path for path in sources() if path != PACKAGE / "__init__.py"]  # that one offers names of every room
    assert circles(inside, PACKAGE) == []


def test_no_file_is_too_long() -> None:
    assert [fault for path in sources() for fault in length_faults(path)] == []


def test_nothing_unsafe() -> None:
    assert [fault for path in sources() for fault in safety_faults(path)] == []


# The checkers themselves: a house with one wrong file.


def wrong_file(folder: Path, name: str, text: str) -> tuple[Path, Path]:
    """A package `longrope` in `folder` with one file; (file, package)."""
    package = folder / "longrope"
    path = package / name
    path.parent.mkdir(parents=True)
    path.write_text(text, "utf-8")
    return path, package


@pytest.mark.parametrize(
    ("name", "text", "room"),
    [
        ("rope/angles.py", "from longrope.models.loading import load\n", "models"),
        ("rope/angles.py", "import longrope.search.spaces as space\n", "search"),
        ("rope/angles.py", "from longrope import models\n", "models"),
        ("evaluation/run.py", "from longrope.search.log import SearchLog\n", "search"),
        ("search/space.py", "def run():\n    from longrope.train import trainer\n", "train"),
        ("data/text.py", "from ..evaluation.base import nll\n", "evaluation"),
        ("data/deep/text.py", "from ...search import loss\n", "search"),
        ("models/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import longrope.cli.main\n", "cli"),
        ("storage.py", "from longrope.rope import angles\n", "rope"),
        ("storage.py", "from .rope import angles\n", "rope"),
    ],
)
def test_an_import_upward_is_found(tmp_path: Path, name: str, text: str, room: str) -> None:
    (fault,) = import_faults(*wrong_file(tmp_path, name, text))
    assert f" {room}" in fault


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cli/main.py", "from longrope.recipes import run\nfrom longrope.rope.scaling import RopeScaling\n"),
        ("search/space.py", "from longrope.search.log import Log\nfrom . import critical\nfrom .critical import x\n"),
        ("rope/angles.py", "import torch\nfrom longrope.errors import LongRopeError\nfrom .. import storage\n"),
        ("storage.py", "from longrope.errors import LongRopeError\n"),
        ("__init__.py", "from longrope.search import search\n"),
    ],
)
def test_an_import_downward_is_no_fault(tmp_path: Path, name: str, text: str) -> None:
    assert import_faults(*wrong_file(tmp_path, name, text)) == []


@pytest.mark.parametrize(
    ("third", "found"),
    [
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from longrope.rope.a import x\n", True),
        ("def later():\n    from . import a\n", True),
        ("import longrope.rope.b\n", True),
        ("from longrope.rope import other\n", False),
    ],
)
def test_a_circle_is_found(tmp_path: Path, third: str, found: bool) -> None:
    package = tmp_path / "longrope"
    (package / "rope").mkdir(parents=True)
    texts = {
        "__init__": "",
        "other": "",
        "a": "from longrope.rope.b import y\n",
        "b": "import longrope.rope.c\n",
        "c": third,
    }
    for name, text in texts.items():
        (package / f"rope/{name}.py").write_text(text, "utf-8")
    assert bool(circles(sorted(package.rglob("*.py")), package)) == found


@pytest.mark.parametrize("name", ["attic/old.py", "assets/code.py", "helpers.py"])
def test_code_outside_the_rooms_is_found(tmp_path: Path, name: str) -> None:
    assert len(import_faults(*wrong_file(tmp_path, name, "x = 1\n"))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\n",
        "from pickle import loads\n",
        "import torch\nx = torch.load('a.bin')\n",
        "import os\nx = os.environ['A']\n",
        "import os\nx = os.environ.get('A')\n",
        "import os\nx = os.getenv('A')\n",
        "from os import environ\n",
        "import subprocess\nsubprocess.run('ls', shell=True)\n",
        "import os\nos.system('ls')\n",
    ],
)
def test_something_unsafe_is_found(tmp_path: Path, text: str) -> None:
    assert len(safety_faults(wrong_file(tmp_path, "cli/a.py", text)[0])) == 1


def test_what_only_speaks_of_it_is_safe(tmp_path: Path) -> None:
    text = '"""No pickle, no torch.load(, no os.environ."""\nimport subprocess\nsubprocess.run(["ls"], shell=False)\n'
    assert safety_faults(wrong_file(tmp_path, "cli/a.py", text)[0]) == []


def test_a_long_file_is_found(tmp_path: Path) -> None:
    path, _ = wrong_file(tmp_path, "cli/a.py", "x = 1\n" * MOST_LINES)
    assert length_faults(path) == []
    path.write_text("x = 1\n" * (MOST_LINES + 1), "utf-8")
    assert len(length_faults(path)) == 1
