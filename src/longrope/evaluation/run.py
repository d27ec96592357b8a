"""Measure a model under scalings with any of the suites: the same samples for every contender."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from longrope.data.documents import Document
from longrope.data.samples import require_disjoint
from longrope.data.sources import read_all
from longrope.data.tokens import tokenizer_hash
from longrope.errors import LongRopeError
from longrope.evaluation.base import Material, Suite
from longrope.evaluation.compare import Field, compared
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.perplexity import SUITE, check_lengths
from longrope.evaluation.results import Cell, CellLog, EvalRow, Evaluation
from longrope.evaluation.ruler import suite as ruler
from longrope.evaluation.suite_cells import measure
from longrope.evaluation.suites import SUITES
from longrope.evaluation.suites_short import RetentionSuite
from longrope.models.loading import LoadedModel, fingerprint, recorded_scaling, sources_or_books
from longrope.provenance import versions
from longrope.rope.baselines import ORIGINAL
from longrope.rope.scaling import RopeScaling
from longrope.storage import sha256_text

__all__ = ["SUITES", "Evaluation", "cells_path", "evaluate", "seen_documents"]


def evaluate(
    loaded: LoadedModel,
    lengths: Sequence[int],
    data: Sequence[str],
    *,
    suites: Sequence[str] = (SUITE,),
    scaling: RopeScaling | None = None,
    scaling_name: str = "scaling",
    against: Sequence[str] = (),
    target_length: int | None = None,
    original: LoadedModel | None = None,
    seed: int = 0,
    options: EvalConfig | None = None,
    allow_seen: bool = False,
    cells: Path | None = None,
    resume: bool = False,
    on_start: Callable[[int], None] = lambda _: None,
    on_sample: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The `suites` of `scaling` (or of the model as it is) and of what `against` names, at `lengths`.

    `against`: see `compared`; every contender gets the same samples. `data` are texts that neither the search nor the
    training of any scaling among them has seen, which is checked by hash; `allow_seen` measures on them nevertheless
    and says so in the settings. `target_length` is the L' of the closed forms (default: the scaling's, else the longest
    length). `original` is the model before it was extended, where its weights were others. `cells` is a file that keeps
    what is finished (one suite, task and length of one contender); `resume` goes on with it, to the same result.

    `on_start` gets the number of steps, `on_sample` is called after each.

    Raises LongRopeError for what the user can mend, before anything is measured.
    """
    options = options or EvalConfig()
    lengths = list(dict.fromkeys(lengths))
    chosen = _chosen(suites, lengths, options)
    if scaling is not None:
        scaling.check_fits(loaded.geometry)
    if original is not None and tokenizer_hash(original.tokenizer) != tokenizer_hash(loaded.tokenizer):
        raise LongRopeError(f"expected {original.name} to have the tokenizer of {loaded.name}; found another")
    longest = max(lengths, default=loaded.geometry.original_length)
    target = target_length or (longest if scaling is None else scaling.target_length)
    field = compared(loaded, scaling, scaling_name, against, target, original)
    for method in field.methods:  # a length that no window reaches is refused before anything is measured
        method.window(longest)
    texts = any(suite.needs_text(options) for suite in chosen)
    documents = read_all(sources_or_books(loaded.name, data, "evaluation")) if texts else []
    seen = _seen(documents, [recorded_scaling(loaded.name), *field.scalings.values()], allow_seen)
    material = Material(loaded, lengths, documents, seed, options)
    prepared = [suite(material) for suite in chosen]
    for suite in prepared:
        suite.check()
    settings = _settings(prepared, field, scaling, against, target, original) | seen
    log = _open_log(cells, settings, resume)
    with log or nullcontext():
        measured = measure(prepared, field, original, log, on_start, on_sample)
    rows = [row for cell in measured for row in cell.rows]
    if any(suite.name == ruler.SUITE for suite in prepared):
        rows += _ruler_summary(rows, loaded.geometry.original_length, options)
    return Evaluation(rows, settings | _samples(measured))


def cells_path(output: Path) -> Path:
    """Where the finished cells of a run with this output are kept: `eval.json` -> `eval.cells.jsonl`."""
    return output.with_suffix(".cells.jsonl")


def _chosen(names: Sequence[str], lengths: Sequence[int], options: EvalConfig) -> list[type[Suite]]:
    """The suites of these names, in the order of SUITES. Raises LongRopeError where they cannot do what is asked."""
    unknown = [name for name in names if name not in SUITES]
    if unknown or not names:
        raise LongRopeError(f"expected suites of {', '.join(SUITES)}; found {', '.join(unknown) or 'none'}")
    chosen = [suite for name, suite in SUITES.items() if name in names]
    if options.tasks and RetentionSuite not in chosen:
        raise LongRopeError(f"lm-eval's tasks belong to the suite {RetentionSuite.name}; add it, or leave them out")
    if any(suite.by_length for suite in chosen):
        check_lengths(lengths, max(lengths, default=0), None)
    elif lengths:
        raise LongRopeError(f"{' and '.join(names)} measure inside the original window; leave the lengths out")
    return chosen


def seen_documents(scaling: RopeScaling | None) -> list[str]:
    """Hashes of the documents that the search of `scaling` used, and its training, as its provenance says.

    Every `document_sha256` in the provenance counts: one, a list, or by name. Raises LongRopeError when the provenance
    names data in a form that cannot be read: nothing is taken for unseen then.
    """
    if scaling is None:
        return []
    data = scaling.provenance.get("data")
    listed = isinstance(data, dict) and isinstance(data.get("document_sha256"), list)
    hashes: list[Any] = []
    for value in _values(scaling.provenance, "document_sha256"):
        hashes += value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if (data is not None and not listed) or not all(isinstance(entry, str) for entry in hashes):
        raise LongRopeError("the scaling's provenance should list the SHA-256 of its data; found something else")
    return sorted(set(hashes))


def _values(value: Any, key: str) -> Iterable[Any]:
    """Everything called `key` anywhere in a JSON value."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and key in value:
        yield value[key]
    for child in children:
        yield from _values(child, key)


def _seen(documents: Sequence[Document], scalings: Sequence[RopeScaling | None], allow_seen: bool) -> dict[str, Any]:
    """What the settings say of documents that were seen before; empty where none was."""
    hashes = {value for scaling in scalings for value in seen_documents(scaling)}
    if not allow_seen:
        try:
            require_disjoint(hashes, documents)
        except LongRopeError as error:
            raise LongRopeError(f"{error}, or add --allow-seen, which the results will say") from error
    names = sorted({document.name for document in documents if document.sha256 in hashes})
    warning = "measured on documents that the search or training of a contender has seen"
    return {"seen_documents": names, "warnings": [f"{warning}: {', '.join(names)}"]} if names else {}


def _settings(
    suites: Sequence[Suite],
    field: Field,
    scaling: RopeScaling | None,
    against: Sequence[str],
    target: int,
    original: LoadedModel | None,
) -> dict[str, Any]:
    """Everything that decides the numbers: what a resumed run must share."""
    material = suites[0].material
    loaded = material.loaded
    hashes = sorted({document.sha256 for document in material.documents})
    settings: dict[str, Any] = {
        "model": loaded.name,
        "model_fingerprint": fingerprint(loaded.model),
        "tokenizer_sha256": tokenizer_hash(loaded.tokenizer),
        "dtype": str(loaded.model.dtype),
        "device": loaded.model.device.type,
        "original_length": loaded.geometry.original_length,
        "scaling_sha256": None if scaling is None else sha256_text(scaling.to_json()),
        "against": list(against),
        "against_sha256": {name: sha256_text(other.to_json()) for name, other in field.scalings.items()},
        "target_length": target,
        "lengths": list(material.lengths),
        "seed": material.seed,
        "data_sha256": sha256_text("\n".join(hashes)) if hashes else None,
        "suites": {suite.name: suite.settings() for suite in suites},
    }
    if loaded.checkpoint_scaling is not None:
        settings["carried_sha256"] = sha256_text(loaded.checkpoint_scaling.to_json())
    if original is not None:
        settings |= {"original": original.name, "original_fingerprint": fingerprint(original.model)}
    return settings


def _samples(cells: Sequence[Cell]) -> dict[str, Any]:
    """What the cells were measured on: documents, and samples by suite, task and length."""
    documents = {digest: name for cell in cells for digest, name in cell.documents.items()}
    samples = {
        " ".join(filter(None, (cell.key.suite, cell.key.task, str(cell.key.length)))): cell.samples_sha256
        for cell in cells
        if cell.samples_sha256
    }
    return {
        "document_sha256": sorted(documents),
        "documents": sorted(set(documents.values())),
        "samples_sha256": samples,
    }


def _ruler_summary(rows: Sequence[EvalRow], original_length: int, options: EvalConfig) -> list[EvalRow]:
    """RULER's means by length, and the effective lengths they stand for."""
    means = ruler.means([row for row in rows if row.suite == ruler.SUITE])
    reference = ORIGINAL if any(row.scaling == ORIGINAL for row in means) else "none"
    return means + ruler.effective_lengths(
        means, original_length=original_length, reference=reference, threshold=options.threshold, share=options.share
    )


def _open_log(path: Path | None, settings: dict[str, Any], resume: bool) -> CellLog | None:
    if path is None:
        if resume:
            raise LongRopeError("only a run with an output can be resumed; give its -o")
        return None
    header = settings | {"versions": versions()}
    return CellLog.resume(path, header) if resume else CellLog.create(path, header)
