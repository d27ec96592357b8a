"""Durations, bytes and counts as a person reads them, with their unit: `1.2 h`, `38 GB`, `3.4B`."""

from __future__ import annotations

import math


def format_duration(seconds: float) -> str:
    """A duration: `< 1 s`, `36 s`, `4 min 12 s`, `57 min`, `1.9 h`, `140 h`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 1:
        return "< 1 s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if round(seconds) < 600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    if round(seconds / 60) < 100:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if round(hours, 1) < 10 else f"{hours:,.0f} h"


def format_bytes(size: float) -> str:
    """Bytes in powers of 1000: `950 bytes`, `640 kB`, `3.1 MB`, `38 GB`, `1,160 GB`."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * one:
            return f"{_two_digits(size / one).removesuffix('.0')} {unit}"
    return f"{size:.0f} bytes"


def format_count(number: float) -> str:
    """A count of tokens or weights: `950`, `24k`, `38M`, `3.4B`, in powers of 1000."""
    for unit, one in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * one:
            return f"{_two_digits(number / one)}{unit}"
    return f"{number:.0f}"


def format_gpu_hours(hours: float) -> str:
    """Hours of all devices together: `< 0.01`, `0.25`, `7.6`, `430`."""
    return "< 0.01" if hours < 0.01 else f"{hours:.2f}" if hours < 1 else _two_digits(hours)


def format_rate(per_second: float) -> str:
    """Events by the time that fits them: `2.3 a second`, `14 a minute`, `5.0 an hour`."""
    for unit, seconds in (("a second", 1), ("a minute", 60)):
        if per_second * seconds >= 1:
            return f"{_two_digits(per_second * seconds)} {unit}"
    return f"{_two_digits(per_second * 3600)} an hour"


def _two_digits(value: float) -> str:
    """One decimal below 10, none from there on."""
    return f"{value:.1f}" if round(value, 1) < 10 else f"{value:,.0f}"
