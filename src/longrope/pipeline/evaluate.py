"""Measure a model under scalings at several lengths: the same samples for every contender."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.data.samples import assert_disjoint
from longrope.data.sources import read_all
from longrope.errors import LongRopeError
from longrope.evaluation.contenders import (
    CHECKPOINT,
    Contender,
    checkpoint_contender,
    closed_form_contender,
    dynamic_contender,
    scaling_contender,
)
from longrope.evaluation.perplexity import SUITE, check_lengths, perplexity
from longrope.evaluation.results import EvalRow, rows_to_json
from longrope.files import json_ready, sha256_text
from longrope.models.fingerprint import fingerprint
from longrope.models.install import install, uninstall
from longrope.models.load import resolve
from longrope.pipeline.subject import Subject, prepare_samples, sources_or_books
from longrope.provenance import record
from longrope.rope.geometry import rope_parameters_of
from longrope.rope.scaling import RopeScaling

SUITES = (SUITE,)


@dataclass(frozen=True)
class Evaluation:
    """Rows of an evaluation, and what is needed to repeat it."""

    rows: list[EvalRow]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"results": json_ready(rows_to_json(self.rows)), "settings": self.settings, **record()}


def evaluate(
    subject: Subject,
    lengths: Sequence[int],
    data: Sequence[str],
    *,
    suites: Sequence[str] = SUITES,
    scaling: RopeScaling | None = None,
    scaling_name: str = "scaling",
    against: Sequence[str] = (),
    target_length: int | None = None,
    samples: int = 10,
    seed: int = 0,
    stride: int | None = None,
    on_start: Callable[[int], None] = lambda _: None,
    on_sample: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Perplexity by length of `scaling` (or of the model as it is) and of what `against` names.

    `against`: closed forms by name, and `checkpoint` for the scaling that the model's checkpoint carries. `data` are
    texts that the search of `scaling` has not seen, which is checked by hash; every contender gets the same `samples`
    of them. `target_length` is the L' of the closed forms (default: the scaling's, else the longest length).

    Raises LongRopeError for what the user can mend.
    """
    unknown = [suite for suite in suites if suite not in SUITES]
    if unknown or not suites:
        raise LongRopeError(f"expected suites of {', '.join(SUITES)}; found {', '.join(unknown) or 'none'}")
    if scaling is not None:
        scaling.check_fits(subject.geometry)
    lengths = list(dict.fromkeys(lengths))
    target = target_length or (max(lengths) if scaling is None else scaling.target_length)
    check_lengths(lengths, max(lengths, default=0), stride)
    contenders = _contenders(subject, scaling, scaling_name, against, target)
    for contender in contenders:  # a length that no window reaches is refused before anything is measured
        contender.window(max(lengths))
    documents = read_all(sources_or_books(subject.name, data, "evaluation"))
    assert_disjoint(seen_documents(scaling or recorded_scaling(subject.name)), documents)
    drawn = prepare_samples(subject, documents, length=max(lengths), count=samples, seed=seed)
    on_start(len(contenders) * len(lengths) * samples)
    rows: list[EvalRow] = []
    installed = install(subject.model, RopeScaling.original(subject.geometry))
    try:
        for contender in contenders:
            rows += perplexity(installed, drawn, lengths, contender, stride=stride, on_sample=on_sample)
    finally:
        uninstall(subject.model)
    settings = {
        "model": subject.name,
        "model_fingerprint": fingerprint(subject.model),
        "dtype": str(subject.model.dtype),
        "device": subject.model.device.type,
        "scaling_sha256": None if scaling is None else sha256_text(scaling.to_json()),
        "against": list(against),
        "target_length": target,
        "lengths": lengths,
        "samples_sha256": drawn.sha256,
        "document_sha256": list(drawn.document_hashes),
        "documents": sorted({row.document for row in drawn.rows}),
        "seed": seed,
        "stride": stride,
    }
    return Evaluation(rows, settings)


def recorded_scaling(model_name: str) -> RopeScaling | None:
    """The `scaling.json` that an export leaves beside its weights, for what it says of its search."""
    path = Path(resolve(model_name)) / "scaling.json"
    return RopeScaling.load(path) if path.is_file() else None


def seen_documents(scaling: RopeScaling | None) -> list[str]:
    """Hashes of the documents that the search of `scaling` used, as its provenance says.

    Raises LongRopeError when the provenance names data in a form that cannot be read: nothing is taken for unseen then.
    """
    data = scaling.provenance.get("data") if scaling is not None else None
    if data is None:
        return []
    hashes = data.get("document_sha256") if isinstance(data, dict) else None
    if not isinstance(hashes, list) or not all(isinstance(value, str) for value in hashes):
        raise LongRopeError("the scaling's provenance should list the SHA-256 of its data; found something else")
    return hashes


def _contenders(
    subject: Subject, scaling: RopeScaling | None, name: str, against: Sequence[str], target_length: int
) -> list[Contender]:
    target = max(target_length, subject.geometry.original_length)
    itself = _as_it_is(subject)
    forms = list(dict.fromkeys(against))
    if scaling is None:
        own = "none" if itself is None else CHECKPOINT
        forms = [*(form for form in forms if form != own), own]
    contenders = []
    for form in forms:
        if form != CHECKPOINT:
            contenders.append(closed_form_contender(form, subject.geometry, target))
        elif itself is not None:
            contenders.append(itself)
        else:
            raise LongRopeError(f"{subject.name} carries no scaling to compare with; leave {CHECKPOINT!r} out")
    return contenders if scaling is None else [*contenders, scaling_contender(name, scaling)]


def _as_it_is(subject: Subject) -> Contender | None:
    """What the checkpoint itself does with long texts; None where it is the original RoPE."""
    if subject.existing is not None:
        return checkpoint_contender(subject.existing)
    parameters = rope_parameters_of(subject.model.config)
    if parameters["rope_type"] == "dynamic":
        return dynamic_contender(subject.geometry, float(parameters.get("factor", 1.0)))
    return None
