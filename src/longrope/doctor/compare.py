"""The verdict on a runtime: the RoPE that it computes against the expected one, the reasons, and advice."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from longrope.doctor.expected import Expected
from longrope.doctor.rules import LONG, SHORT, Behaviour, Rotation
from longrope.doctor.table import Runtime
from longrope.models.gguf.rope import short_context
from longrope.rope.scaling import Window

Verdict = Literal["exact", "partly", "differs", "dropped", "refused", "unknown"]
FAILURES: tuple[Verdict, ...] = ("differs", "dropped", "refused")
"""Verdicts by which a runtime drops or changes the scaling. `partly` is not among them: its windows are exact."""

_SHOWN_AT_LENGTH = ("length", "window", "as_expected", "factor_error", "attention_factor", "expected_attention_factor")
_SUMMARIES: dict[str, str] = {
    "differs": "changes it: {}",
    "dropped": "drops it: {}",
    "refused": "refuses the checkpoint: {}",
}
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
class Checkpoint:
    """The facts about a diagnosed checkpoint that go into the findings."""

    path: str
    family: str
    """model_type, or the architecture of a GGUF file."""
    repair: str
    """The advice to repair its config.json."""
    query_scale: float = 1.0
    """The factor that an export folded into the queries' weights, which scales every logit."""

    @property
    def placeholders(self) -> dict[str, Any]:
        """The values of the placeholders in the table's texts, in which the path is part of a command."""
        return {"path": shlex.quote(self.path), "family": self.family, "repair": self.repair}


@dataclass(frozen=True, slots=True)
class RuntimeAtLength:
    """A runtime at one length, compared with the window that the scaling has there."""

    length: int
    window: str | None
    """`short` or `long`; where both are the same `one`, or `plain` if they rescale nothing; None: not served."""
    factor_error: float
    """The largest |λ/λ_expected − 1| of a rotary pair."""
    attention_factor: float
    expected_attention_factor: float
    as_expected: bool
    other_window: bool
    """True if the runtime applies, exactly, another window of the scaling."""
    other_factors: bool
    """True if the runtime applies the factors of another window, whatever its attention factor."""
    plain: bool
    """True if no frequency is rescaled."""

    @property
    def wrong_attention_factor(self) -> bool:
        """True if the length is served with another attention factor than the expected one."""
        return self.window is not None and _differ(self.attention_factor, self.expected_attention_factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The verdict on one runtime."""

    runtime: Runtime
    label: str
    verdict: Verdict
    summary: str
    """The verdict in words, to follow the label of the runtime."""
    by_length: Sequence[RuntimeAtLength] = ()
    factors: dict[str, list[float]] = field(default_factory=dict)
    """λ per rotary pair, by window, relative to the base of the expected scaling."""
    reasons: Sequence[str] = ()
    notes: Sequence[str] = ()
    advice: Sequence[str] = ()

    @property
    def max_factor_error(self) -> float | None:
        """The largest factor error of all lengths that are served; None where nothing is computed."""
        served = [at.factor_error for at in self.by_length if at.window is not None]
        return max(served) if served else None

    @property
    def attention_factor(self) -> float | None:
        """m at the longest length that is served."""
        served = [at.attention_factor for at in self.by_length if at.window is not None]
        return served[-1] if served else None

    def __str__(self) -> str:
        """The runtime, the verdict and its reasons on one line."""
        return "; ".join((f"{self.label}: {self.verdict}", *self.reasons))

    def to_json(self) -> dict[str, Any]:
        """The entry of this runtime in `longrope doctor --json`."""
        return {
            "name": self.runtime.name,
            "label": self.label,
            "version": self.runtime.version,
            "evidence": self.runtime.evidence,
            "source": self.runtime.source,
            "verdict": self.verdict,
            "summary": self.summary,
            "max_factor_error": self.max_factor_error,
            "attention_factor": self.attention_factor,
            "lengths": [{name: getattr(at, name) for name in _SHOWN_AT_LENGTH} for at in self.by_length],
            "factors": self.factors,
            "reasons": list(self.reasons),
            "notes": list(self.notes),
            "advice": list(self.advice),
        }


def compare(runtime: Runtime, found: Behaviour, expected: Expected, checkpoint: Checkpoint, *, label: str) -> Finding:
    """The finding on a runtime that computes `found` from `checkpoint`."""
    by_length = [_at_length(length, found, expected, checkpoint.query_scale) for length in expected.lengths]
    verdict = _verdict(by_length, runtime, found, expected)
    values = checkpoint.placeholders | {"switch": found.original_length, "engine": found.engine}
    values |= {"target": expected.scaling.target_length, "inside": short_context(found.original_length)}
    wrong_m = any(at.wrong_attention_factor for at in by_length)
    always_long = runtime.switch == "context" and values["inside"] == 0
    partly = runtime.advice_always_long if always_long else runtime.advice
    advice = {"exact": [], "partly": [partly]}.get(verdict, [runtime.repair])
    wrong_factors = any(at.factor_error > _TOLERANCE and not at.other_factors for at in by_length if at.window)
    if (
        wrong_m
        and not wrong_factors
        and found.windowed
        and runtime.attention in _ATTENTION_REPAIR
        and verdict == "differs"
    ):
        advice = [_ATTENTION_REPAIR[runtime.attention]]
    if verdict == "differs" and found.capped and not wrong_factors:
        advice = [f"set max_position_embeddings to {expected.scaling.target_length}"]
    notes, crossing = [], ""
    if found.windowed and verdict not in FAILURES:
        if _apart(found.short, found.long) and found.switch in ("forward", "at", "past"):
            crossing = runtime.crossing
        notes = [crossing, *runtime.notes]
    grown = bool(crossing) and not runtime.recomputes_keys
    reasons = [text.format(**values) for text in _reasons(by_length, runtime, found, expected)]
    switch_says = runtime.switch_says.format(**values)
    return Finding(
        runtime=runtime,
        label=label,
        verdict=verdict,
        summary=_summary(verdict, [*found.remarks, *reasons], by_length, switch_says, found, grown),
        by_length=by_length,
        factors=_effective_factors(found, expected),
        reasons=[*found.remarks, *reasons],
        notes=[note.format(**values) for note in notes if note],
        advice=[text.format(**values) for text in advice if text],
    )


def failed(
    runtime: Runtime, verdict: Verdict, reasons: Sequence[str], checkpoint: Checkpoint, *, label: str
) -> Finding:
    """The finding on a runtime that computes nothing to compare: it refuses the checkpoint, or drops its scaling."""
    advice = [runtime.repair.format(**checkpoint.placeholders)]
    summary = _SUMMARIES[verdict].format("; ".join(reasons))
    return Finding(runtime=runtime, label=label, verdict=verdict, summary=summary, reasons=reasons, advice=advice)


def unknown(runtime: Runtime, why: str, *, label: str) -> Finding:
    """The finding on a runtime for which the table has no rule, or that nothing can be compared with."""
    return Finding(runtime=runtime, label=label, verdict="unknown", summary=f"unknown: {why}", reasons=[why])


def _summary(
    verdict: Verdict,
    reasons: Sequence[str],
    by_length: Sequence[RuntimeAtLength],
    switch_says: str,
    found: Behaviour,
    grown: bool,
) -> str:
    """The verdict in words: how the runtime applies the scaling, or the first reason why it does not.

    `grown`: it keeps stale keys of a text that grows past L while it is generated.
    """
    if verdict == "exact":
        but = f", but not to a text that grows past {found.original_length} tokens while it is generated"
        return f"applies it exactly at every length{but if grown else ''}"
    if verdict == "dropped" and not found.remarks:
        return _SUMMARIES[verdict].format("no factors are applied")
    if verdict != "partly":
        return _SUMMARIES[verdict].format(next(iter(reasons), "its angles are others"))
    if any(at.window is None for at in by_length):
        served = f"applies it up to {found.engine} tokens, for which it is started, and serves no longer texts"
        return served + (f"; it {switch_says}" if any(at.other_window for at in by_length) else "")
    return f"applies it; it {switch_says}"


def _at_length(length: int, found: Behaviour, expected: Expected, query_scale: float) -> RuntimeAtLength:
    wanted, rotation = expected.scaling.window_for(length), found.at(length)
    if rotation is None:
        nan = math.nan
        return RuntimeAtLength(length, None, nan, nan, wanted.attention_factor, False, False, False, False)
    m = rotation.attention_factor * math.sqrt(query_scale)
    turning = [
        window
        for window in expected.scaling.windows
        if not window.start_tokens and _factor_error(window, rotation, expected) <= _TOLERANCE
    ]  # no runtime but ours has start tokens
    matching = [window for window in turning if not _differ(m, window.attention_factor)]
    same = "plain" if rotation.plain else "one"
    return RuntimeAtLength(
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


def _verdict(by_length: Sequence[RuntimeAtLength], runtime: Runtime, found: Behaviour, expected: Expected) -> Verdict:
    if all(at.as_expected for at in by_length):
        return "exact"
    target = by_length[-1]
    scaled = any(factor != 1.0 for factor in expected.scaling.windows[-1].factors)
    if target.plain and scaled:
        return "dropped"
    # A runtime may choose the window otherwise than by the text's length. That is a fault where the runtime does choose
    # by length, where it has another L, or where L' itself is not served as it should be.
    own_way = found.switch != "forward" and (not found.windowed or found.original_length == expected.switch)
    reaches = target.as_expected or (target.window is None and runtime.engine != "target")
    if own_way and reaches and all(at.as_expected or at.other_window or at.window is None for at in by_length):
        return "partly"
    return "differs"


def _reasons(by_length: Sequence[RuntimeAtLength], runtime: Runtime, found: Behaviour, expected: Expected) -> list[str]:
    """The differences, one phrase each, with the placeholders of the table's texts."""
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
    served = [at for at in by_length if at.window is not None]
    pairs_of_m = {
        (f"{at.attention_factor:.5g}", f"{at.expected_attention_factor:.5g}")
        for at in served
        if at.wrong_attention_factor and not at.other_window
    }
    says = _ATTENTION_SAYS.get(runtime.attention, "") if found.windowed else ""
    for mine, wanted in sorted(pairs_of_m):
        reasons.append(f"attention factor {mine} instead of {wanted}{says}")
    others = [at for at in served if at.other_factors and at.window != "plain"]
    for window in (SHORT, LONG, "one"):
        lengths = [str(at.length) for at in others if at.window == window]
        if lengths:
            reasons.append(f"{window} window at {_listed(lengths)}: {runtime.switch_says}")
    unserved = [str(at.length) for at in by_length if at.window is None]
    if unserved:
        reasons.append(f"does not serve {_listed(unserved)}: it is started for {{engine}} tokens")
    wrong = [at for at in served if at.factor_error > _TOLERANCE and at not in others]
    if wrong and pairs == geometry.pairs:
        worst = max(at.factor_error for at in wrong)
        lengths = [str(at.length) for at in wrong]
        says = "no factors are applied" if all(at.plain for at in wrong) else "factors differ"
        reasons.append(f"{says} at {_listed(lengths)}: λ off by up to {worst:.2%}")
    return reasons


def _effective_factors(found: Behaviour, expected: Expected) -> dict[str, list[float]]:
    """The factors by which the runtime divides the original frequencies: `short` and `long`, or `one` for both."""
    own = expected.scaling.geometry.inv_freq
    rotations = {SHORT: found.short, LONG: found.long} if _apart(found.short, found.long) else {"one": found.long}
    return {
        name: (own / rotation.frequencies).tolist()
        for name, rotation in rotations.items()
        if rotation.frequencies.shape == own.shape
    }


def _apart(short: Rotation, long: Rotation) -> bool:
    return short.attention_factor != long.attention_factor or not np.array_equal(short.frequencies, long.frequencies)


def _differ(first: float, second: float) -> bool:
    return abs(first / second - 1.0) > _TOLERANCE


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + (" and " if len(items) > 1 else "") + items[-1]
