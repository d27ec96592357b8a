"""A diagnosis of a checkpoint: the verdict, a sentence for each runtime, lints; details of every runtime on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longrope.cli.common import is_verbose, output, say, show_table
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.doctor.compare import Finding, RuntimeAtLength
    from longrope.doctor.diagnose import Diagnosis
    from longrope.doctor.server import ServerDiagnosis


def show_diagnosis(found: Diagnosis, strict: bool) -> None:
    """Print a diagnosis; with `strict`, a window applied at another's lengths is a failure too.

    The runtimes that count get a sentence each. With --verbose all get their windows, reasons and advice.
    """
    counted = [finding for finding in found.findings if finding.runtime.name in found.counted]
    failures = [finding.label for finding in found.failures(strict)]
    if failures:
        say(f"{len(failures)} of {len(counted)} runtimes drop or change the scaling: {'; '.join(failures)}", "  ")
    elif len(counted) == 1:
        say(f"{counted[0].label} neither drops nor changes the scaling", "  ")
    else:
        some = sum(bool(finding.advice) for finding in counted)
        needs = f"; {some} need what is said below" if some else ""
        say(f"none of {len(counted)} runtimes drops or changes the scaling{needs}")
    if found.expected is not None:
        say(f"expected: {found.expected.source}", "  ")
    if is_verbose():
        _show_windows(found)
        for finding in found.findings:
            _explain(finding)
    else:
        output.print()
        _show_sentences(counted)
        others = len(found.findings) - len(counted)
        say(f"--verbose: windows and reasons of every runtime{f', of {others} others too' if others else ''}")
    for remark in found.remarks:
        say(f"note: {remark}", "  ")
    if found.lints:
        output.print("\nlints")
    for lint in found.lints:
        say(f"- {lint.name}: {lint.says}", "  ")
        say(f"  do: {lint.advice}", "    ")


def show_served(found: ServerDiagnosis) -> None:
    """Print the verdict on a server, then a row for every length; with --verbose the distance of every hypothesis."""
    say(f"{found.model} at {found.server} {found.verdict}", "  ")
    output.print()
    lines = []
    for at in found.lengths:
        mark = "yes" if at.as_expected else "NO" if at.distances else "–"
        nearest = f"{min(at.distances.values()):.2g}" if at.distances else ""
        lines.append([format_length(at.length), mark, nearest, at.found])
    show_table(["tokens", "right", "nats off", "the server computes"], lines, texts=(1, 3))
    say(f"compared by log-probabilities of {found.compared_by}, with the model computed here", "  ")
    for at in found.compared:
        others = [str(hypothesis) for hypothesis in at.near if hypothesis != at.expected]
        if at.as_expected and others:
            say(f"note: at {format_length(at.length)} tokens it cannot be told from {', '.join(others)}", "  ")
        if is_verbose():
            listed = ", ".join(f"{name} {nats:.2g}" for name, nats in at.distances.items())
            say(f"{format_length(at.length)} tokens, nats off: {listed}", "  ")
    for note in found.notes:
        say(f"note: {note}", "  ")


def _show_sentences(findings: list[Finding]) -> None:
    """Print the verdict of each runtime, the advice where it is not exact, and notes, each once."""
    said: set[str] = set()
    for finding in findings:
        say(f"{finding.label}: {finding.summary}", "  ")
        for advice in finding.advice:
            say(f"  do: {advice}", "    ")
        for note in finding.notes:
            if note not in said:
                say(f"  note: {note}", "    ")
            said.add(note)


def _show_windows(found: Diagnosis) -> None:
    """Print the window of every runtime at every length that tells two windows apart."""
    lengths = sorted({at.length for finding in found.findings for at in finding.by_length})
    lines = []
    for finding in found.findings:
        cells = {at.length: _window(at) for at in finding.by_length}
        mark = "" if finding.runtime.name in found.counted else " ·"
        attention_factor = "" if finding.attention_factor is None else f"{finding.attention_factor:.4g}"
        lines.append(
            [
                finding.label + mark,
                finding.verdict,
                *(cells.get(length, "") for length in lengths),
                _error(finding.max_factor_error),
                attention_factor,
            ]
        )
    output.print()
    show_table(["runtime", "verdict", *map(format_length, lengths), "λ error", "m"], lines)
    say("* not the window of this length; – not served; · not counted for the exit code; λ error: the largest, m: "
        "attention factor", "  ")  # fmt: skip


def _explain(finding: Finding) -> None:
    """Print the reasons, advice and notes of a runtime that has any."""
    lines = [
        *finding.reasons,
        *(f"do: {advice}" for advice in finding.advice),
        *(f"note: {note}" for note in finding.notes),
    ]
    if lines:
        output.print()
        say(f"{finding.label} ({finding.runtime.version}, rule {finding.runtime.evidence}): {finding.summary}", "  ")
    for line in lines:
        say(f"  {line}", "    ")


def _window(at: RuntimeAtLength) -> str:
    if at.window is None:
        return "–"
    return at.window if at.as_expected else f"{at.window}*"


def _error(error: float | None) -> str:
    if error is None:
        return ""
    return "0" if error <= 1e-6 else f"{error:.2g}"
