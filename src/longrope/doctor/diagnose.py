"""Diagnosis of a checkpoint: the RoPE that each runtime computes from its files, against the expected one.

longrope doctor checkpoint/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longrope.doctor import llamacpp, rules
from longrope.doctor.checkpoint_config import CheckpointConfig, read_checkpoint_config
from longrope.doctor.compare import FAILURES, Checkpoint, Finding, compare, failed, unknown
from longrope.doctor.expected import Expected, expected_of_config, expected_of_gguf
from longrope.doctor.lints import Lint, lint_config, lint_gguf
from longrope.doctor.readings import RefusedError, UnknownRuleError
from longrope.doctor.table import SCHEMA, Runtime, as_of, known_families, runtimes
from longrope.errors import LongRopeError
from longrope.input_files import require_regular
from longrope.models.checkpoint_files import check_files, config_folder, gguf_path
from longrope.models.gguf.rope import read_gguf_rope
from longrope.rope.scaling import RopeScaling
from longrope.run_files import SCALING

ALL = "all"
REFERENCE = "transformers-5"
"""The runtime whose reading of another tool's config.json is the reference, unless it ignores a stated key."""
_GGUF_FILES = "*.[gG][gG][uU][fF]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The findings on a checkpoint, one for each runtime and file."""

    path: Path
    expected: Expected | None
    """None where config.json states a scaling that cannot be computed; `remarks` says why."""
    findings: Sequence[Finding]
    counted: frozenset[str]
    """The names of the runtimes whose verdict decides."""
    lints: Sequence[Lint]
    remarks: Sequence[str]

    def failures(self, strict: bool = False) -> list[Finding]:
        """The counted findings that drop, change or refuse the scaling; `strict`: or apply it only partly."""
        bad = (*FAILURES, "partly") if strict else FAILURES
        return [finding for finding in self.findings if finding.runtime.name in self.counted and finding.verdict in bad]

    def __repr__(self) -> str:
        """The path and the verdict of every runtime."""
        verdicts = ", ".join(f"{finding.label}: {finding.verdict}" for finding in self.findings)
        return f"Diagnosis({self.path}; {verdicts})"

    def to_json(self) -> dict[str, Any]:
        """The object that `longrope doctor --json` prints."""
        return {
            "checkpoint": str(self.path),
            "table": {"schema": SCHEMA, "as_of": as_of()},
            "expected": None if self.expected is None else self.expected.to_json(),
            "runtimes": [
                finding.to_json() | {"counted": finding.runtime.name in self.counted} for finding in self.findings
            ],
            "lints": [asdict(lint) for lint in self.lints],
            "remarks": list(self.remarks),
        }


def diagnose(
    checkpoint: str | Path, *, expect: RopeScaling | str | Path | None = None, runtime: str | Sequence[str] = ()
) -> Diagnosis:
    """Compare the RoPE that each runtime computes from `checkpoint` with the scaling that it should apply.

    `checkpoint` is a folder, with the GGUF files in it, the folder of a run, one GGUF file, a hub name or the name of
    an embedded model; no weights are read and no runtime is started. `expect` is the scaling, or the path of its
    scaling.json (default: the scaling.json beside the checkpoint; without one, the scaling that its config.json or GGUF
    keys state). `runtime` names the runtimes to look at, "all" for all of them to count. By default all are looked at,
    and those that the table marks count: transformers 5 and 4.57, vLLM, SGLang and, for a GGUF file, llama.cpp.

    Raises LongRopeError when there is no such checkpoint, when a file is damaged or the scaling is for another rotary
    dimension, or when a runtime is unknown or reads no such file.
    """
    path = Path(checkpoint).expanduser()
    names = [runtime] if isinstance(runtime, str) else list(runtime)
    if unknown_names := sorted(set(names) - runtimes().keys() - {ALL}):
        raise LongRopeError(
            f"expected runtimes of {', '.join(runtimes())} or {ALL}; found {', '.join(unknown_names)}",
            code="invalid-setting",
        )
    if not path.exists():
        path = gguf_path(str(checkpoint)) or path
    if path.exists() and not path.is_dir():
        require_regular(path)
    elif not any(path.glob(_GGUF_FILES)):
        path = config_folder(str(checkpoint))
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise LongRopeError(f"expected a checkpoint folder or a .gguf file; found {path}", code="no-such-model")
    if path.is_dir():
        check_files(path)
    given = Path(expect) if isinstance(expect, str) else expect
    rows = [row for row in runtimes().values() if not names or row.name in names or ALL in names]
    gguf = [path] if path.is_file() else sorted(path.glob(_GGUF_FILES))
    parts = [_diagnose_gguf(file, given, rows) for file in gguf]
    if path.is_dir() and ((path / "config.json").is_file() or not gguf):
        parts.insert(0, _diagnose_folder(path, given, rows))
    findings = [finding for part in parts for finding in part.findings]
    if not findings:
        kind = "a GGUF file" if path.is_file() else "a folder"
        raise LongRopeError(
            f"none of {', '.join(names)} reads {kind}",
            code="invalid-setting",
            hint="leave out `runtime` to see which do",
        )
    return Diagnosis(
        path=path,
        expected=parts[0].expected,
        findings=findings,
        counted=frozenset(row.name for row in rows if names or row.counted),
        lints=[lint for part in parts for lint in part.lints],
        remarks=[remark for part in parts for remark in part.remarks],
    )


@dataclass(frozen=True, slots=True)
class _FileDiagnosis:
    """The diagnosis of config.json, or of one GGUF file."""

    expected: Expected | None
    findings: list[Finding]
    lints: list[Lint]
    remarks: list[str]


def _diagnose_folder(folder: Path, given: RopeScaling | Path | None, rows: Sequence[Runtime]) -> _FileDiagnosis:
    config = read_checkpoint_config(folder)
    remarks = []
    if config.family not in known_families():
        remarks.append(f"the class {config.family} is not in the table: it is taken to read its config as Llama's does")
    if isinstance(proof := config.record.get("proof"), str):
        remarks.append(f"proved when longrope exported it: {' '.join(proof.split())[:400]}")
    expected, why = _expected(config, given)
    if expected is None:
        remarks.append(f"nothing to compare with: {why}")
    switch, target = (expected.switch, expected.scaling.target_length) if expected else (config.length, config.length)
    checkpoint = Checkpoint(
        path=str(folder), family=config.family, repair=config.repair, query_scale=config.query_scale
    )
    findings = [
        _finding(row, partial(rules.behaviour, config, row, switch, target), expected, checkpoint, row.label)
        for row in (row.of(config.family) for row in rows if row.reads != "gguf")
    ]
    if expected is not None and expected.stated:
        remarks += [
            f"{finding.label} does not compute what config.json states"
            for finding in findings
            if finding.runtime.name == REFERENCE and finding.verdict not in ("exact", "unknown")
        ]
    return _FileDiagnosis(expected, findings, lint_config(config), remarks)


def _expected(config: CheckpointConfig, given: RopeScaling | Path | None) -> tuple[Expected | None, str]:
    """The expected scaling; None and the reason where config.json states one that cannot be computed."""
    try:
        return expected_of_config(config, given), ""
    except LongRopeError as error:
        if given is not None or (config.path / SCALING).is_file():
            raise
        return None, str(error)


def _diagnose_gguf(file: Path, given: RopeScaling | Path | None, rows: Sequence[Runtime]) -> _FileDiagnosis:
    rope = read_gguf_rope(file)
    expected = expected_of_gguf(rope, given)
    window = rope.context_length or 0
    switch, target = (expected.switch, expected.scaling.target_length) if expected else (window, window)
    checkpoint = Checkpoint(path=str(file), family=rope.architecture, repair="")
    findings = [
        _finding(
            row,
            partial(llamacpp.behaviour, rope, row, switch, target),
            expected,
            checkpoint,
            f"{row.label}, {file.name}",
        )
        for row in rows
        if row.reads == "gguf"
    ]
    remarks = [f"{file.name} states the type longrope and holds no factors: give the scaling to expect"]
    return _FileDiagnosis(expected, findings, lint_gguf(rope, target), [] if expected else remarks)


def _finding(
    row: Runtime, compute: Callable[[], rules.Behaviour], expected: Expected | None, checkpoint: Checkpoint, label: str
) -> Finding:
    try:
        behaviour = compute()
    except RefusedError as error:
        return failed(row, "refused", [str(error)], checkpoint, label=label)
    except UnknownRuleError as error:
        return unknown(row, str(error), label=label)
    if expected is None and row.reads == "gguf":
        return failed(row, "dropped", behaviour.remarks, checkpoint, label=label)
    if expected is None:
        return unknown(row, "nothing to compare with", label=label)
    return compare(row, behaviour, expected, checkpoint, label=label)
