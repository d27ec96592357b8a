"""Grids of test parameters of which a few cells run per commit and the others in the slow tier."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import product
from typing import Any

import pytest


def grid(per_commit: Collection[tuple[Any, ...]], *axes: Iterable[Any]) -> list[Any]:
    """Every cell of the product of `axes`; those that are not `per_commit` are marked slow."""
    cells = list(product(*axes))
    assert set(per_commit) <= set(cells)
    return [cell if cell in per_commit else pytest.param(*cell, marks=pytest.mark.slow) for cell in cells]
