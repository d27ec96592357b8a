"""The releases of transformers that longrope is known to work with; any other is refused before it is used.

Generation, scoring and saving stand in for methods of transformers. A release that renames an argument of such a method
computes something else without an error, so a release is trusted after the tests have passed with it, not before:
`make test-transformers TRANSFORMERS=5.25.0`, then the numbers below and the bound in pyproject.toml are raised.

All tests pass with 5.23 and 5.24, and all but a few with the releases before: docs/runtimes.md says which, and why.
What a release cannot compute at all is refused where it is needed (`require_longrope_by_layer`).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from longrope.errors import LongRopeError

KNOWN = ("5.17", "5.24")
"""The first and the last minor release, with every patch release of them."""


BY_LAYER = "5.21"
"""The first minor release that computes longrope where layer types have a RoPE of their own (Gemma 3, OLMo 3)."""


def require_longrope_by_layer(family: str) -> None:
    """Raise LongRopeError where the installed transformers cannot compute longrope for one of several layer types."""
    found = version("transformers")
    if _minor(found) < _minor(BY_LAYER):
        raise LongRopeError(
            f"expected transformers {BY_LAYER} or later for a checkpoint of {family} with longrope, which has one RoPE"
            f" per layer type; found {found}",
            code="unknown-transformers",
            hint=f"pip install 'transformers>={BY_LAYER}'",
        )


def require_known_transformers() -> None:
    """Raise LongRopeError unless the installed transformers is a known one. It is not imported."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = ""
    first, last = (_minor(known) for known in KNOWN)
    if not found or not first <= _minor(found) <= last:
        raise LongRopeError(
            f"expected transformers {KNOWN[0]} to {KNOWN[1]}, the releases that longrope {version('longrope')} is known"
            f" to work with; found {found or 'none'}",
            code="unknown-transformers",
            hint=f"pip install 'transformers{requirement()}', or a newer longrope",
        )


def requirement() -> str:
    """KNOWN as pip writes it: `>=5.17,<5.25`."""
    first, (major, minor) = KNOWN[0], _minor(KNOWN[1])
    return f">={first},<{major}.{minor + 1}"


def _minor(text: str) -> tuple[int, int]:
    """`5.24.0` -> (5, 24); development versions are of the release to come: `5.25.0.dev0` -> (5, 25)."""
    numbers = [int(part) for part in text.split(".")[:2] if part.isdigit()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)
