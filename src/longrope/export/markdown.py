"""Text from outside as Markdown that shows it and does nothing else: as plain text, as a code span, as a code block.

A model card is rendered as Markdown with HTML on the hub. Names of models, methods and files come from strangers'
files; none of their characters may begin a tag, a link, a table's cell, a heading or a line.
"""

from __future__ import annotations

import re

# A parenthesis acts behind a bracket only, and a colon not before a space: neither need be escaped there.
_SPECIAL = re.compile(r"[\\`*_{}\[\]#+!|~<>&@$^=-]|:(?! )")
_LONGEST = 300  # characters of one text


def plain(value: object, longest: int = _LONGEST) -> str:
    """`value` on one line, every character that Markdown or HTML may act on escaped; at most `longest` of them.

    Characters between words that act in neither (`-`, `_`, `:` and the like between letters or digits) stay.
    """

    def escaped(match: re.Match[str]) -> str:
        character, at = match[0], match.start()
        inside = match.string[at - 1 : at].isalnum() and match.string[at + 1 : at + 2].isalnum()
        if inside and character in "-_+=":
            return character
        # References to characters: backslashes would end a link or a tag that has begun in no parser alike.
        return f"&#{ord(character)};"

    text = _one_line(value)
    return _SPECIAL.sub(escaped, text if len(text) <= longest else f"{text[: longest - 1]}…")


def code_span(value: object) -> str:
    """`value` on one line as a code span; not for the cell of a table, which a `|` in it would end."""
    text = _one_line(value)
    fence = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_block(lines: list[str]) -> str:
    """Lines as a fenced code block, each on one line. A fence is longer than any run of backticks inside."""
    kept = [_one_line(line) for line in lines]
    fence = "`" * max(3, max(map(_longest_run, kept), default=0) + 1)
    return "\n".join([fence, *kept, fence])


def _one_line(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split())


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
