"""Write the generated parts of ARCHITECTURE.md: the tree with one line per file, and the figures of the house.

    python scripts/architecture.py           # writes them
    python scripts/architecture.py --check   # exit code 1 where the tree is out of date

The line of a file is the first sentence of its docstring.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/longrope"
PAGE = ROOT / "ARCHITECTURE.md"
ROOMS = (
    "cli",
    "recipes",
    "costs",
    "report",
    "doctor",
    "train",
    "standalone",
    "export",
    "evaluation",
    "search",
    "models",
    "data",
    "rope",
)
"""From the top down."""


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without the full stop."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<! al)(?<!App)\.(?:\s|$)", paragraph, maxsplit=1)[0]  # "et al." and "App. C" end no sentence


def tree() -> str:
    """The rooms from the top down, the root modules last, each file with its line."""
    lines = ["```"]
    for room in ROOMS:
        lines.append(f"{room}/".ljust(28) + first_sentence(PACKAGE / room / "__init__.py"))
        files = [path for path in sorted((PACKAGE / room).rglob("*.py")) if path.name != "__init__.py"]
        inner = [path for path in files if path.parent != PACKAGE / room]
        for path in (path for path in files if path.parent == PACKAGE / room):
            lines.append(f"  {path.stem}".ljust(28) + first_sentence(path))
        for folder, members in groupby(inner, key=lambda path: path.parent):
            lines.append(f"  {folder.relative_to(PACKAGE / room)}/".ljust(28) + first_sentence(folder / "__init__.py"))
            for path in members:
                lines.append(f"    {path.stem}".ljust(28) + first_sentence(path))
    for path in sorted(PACKAGE.glob("*.py")):
        lines.append(path.stem.ljust(28) + first_sentence(path))
    return "\n".join([*lines, "```"])


def lines_of(folder: Path) -> dict[Path, int]:
    """Lines of every Python file below `folder`."""
    return {path: len(path.read_text("utf-8").splitlines()) for path in folder.rglob("*.py")}


def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports, those under TYPE_CHECKING and inside functions too."""
    names = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        found[name] = {target for target in targets if target in names and target != name}
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected groups of more than one module (Tarjan); packages' own __init__ files are left out."""
    graph = {name: targets for name, targets in graph.items() if name != "longrope"}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name] & graph.keys()):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return groups


def figures() -> str:
    """The size of the house as a table."""
    code, tests = lines_of(PACKAGE), lines_of(ROOT / "tests")
    files = {path: count for path, count in code.items() if path.name != "__init__.py"}
    longest = max(files, key=lambda path: files[path])
    rows = [
        ("files of code", f"{len(code)}"),
        ("lines of code", f"{sum(code.values()):,}"),
        ("lines of a file, mean (without `__init__`)", f"{sum(files.values()) / len(files):.0f}"),
        ("longest file", f"{files[longest]} (`{longest.relative_to(PACKAGE)}`)"),
        ("lines of tests", f"{sum(tests.values()):,} ({sum(tests.values()) / sum(code.values()):.2f} of the code)"),
        ("circles of imports", f"{len(circles(imports()))}"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


PARTS: dict[str, Callable[[], str]] = {"tree": tree, "figures": figures}
"""The generated parts of the page. The figures change with every line: only the tree is held against the page."""


def written(page: str, names: Iterable[str] = PARTS) -> str:
    """`page` with the parts `names` made anew."""
    for name, text in ((name, PARTS[name]()) for name in names):
        pattern = rf"(<!-- {name}: generated -->\n).*?(<!-- end of {name} -->)"
        page, count = re.subn(pattern, lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page, flags=re.S)
        if count != 1:
            raise SystemExit(f"{PAGE.name} has no place for the generated part {name!r}")
    return page


def main() -> int:
    page = PAGE.read_text("utf-8")
    if "--check" in sys.argv[1:]:
        return int(written(page, ["tree"]) != page)
    PAGE.write_text(written(page), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
