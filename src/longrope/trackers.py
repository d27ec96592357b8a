"""The experiment trackers that a job can report to: Weights & Biases and Trackio, each a package of that name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from longrope.errors import LongRopeError

TRACKERS = ("wandb", "trackio")
"""Their names for `report_to`."""


def check_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The names. Raises LongRopeError for one that is no tracker, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise LongRopeError(
                f"expected {' or '.join(TRACKERS)} in `report_to`, found {name!r}", code="invalid-setting"
            )
        if find_spec(name) is None:
            raise LongRopeError(
                f"`report_to` {name} needs the package {name}, which is not installed",
                code="missing-dependency",
                hint=f"pip install {name}",
            )
    return tuple(names)
