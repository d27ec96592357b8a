"""Durations, bytes and counts with their units."""

from __future__ import annotations

import math

import pytest

from longrope.quantities import format_bytes, format_count, format_duration, format_gpu_hours, format_rate


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "< 1 s"),
        (36.4, "36 s"),
        (59.7, "1 min"),
        (252, "4 min 12 s"),
        (3420, "57 min"),
        (5990, "1.7 h"),
        (7200, "2.0 h"),
        (35_990, "10 h"),
        (504_000, "140 h"),
        (math.inf, "unknown"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(120, "120 bytes"), (38_000, "38 kB"), (3.14e6, "3.1 MB"), (999.9e6, "1 GB"), (1.16e12, "1,160 GB")],
)
def test_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(950, "950"), (24_000, "24k"), (999_900, "1.0M"), (38e6, "38M"), (3.36e9, "3.4B"), (1e10, "10B")],
)
def test_counts(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(("hours", "text"), [(0.001, "< 0.01"), (0.25, "0.25"), (7.63, "7.6"), (432, "432")])
def test_gpu_hours(hours: float, text: str) -> None:
    assert format_gpu_hours(hours) == text


@pytest.mark.parametrize(("rate", "text"), [(2.34, "2.3 a second"), (0.5, "30 a minute"), (0.001, "3.6 an hour")])
def test_rates(rate: float, text: str) -> None:
    assert format_rate(rate) == text
