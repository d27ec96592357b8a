"""The mix of a fine-tuning run: the parts that its rows are of (table in packing.py), and their shares of tokens."""

from __future__ import annotations

from longrope.errors import LongRopeError

SHORT, PIECES, MEDIUM, LONG, CHUNKS = PARTS = ("short", "pieces", "medium", "long", "chunks")
ORIGINAL_WINDOW = (SHORT, PIECES)
"""Parts whose rows are computed under the original window."""
WHOLE_ROWS = (LONG, CHUNKS)
"""Parts with one attention over a row: a row of `long` is one segment, one of `chunks` a piece of the chain."""


def parse_mix(text: str) -> dict[str, float]:
    """Parse shares of tokens by part, such as `long` or `short:0.3,long:0.7`, and scale them to add up to 1.

    Raises LongRopeError (`invalid-setting`) for an unknown part, a part named twice, or a share that is not positive.
    """
    shares: dict[str, float] = {}
    for entry in text.split(","):
        part, _, share = entry.strip().partition(":")
        try:
            value = float(share) if share else 1.0
        except ValueError:
            value = 0.0
        if part not in PARTS or part in shares or not 0.0 < value < float("inf"):
            raise LongRopeError(
                f"expected a mix such as long or short:0.3,long:0.7, of {', '.join(PARTS)}, each once with a positive "
                f"share; found {text!r}",
                code="invalid-setting",
            )
        shares[part] = value
    total = sum(shares.values())
    return {part: shares[part] / total for part in PARTS if part in shares}
