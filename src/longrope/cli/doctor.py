"""`longrope doctor DIR|FILE.gguf`: what each runtime computes from a checkpoint, and whether that is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longrope.cli.common import Json, output, print_json, table
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.doctor.compare import Finding, RuntimeAtLength
    from longrope.doctor.diagnose import Diagnosis


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR|FILE.gguf", help="A checkpoint folder or a GGUF file.")],
    expect: Annotated[
        Path | None, typer.Option("--expect", help="The scaling.json it should apply; default: the one beside it.")
    ] = None,
    runtime: Annotated[
        str, typer.Option("--runtime", help="Only these count and are shown: NAME,NAME,… or 'all'.")
    ] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 also where a window is applied at another's lengths.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what each runtime computes from a checkpoint; exit code 1 when one drops or changes the scaling.

    Without --runtime, transformers 5 and 4.57, vLLM and SGLang count, and llama.cpp for a GGUF file.
    """
    from longrope.doctor.diagnose import diagnose

    names = [name.strip() for name in runtime.split(",") if name.strip()]
    found = diagnose(checkpoint, expect=expect, runtime=names)
    code = 1 if found.failures(strict) else 0
    if as_json:
        print_json(found.to_json() | {"exit_code": code})
    else:
        _show(found, strict)
    raise typer.Exit(code)


def _show(found: Diagnosis, strict: bool) -> None:
    if found.expected is not None:
        output.print(f"expected: {found.expected.source}")
    lengths = sorted({at.length for finding in found.findings for at in finding.by_length})
    rows = table("", ["runtime", "verdict", *map(_short_length, lengths), "max λ error", "m"])
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


def _short_length(length: int) -> str:
    return format_length(length)
