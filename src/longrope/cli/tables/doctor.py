"""A diagnosis of a checkpoint: a row for each runtime, then reasons, advice, remarks and lints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longrope.cli.common import output, table
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.doctor.compare import Finding, RuntimeAtLength
    from longrope.doctor.diagnose import Diagnosis


def show_diagnosis(found: Diagnosis, strict: bool) -> None:
    """Print a diagnosis; with `strict`, a window applied at another's lengths is a failure too."""
    if found.expected is not None:
        output.print(f"expected: {found.expected.source}")
    lengths = sorted({at.length for finding in found.findings for at in finding.by_length})
    rows = table("", ["runtime", "verdict", *map(format_length, lengths), "max λ error", "m"])
    for finding in found.findings:
        cells = {at.length: _window(at) for at in finding.by_length}
        mark = "" if finding.runtime.name in found.counted else " ·"
        rows.add_row(
            finding.label + mark,
            finding.verdict,
            *(cells.get(length, "") for length in lengths),
            _error(finding.max_factor_error),
            "" if finding.attention_factor is None else f"{finding.attention_factor:.4g}",
        )
    output.print(rows)
    output.print("* not the window of this length; – not served; · not counted for the exit code")
    for finding in found.findings:
        _explain(finding)
    for remark in found.remarks:
        output.print(f"\nnote: {remark}")
    if found.lints:
        output.print("\nlints")
    for lint in found.lints:
        output.print(f"  {lint.name}: {lint.says}\n    do: {lint.advice}")
    failures = [finding.label for finding in found.failures(strict)]
    counted = [finding for finding in found.findings if finding.runtime.name in found.counted]
    output.print(
        f"\n{len(failures)} of {len(counted)} counted runtimes fail: {'; '.join(failures)}"
        if failures
        else f"\nnone of {len(counted)} counted runtimes drops or changes the scaling"
    )


def _explain(finding: Finding) -> None:
    lines = [
        *finding.reasons,
        *(f"do: {advice}" for advice in finding.advice),
        *(f"note: {note}" for note in finding.notes),
    ]
    if lines:
        output.print(
            f"\n{finding.label} ({finding.runtime.version}, rule {finding.runtime.evidence}): {finding.verdict}"
        )
    for line in lines:
        output.print(f"  {line}")


def _window(at: RuntimeAtLength) -> str:
    if at.window is None:
        return "–"
    return at.window if at.as_expected else f"{at.window}*"


def _error(error: float | None) -> str:
    if error is None:
        return ""
    return "0" if error <= 1e-6 else f"{error:.2g}"
