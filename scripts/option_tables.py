"""Write docs/command-line.md: every verb with its options, from the verbs and their configurations.

python scripts/option_tables.py           # writes it
python scripts/option_tables.py --check   # exit code 1 where it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from longrope.cli.main import app

PAGE = Path(__file__).resolve().parent.parent / "docs/command-line.md"
NOTE = "<!-- Written by scripts/option_tables.py; change the configurations and verbs in its place. -->\n\n"
COMPLETION = "`longrope --install-completion` installs completion for your shell."


def page() -> str:
    """The page in Markdown."""
    verbs = app.generate_docs(output_format="markdown").partition("## longrope --install-completion")[0]
    lines = [line for line in verbs.splitlines() if "--install-completion" not in line]
    return NOTE + "\n".join([*lines, COMPLETION, ""])


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.is_file() or PAGE.read_text("utf-8") != text)
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
