"""Lengths for tests on the tiny checkpoint."""

from __future__ import annotations

from tests.checkpoints import WINDOW

NEEDLE_LENGTH = 8 * WINDOW  # instruction, needle, request and result alone take some 300 tokens of the tiny tokenizer
