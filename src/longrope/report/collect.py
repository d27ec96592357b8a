"""Reads the files of a report into typed data: run folders and evaluation files.

A run folder comes from a search or `extend`: `scaling.json`, the log, and any evaluation files in it. An evaluation
file comes from an evaluation with an output; it joins the run whose scaling it measured, by hash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longrope.checks import shown
from longrope.errors import LongRopeError
from longrope.evaluation.results import SCHEMA, EvalResults, EvalRow
from longrope.report.styles import OWN, is_baseline
from longrope.report.trace import Trace, read_trace
from longrope.rope.scaling import RopeScaling
from longrope.run_files import EXTENSION, SCALING, SEARCH_LOG, SEARCH_SUMMARY
from longrope.storage import sha256_text
from longrope.units import LONGEST

_RANGES = {"length": (1, LONGEST), "trials": (1, 10**12), "value": (-1e100, 1e100), "stderr": (0, 1e100)}
_VALUES: dict[str, tuple[float, float]] = {
    "accuracy": (0, 1),
    "top1_agreement": (0, 1),
    "perplexity": (1e-100, 1e100),
    "score": (0, 100),
    "effective_length": (0, LONGEST),
}
"""Metric -> the range of its values, where not all are possible."""
_DETAILS: dict[str, dict[str, tuple[float, float] | None]] = {
    "nll": {"from": (0, LONGEST), "to": (1, LONGEST)},
    "needle accuracy": {"depth": (0, 1)},
    "needle answer_logprob": {"depth": (0, 1)},
    "ruler score": {"task": None},
    "ruler effective_length": {"threshold": (0, 1e100)},
}
"""Metric, or suite and metric -> what the detail of a row must hold: a number in a range, or (None) a text."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The exported checkpoint in its runtime against the searched model, at `positions` of a held-out text of `length`
    tokens.

    In transformers, all logits of the last positions. In llama.cpp, log p of the tokens that it gives 1 % or more, in a
    context of `length`; `divergence` is the mean Kullback-Leibler divergence in nats, `divergence_without` that from
    the model without the factors.
    """

    length: int
    positions: int
    max_logit_difference: float
    top1_agreement: float
    runtime: str = "transformers"
    divergence: float | None = None
    divergence_without: float | None = None


@dataclass(frozen=True, slots=True)
class ExtensionRecord:
    """The summary that `extend` wrote at its end: the proofs of its checkpoint, and the losses of the export."""

    proofs: tuple[Proof, ...]
    losses: tuple[str, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run. `rows` are all measurements of it; the run's own scaling is called OWN in them.

    `extension` is None for a search or an evaluation alone.
    """

    name: str
    path: Path
    scaling: RopeScaling | None = None
    trace: Trace | None = None
    evaluations: dict[str, EvalResults] = field(default_factory=dict)
    extension: ExtensionRecord | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    """The summary of the search, `search.json`: its time and its machine."""

    @property
    def rows(self) -> list[EvalRow]:
        return [row for evaluation in self.evaluations.values() for row in evaluation.rows]

    @property
    def model(self) -> str:
        """The model's name as it was given; of a long path its last part alone."""
        for source in (
            self.scaling.provenance if self.scaling else {},
            *(e.settings for e in self.evaluations.values()),
        ):
            if isinstance(source.get("model"), str):
                name = source["model"]
                return Path(name).name if name.count("/") > 1 else name
        return "a model"

    @property
    def original_length(self) -> int | None:
        """L in tokens, where it is known."""
        if self.scaling is not None:
            return self.scaling.geometry.original_length
        values = [evaluation.settings.get("original_length") for evaluation in self.evaluations.values()]
        return next((value for value in values if isinstance(value, int)), None)

    @property
    def others(self) -> list[str]:
        """Names of the methods that the run's own scaling was compared with, in the order met."""
        names = [*(self.trace.baselines if self.trace else ()), *(row.scaling for row in self.rows)]
        return [name for name in dict.fromkeys(names) if name != OWN]

    def of(self, suite: str, metric: str | None = None) -> list[EvalRow]:
        """The rows of a suite, or of one metric in it."""
        return [row for row in self.rows if row.suite == suite and metric in (None, row.metric)]


def collect(paths: Sequence[Path]) -> list[Run]:
    """The runs at `paths`, in order, each with a name of its own.

    Raises LongRopeError for a path that holds neither a scaling nor an evaluation, for a file that cannot be read or
    lacks its settings, and for two measurements of the same thing in one run.
    """
    if not paths:
        raise LongRopeError("expected run folders or evaluation files to report on; found none", code="missing-data")
    folders = [path for path in paths if path.is_dir()]
    runs = {path: _folder(path) for path in dict.fromkeys(folders)}
    hashes = {_digest(run.scaling): path for path, run in reversed(runs.items()) if run.scaling is not None}
    for path in dict.fromkeys(path for path in paths if not path.is_dir()):
        evaluation = _load(path)
        owner = hashes.get(str(evaluation.settings.get("scaling_sha256")))
        if owner is None:
            runs[path] = Run(path.stem, path, evaluations={str(path): _with_own_name(evaluation)})
        else:
            joined = {**runs[owner].evaluations, str(path): _with_own_name(evaluation)}
            runs[owner] = replace(runs[owner], evaluations=joined)
    for run in runs.values():
        _refuse_twice(run)
    ordered = [runs[path] for path in dict.fromkeys(paths) if path in runs]
    return _named_apart(ordered)


def _folder(path: Path) -> Run:
    scaling = RopeScaling.load(path / SCALING) if (path / SCALING).is_file() else None
    evaluations = {}
    for file in sorted(path.glob("*.json")):
        if file.name not in (SCALING, EXTENSION) and _is_evaluation(file):
            evaluations[file.name] = _with_own_name(_load(file), scaling)
    if scaling is None and not evaluations:
        raise LongRopeError(
            f"expected {path} to hold a finished run: a {SCALING} or evaluation files (*.json); found neither",
            code="not-a-run",
        )
    trace = None
    if scaling is not None and (path / SEARCH_LOG).is_file():
        trace = read_trace(path / SEARCH_LOG, scaling.provenance)
    extension = _extension(path / EXTENSION) if (path / EXTENSION).is_file() else None
    summary = _json_object(path / SEARCH_SUMMARY) if (path / SEARCH_SUMMARY).is_file() else {}
    return Run(path.resolve().name, path, scaling, trace, evaluations, extension, summary)


def _extension(file: Path) -> ExtensionRecord:
    document = _json_object(file)
    try:
        proofs = tuple(Proof(**proof) for proof in document["proofs"])
        losses = tuple(map(str, document["losses"]))
    except (KeyError, TypeError) as error:
        raise LongRopeError(
            f"{file} is not what longrope extend writes: its proofs or losses cannot be read", code="damaged-file"
        ) from error
    return ExtensionRecord(proofs, losses, document)


def _is_evaluation(file: Path) -> bool:
    """True if `file` says that it is an evaluation, or holds results: then it must be a whole one."""
    document = _json_object(file)
    return str(document.get("schema", "")).partition("/")[0] == SCHEMA.partition("/")[0] or "results" in document


def _json_object(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LongRopeError(f"cannot read {file}: expected JSON, found {' '.join(str(error).split())}") from error
    return document if isinstance(document, dict) else {}


def _load(path: Path) -> EvalResults:
    """The evaluation in a file. Raises LongRopeError, also for a number that no figure could show."""
    evaluation = EvalResults.load(path)
    for row in evaluation.rows:
        measured = f"{row.suite} {row.metric}"
        for name, (least, most) in (_RANGES | {"value": _VALUES.get(row.metric, _RANGES["value"])}).items():
            found = getattr(row, name)
            if found is not None and (found < least or found > most):  # NaN is neither
                raise LongRopeError(
                    f"{path}: {name} of a row ({measured}) cannot be {shown(found)}", code="damaged-file"
                )
        for name, limits in (_DETAILS.get(measured) or _DETAILS.get(row.metric) or {}).items():
            if not _holds(row.detail.get(name), limits):
                raise LongRopeError(
                    f"{path}: a row ({measured}) needs {name!r} in its detail, found {shown(row.detail)}",
                    code="damaged-file",
                )
    return evaluation


def _holds(found: Any, limits: tuple[float, float] | None) -> bool:
    """True if `found` is a text or, where there are `limits`, a number within them."""
    if limits is None:
        return isinstance(found, str)
    return isinstance(found, int | float) and not isinstance(found, bool) and limits[0] <= found <= limits[1]


def _with_own_name(evaluation: EvalResults, own: RopeScaling | None = None) -> EvalResults:
    """Rename the evaluated scaling to OWN in the rows; it is the one whose hash the settings state, unless the run's
    `own` is another one.
    """
    digest = evaluation.settings.get("scaling_sha256")
    if own is not None and digest is not None and digest != _digest(own):
        return evaluation
    hashes = evaluation.settings.get("against_sha256")
    names = [name for name, value in hashes.items() if value == digest] if isinstance(hashes, dict) else []
    rows = tuple(replace(row, scaling=OWN) if row.scaling in names else row for row in evaluation.rows)
    return replace(evaluation, rows=rows)


def _digest(scaling: RopeScaling) -> str:
    return sha256_text(scaling.to_json())


def _refuse_twice(run: Run) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for file, evaluation in run.evaluations.items():
        for row in evaluation.rows:
            key = (row.suite, row.metric, row.scaling, row.length, json.dumps(row.detail, sort_keys=True))
            if key in seen:
                raise LongRopeError(
                    f"{seen[key]} and {file} both hold {row.suite} of {row.scaling} at {row.length} tokens",
                    code="measured-twice",
                    hint="leave one of them out of the report",
                )
            seen[key] = file


def _named_apart(runs: list[Run]) -> list[Run]:
    """Give every run a name of its own: two of the same name get their parent folder in front, or the whole path.

    A run that is called like a method that any of them measured is renamed, too.
    """
    methods = {OWN, *(name for run in runs for name in run.others)}

    def unlike(name: str) -> str:
        return unlike(f"run {name}") if is_baseline(name) or name in methods else name

    runs = [replace(run, name=unlike(run.name)) for run in runs]
    for parts in (2, 0):
        names = [run.name for run in runs]
        if len(set(names)) == len(names):
            break
        runs = [
            replace(run, name=unlike("/".join(run.path.resolve().with_suffix("").parts[-parts:])))
            if names.count(run.name) > 1
            else run
            for run in runs
        ]
    return runs
