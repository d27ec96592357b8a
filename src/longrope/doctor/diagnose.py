"""`diagnose`: for every runtime, what it computes at the lengths that matter, compared with what it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longrope.doctor import llamacpp, rules
from longrope.doctor.compare import FAILURES, Finding, LoadedModel, compare, dropped, refused, unknown
from longrope.doctor.config import Config, read_config
from longrope.doctor.expected import Expected, expected_of_config, expected_of_gguf
from longrope.doctor.lints import Lint, lint_config, lint_gguf
from longrope.doctor.readings import RefusedError, UnknownRuleError
from longrope.doctor.table import SCHEMA, Runtime, as_of, known_families, runtimes
from longrope.errors import LongRopeError
from longrope.export.gguf.keys import read_gguf_rope

ALL = "all"
REFERENCE = "transformers-5"
"""The runtime that says what a config.json of others means, unless it passes over something that is stated there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What the runtimes make of a checkpoint."""

    path: Path
    expected: Expected | None
    """None where config.json states a scaling that cannot be computed; `remarks` says why."""
    findings: Sequence[Finding]
    counted: frozenset[str]
    """The runtimes whose verdict decides."""
    lints: Sequence[Lint]
    remarks: Sequence[str]

    def failures(self, strict: bool = False) -> list[Finding]:
        """The counted findings that drop, change or refuse the scaling; `strict`: or apply it only partly."""
        bad = (*FAILURES, "partly") if strict else FAILURES
        return [one for one in self.findings if one.runtime.name in self.counted and one.verdict in bad]

    def to_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "checkpoint": str(self.path),
            "table": {"schema": SCHEMA, "as_of": as_of()},
            "expected": None if self.expected is None else _expected_json(self.expected),
            "runtimes": [
                finding.to_json() | {"counted": finding.runtime.name in self.counted} for finding in self.findings
            ],
            "lints": [asdict(lint) for lint in self.lints],
            "remarks": list(self.remarks),
        }


def diagnose(path: Path, *, expect: Path | None = None, names: Sequence[str] = ()) -> Diagnosis:
    """Diagnose a checkpoint folder, with the GGUF files in it, or one GGUF file.

    `expect` is the scaling.json it should apply (default: the folder's own; without one, what config.json states).
    `names` are the runtimes to look at, `all` for all of them to count; by default all are looked at and those that
    the table marks count: transformers 5 and 4.57, vLLM, SGLang and, for a GGUF file, llama.cpp.

    Raises LongRopeError when there is no such checkpoint, a file is damaged, or a runtime is unknown.
    """
    if unknown_names := sorted(set(names) - runtimes().keys() - {ALL}):
        raise LongRopeError(f"expected runtimes of {', '.join(runtimes())} or {ALL}; found {', '.join(unknown_names)}")
    if not path.exists():
        raise LongRopeError(f"there is no checkpoint folder and no GGUF file at {path}")
    gguf = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if path.is_file() and path.suffix != ".gguf":
        raise LongRopeError(f"expected a checkpoint folder or a .gguf file; found {path}")
    rows = [row for row in runtimes().values() if not names or row.name in names or ALL in names]
    parts = [_diagnose_gguf(file, expect, rows) for file in gguf]
    if path.is_dir() and ((path / "config.json").is_file() or not gguf):
        parts.insert(0, _diagnose_folder(path, expect, rows))
    findings = [finding for part in parts for finding in part.findings]
    if not findings:
        reads = "a GGUF file" if path.is_file() else "a folder"
        raise LongRopeError(f"none of {', '.join(names)} reads {reads}; leave out --runtime to see which do")
    return Diagnosis(
        path=path,
        expected=parts[0].expected,
        findings=findings,
        counted=frozenset(row.name for row in rows if names or row.counted),
        lints=[lint for part in parts for lint in part.lints],
        remarks=[remark for part in parts for remark in part.remarks],
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """The diagnosis of config.json, or of one GGUF file."""

    expected: Expected | None
    findings: list[Finding]
    lints: list[Lint]
    remarks: list[str]


def _diagnose_folder(folder: Path, expect: Path | None, rows: Sequence[Runtime]) -> _Part:
    config = read_config(folder)
    remarks = []
    if config.family not in known_families():
        remarks.append(f"the class {config.family} is not in the table: it is taken to read its config as Llama's does")
    expected, why = _expected(config, expect)
    if expected is None:
        remarks.append(f"nothing to compare with: {why}")
    switch, target = (expected.switch, expected.scaling.target_length) if expected else (config.length, config.length)
    loaded = LoadedModel(path=str(folder), family=config.family, repair=config.repair, query_scale=config.query_scale)
    findings = [
        _finding(row, partial(rules.behaviour, config, row, switch, target), expected, loaded, row.label)
        for row in rows
        if row.reads != "gguf"
    ]
    if expected is not None and expected.stated:
        remarks += [
            f"{finding.label} does not compute what config.json states"
            for finding in findings
            if finding.runtime.name == REFERENCE and finding.verdict != "exact"
        ]
    return _Part(expected, findings, lint_config(config), remarks)


def _expected(config: Config, expect: Path | None) -> tuple[Expected | None, str]:
    """What should be computed; None and the reason where config.json states what cannot be."""
    try:
        return expected_of_config(config, expect), ""
    except LongRopeError as error:
        if expect is not None or (config.path / "scaling.json").is_file():
            raise
        return None, str(error)


def _diagnose_gguf(file: Path, expect: Path | None, rows: Sequence[Runtime]) -> _Part:
    rope = read_gguf_rope(file)
    expected = expected_of_gguf(rope, expect)
    window = rope.context_length or 0
    switch, target = (expected.switch, expected.scaling.target_length) if expected else (window, window)
    loaded = LoadedModel(path=str(file), family=rope.architecture, repair="")
    findings = [
        _finding(
            row,
            partial(llamacpp.behaviour, rope, row, switch, target),
            expected,
            loaded,
            f"{row.label}, {file.name}",
        )
        for row in rows
        if row.reads == "gguf"
    ]
    remarks = [f"{file.name} states the type longrope and holds no factors; what they were, --expect can say"]
    return _Part(expected, findings, lint_gguf(rope, target), [] if expected else remarks)


def _finding(
    row: Runtime, compute: Callable[[], rules.Behaviour], expected: Expected | None, loaded: LoadedModel, label: str
) -> Finding:
    try:
        behaviour = compute()
    except RefusedError as error:
        return refused(row, str(error), loaded, label=label)
    except UnknownRuleError as error:
        return unknown(row, str(error), label=label)
    if expected is None and row.reads == "gguf":
        return dropped(row, behaviour.remarks, loaded, label=label)
    if expected is None:
        return unknown(row, "nothing to compare with", label=label)
    return compare(row, behaviour, expected, loaded, label=label)


def _expected_json(expected: Expected) -> dict[str, Any]:
    geometry = expected.scaling.geometry
    return {
        "source": expected.source,
        "rotary_dim": geometry.rotary_dim,
        "base": geometry.base,
        "original_length": geometry.original_length,
        "switch": expected.switch,
        "lengths": expected.lengths,
        "windows": [asdict(window) for window in expected.scaling.windows],
    }
