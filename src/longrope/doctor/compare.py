"""What a runtime computes against what it should: a verdict, by how much it differs, why, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from longrope.doctor.expected import Expected
from longrope.doctor.rules import LONG, SHORT, Behaviour, Rotation
from longrope.doctor.table import Runtime
from longrope.rope.scaling import Window

Verdict = Literal["exact", "partly", "differs", "dropped", "refused", "unknown"]
FAILURES: tuple[Verdict, ...] = ("differs", "dropped", "refused")
"""Verdicts by which a runtime drops or changes the scaling. `partly` is not among them: what it applies is exact."""

_TOLERANCE = 1e-5  # relative; float32 factors of a GGUF file are off by up to 6e-8
_ATTENTION_SAYS = {
    "lengths": " (it computes √(1 + ln s/ln L) from the lengths and does not read attention_factor)",
    "mscale": " (it reads short_mscale and long_mscale, not attention_factor)",
    "none": " (it has none)",
}
_ATTENTION_REPAIR = {
    "mscale": "write short_mscale and long_mscale into the dictionary ({repair})",
    "lengths": "longrope export --fold-attention-factor",
    "none": "longrope export --fold-attention-factor",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What is diagnosed."""

    path: str
    family: str
    repair: str
    """How its config.json is mended."""
    query_scale: float = 1.0
    """What the weights add to every logit, folded into the queries."""

    @property
    def places(self) -> dict[str, Any]:
        """What the table's texts may hold."""
        return {"path": self.path, "family": self.family, "repair": self.repair}


@dataclass(frozen=True, slots=True)
class Cell:
    """A runtime at one length: how far from the window that the scaling has there."""

    length: int
    window: str | None
    """`short` or `long`; where both are the same `one`, or `plain` if they rescale nothing; None: not served."""
    factor_error: float
    """Largest |λ/λ_expected − 1| of a rotary pair."""
    attention_factor: float
    expected_attention_factor: float
    as_expected: bool
    other_window: bool
    """Whether it is, exactly, another window of the scaling."""
    other_factors: bool
    """The same of the factors alone, whatever the attention factor."""
    plain: bool
    """Whether no frequency is rescaled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The verdict on one runtime."""

    runtime: Runtime
    label: str
    verdict: Verdict
    cells: Sequence[Cell] = ()
    factors: dict[str, list[float]] = field(default_factory=dict)
    """λ per rotary pair, by window, relative to the base of the scaling that is expected."""
    reasons: Sequence[str] = ()
    notes: Sequence[str] = ()
    advice: Sequence[str] = ()

    @property
    def max_factor_error(self) -> float | None:
        """The largest factor error of all lengths that are served; None where nothing is computed."""
        served = [cell.factor_error for cell in self.cells if cell.window is not None]
        return max(served) if served else None

    @property
    def attention_factor(self) -> float | None:
        """m at the longest length that is served."""
        served = [cell.attention_factor for cell in self.cells if cell.window is not None]
        return served[-1] if served else None

    def to_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "name": self.runtime.name,
            "label": self.label,
            "version": self.runtime.version,
            "evidence": self.runtime.evidence,
            "source": self.runtime.source,
            "verdict": self.verdict,
            "max_factor_error": self.max_factor_error,
            "attention_factor": self.attention_factor,
            "lengths": [
                {
                    "length": cell.length,
                    "window": cell.window,
                    "as_expected": cell.as_expected,
                    "factor_error": cell.factor_error,
                    "attention_factor": cell.attention_factor,
                    "expected_attention_factor": cell.expected_attention_factor,
                }
                for cell in self.cells
            ],
            "factors": self.factors,
            "reasons": list(self.reasons),
            "notes": list(self.notes),
            "advice": list(self.advice),
        }


def compare(runtime: Runtime, found: Behaviour, expected: Expected, loaded: LoadedModel, *, label: str) -> Finding:
    """The finding on a runtime that computes `found` from `loaded`."""
    cells = [_cell(length, found, expected, loaded.query_scale) for length in expected.lengths]
    verdict = _verdict(cells, runtime, found, expected)
    places = loaded.places | {"switch": found.original_length, "engine": found.engine}
    places |= {"target": expected.scaling.target_length}
    wrong_m = any(_wrong_attention(cell) for cell in cells)
    advice = {"exact": [], "partly": [runtime.advice]}.get(verdict, [runtime.repair])
    if wrong_m and runtime.attention in _ATTENTION_REPAIR and verdict == "differs":
        advice = [_ATTENTION_REPAIR[runtime.attention]]
    notes = []
    if found.windowed and verdict not in FAILURES:
        two = _apart(found.short, found.long)
        crossing = runtime.crossing_families.get(loaded.family, runtime.crossing)
        notes = [crossing] * (two and found.switch in ("forward", "past")) + runtime.notes
    return Finding(
        runtime=runtime,
        label=label,
        verdict=verdict,
        cells=cells,
        factors=_effective_factors(found, expected),
        reasons=[*found.remarks, *(reason.format(**places) for reason in _reasons(cells, runtime, found, expected))],
        notes=[note.format(**places) for note in notes if note],
        advice=[text.format(**places) for text in advice if text],
    )


def refused(runtime: Runtime, why: str, loaded: LoadedModel, *, label: str) -> Finding:
    """The finding on a runtime that stops with an error."""
    return Finding(
        runtime=runtime, label=label, verdict="refused", reasons=[why], advice=[runtime.repair.format(**loaded.places)]
    )


def dropped(runtime: Runtime, why: Sequence[str], loaded: LoadedModel, *, label: str) -> Finding:
    """The finding on a runtime that drops a scaling of which only the name is left."""
    return Finding(
        runtime=runtime, label=label, verdict="dropped", reasons=why, advice=[runtime.repair.format(**loaded.places)]
    )


def unknown(runtime: Runtime, why: str, *, label: str) -> Finding:
    """The finding on a runtime of which nothing can be said."""
    return Finding(runtime=runtime, label=label, verdict="unknown", reasons=[why])


def _cell(length: int, found: Behaviour, expected: Expected, query_scale: float) -> Cell:
    wanted, rotation = expected.scaling.window_for(length), found.at(length)
    if rotation is None:
        return Cell(length, None, math.nan, math.nan, wanted.attention_factor, False, False, False, False)
    m = rotation.attention_factor * math.sqrt(query_scale)
    turning = [
        window
        for window in expected.scaling.windows
        if not window.start_tokens and _factor_error(window, rotation, expected) <= _TOLERANCE
    ]  # no runtime but ours has start tokens
    matching = [window for window in turning if not _differ(m, window.attention_factor)]
    same = "plain" if rotation.plain else "one"
    return Cell(
        length=length,
        window=found.window(length) if _apart(found.short, found.long) else same,
        factor_error=_factor_error(wanted, rotation, expected),
        attention_factor=m,
        expected_attention_factor=wanted.attention_factor,
        as_expected=wanted in matching,
        other_window=bool(matching) and wanted not in matching,
        other_factors=bool(turning) and wanted not in turning,
        plain=rotation.plain,
    )


def _factor_error(window: Window, rotation: Rotation, expected: Expected) -> float:
    """Largest |λ/λ_expected − 1|; infinite where another number of dimensions rotates."""
    wanted = expected.scaling.geometry.inv_freq / np.asarray(window.factors)
    if rotation.frequencies.shape != wanted.shape:
        return math.inf
    return float(np.abs(wanted / rotation.frequencies - 1.0).max())


def _verdict(cells: Sequence[Cell], runtime: Runtime, found: Behaviour, expected: Expected) -> Verdict:
    if all(cell.as_expected for cell in cells):
        return "exact"
    target = cells[-1]
    scaled = any(factor != 1.0 for factor in expected.scaling.windows[-1].factors)
    if target.plain and scaled:
        return "dropped"
    # Choosing a window otherwise than by the text's length is a runtime's way. It is a fault where the runtime does
    # choose by length, where it has another L, or where L' itself is not served as it should be.
    own_way = found.switch != "forward" and (not found.windowed or found.original_length == expected.switch)
    reaches = target.as_expected or (target.window is None and runtime.engine != "target")
    if own_way and reaches and all(cell.as_expected or cell.other_window or cell.window is None for cell in cells):
        return "partly"
    return "differs"


def _reasons(cells: Sequence[Cell], runtime: Runtime, found: Behaviour, expected: Expected) -> list[str]:
    geometry, reasons = expected.scaling.geometry, []
    pairs = found.long.frequencies.size
    if pairs != geometry.pairs:
        reasons.append(f"turns {2 * pairs} dimensions of a head instead of {geometry.rotary_dim}")
    if _differ(found.base, geometry.base):
        reasons.append(f"base {found.base:g} instead of {geometry.base:g}")
    two = len(expected.scaling.windows) > 1
    if found.windowed and two and found.original_length != expected.switch:
        reasons.append(f"L is {found.original_length} instead of {expected.switch}")
    with_start = [window.max_length for window in expected.scaling.windows if window.start_tokens]
    if with_start:
        reasons.append(f"has no start tokens (windows to {', '.join(map(str, with_start))})")
    seen = [cell for cell in cells if cell.window is not None]
    pairs_of_m = {
        (f"{cell.attention_factor:.5g}", f"{cell.expected_attention_factor:.5g}")
        for cell in seen
        if _wrong_attention(cell) and not cell.other_window
    }
    says = _ATTENTION_SAYS.get(runtime.attention, "") if found.windowed else ""
    for mine, wanted in sorted(pairs_of_m):
        reasons.append(f"attention factor {mine} instead of {wanted}{says}")
    others = [cell for cell in seen if cell.other_factors and cell.window != "plain"]
    for window in (SHORT, LONG, "one"):
        lengths = [str(cell.length) for cell in others if cell.window == window]
        if lengths:
            reasons.append(f"{window} window at {_listed(lengths)}: {runtime.switch_says}")
    unserved = [str(cell.length) for cell in cells if cell.window is None]
    if unserved:
        reasons.append(f"does not serve {_listed(unserved)}: it is started for {{engine}} tokens")
    wrong = [cell for cell in seen if cell.factor_error > _TOLERANCE and cell not in others]
    if wrong and pairs == geometry.pairs:
        worst = max(cell.factor_error for cell in wrong)
        at = _listed([str(cell.length) for cell in wrong])
        says = "no factors are applied" if all(cell.plain for cell in wrong) else "factors differ"
        reasons.append(f"{says} at {at}: λ off by up to {worst:.2%}")
    return reasons


def _effective_factors(found: Behaviour, expected: Expected) -> dict[str, list[float]]:
    own = expected.scaling.geometry.inv_freq
    rotations = {SHORT: found.short, LONG: found.long} if _apart(found.short, found.long) else {"one": found.long}
    return {
        name: (own / rotation.frequencies).tolist()
        for name, rotation in rotations.items()
        if rotation.frequencies.shape == own.shape
    }


def _apart(short: Rotation, long: Rotation) -> bool:
    return short.attention_factor != long.attention_factor or not np.array_equal(short.frequencies, long.frequencies)


def _wrong_attention(cell: Cell) -> bool:
    return cell.window is not None and _differ(cell.attention_factor, cell.expected_attention_factor)


def _differ(first: float, second: float) -> bool:
    return abs(first / second - 1.0) > _TOLERANCE


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + (" and " if len(items) > 1 else "") + items[-1]
