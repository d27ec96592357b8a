"""Fixtures of `embedded.py`, found by every test of this room."""

from __future__ import annotations

from tests.evaluation.embedded import oracle

__all__ = ["oracle"]
