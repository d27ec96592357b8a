"""RULER's own scoring: which of the reference strings appear in a reply, from 0 to 100."""

from __future__ import annotations

import re
from collections.abc import Sequence


def postprocess(reply: str) -> str:
    """A reply without surrounding blanks, control characters as line ends (scripts/eval/evaluate.py)."""
    return re.sub(r"[\x00-\x1f]", "\n", reply.strip()).strip()


def string_match_all(reply: str, references: Sequence[str]) -> float:
    """The share of the references that the reply holds, whatever their case, times 100."""
    said = reply.lower()
    return 100.0 * sum(reference.lower() in said for reference in references) / len(references)


def string_match_part(reply: str, references: Sequence[str]) -> float:
    """100 where the reply holds any of the references, else 0: for answers that may be worded differently."""
    said = reply.lower()
    return 100.0 * any(reference.lower() in said for reference in references)
