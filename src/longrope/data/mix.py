"""The parts that training rows are made of, and their shares. How documents become rows is in `packing.py`."""

from __future__ import annotations

from longrope.errors import LongRopeError

SHORT, PIECES, MEDIUM, LONG = PARTS = ("short", "pieces", "medium", "long")
ORIGINAL_WINDOW = (SHORT, PIECES)
"""The parts that train the original window."""


def parse_mix(text: str) -> dict[str, float]:
    """Shares of tokens by part: `long`, or `short:0.3,long:0.7`; they are scaled to add up to 1.

    Raises LongRopeError for an unknown part, one named twice, or a share that is not positive.
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
                f"share; found {text!r}"
            )
        shares[part] = value
    total = sum(shares.values())
    return {part: shares[part] / total for part in PARTS if part in shares}
