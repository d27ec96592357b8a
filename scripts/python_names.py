"""Write the table of public names in docs/python.md from their docstrings.

python scripts/python_names.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import longrope

PAGE = Path(__file__).resolve().parent.parent / "docs/python.md"
TABLE = re.compile(r"(?<=<!-- names -->\n).*?(?=<!-- /names -->)", re.DOTALL)


def summary(value: object) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = (inspect.getdoc(value) or "").partition("\n\n")[0]
    return re.split(r"(?<=\.)(?<!et al\.)\s", " ".join(paragraph.split()), maxsplit=1)[0].replace("|", "\\|")


def table() -> str:
    """One row per name of `longrope.__all__`."""
    rows = [f"| `{name}` | {summary(getattr(longrope, name))} |" for name in longrope.__all__]
    return "\n".join(["| name | what it is or does |", "|---|---|", *rows, ""])


def main() -> None:
    page = PAGE.read_text("utf-8")
    PAGE.write_text(TABLE.sub(lambda _: table(), page), "utf-8")


if __name__ == "__main__":
    main()
