"""Measure a model under scalings at several lengths: the same samples for every contender."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.data.samples import Samples, assert_disjoint, draw_samples
from longrope.data.sources import read_all
from longrope.data.tokens import bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.evaluation.contenders import (
    CHECKPOINT,
    Contender,
    checkpoint_contender,
    closed_form_contender,
    scaling_contender,
)
from longrope.evaluation.perplexity import SUITE, perplexity
from longrope.evaluation.results import EvalRow, rows_to_json
from longrope.files import json_ready
from longrope.models.install import install, uninstall
from longrope.pipeline.subject import Subject, sources_or_books
from longrope.provenance import record
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

    `against`: closed forms by name, and `checkpoint` for the scaling that the model's checkpoint carries.

    `data` are texts that the search of `scaling` has not seen, which is checked by hash; every contender gets the same
    `samples` of them. `target_length` is the L' of the closed forms (default: the scaling's, else the longest length).

    Raises LongRopeError for what the user can mend.
    """
    unknown = [suite for suite in suites if suite not in SUITES]
    if unknown or not suites:
        raise LongRopeError(f"expected suites of {', '.join(SUITES)}; found {', '.join(unknown) or 'none'}")
    sources = sources_or_books(subject.name, data, "evaluation")
    documents = read_all(sources)
    if scaling is not None:
        scaling.check_fits(subject.geometry)
    assert_disjoint(seen_documents(scaling or recorded_scaling(subject.name)), documents)
    contenders = _contenders(subject, scaling, scaling_name, against, target_length or _target(scaling, lengths))
    drawn = draw_samples(
        tokenize(documents, subject.tokenizer),
        length=max(lengths),
        count=samples,
        seed=seed,
        bos_token_id=bos_of(subject.tokenizer),
    )
    on_start(len(contenders) * len(lengths) * samples)
    rows: list[EvalRow] = []
    installed = install(subject.model, RopeScaling.original(subject.geometry))
    try:
        for contender in contenders:
            rows += perplexity(installed, drawn, lengths, contender, stride=stride, on_sample=on_sample)
    finally:
        uninstall(subject.model)
    return Evaluation(rows, _settings(subject, drawn, lengths, seed, stride))


def recorded_scaling(model_name: str) -> RopeScaling | None:
    """The `scaling.json` that an export leaves beside its weights, for what it says of its search."""
    path = Path(model_name) / "scaling.json"
    return RopeScaling.load(path) if path.is_file() else None


def seen_documents(scaling: RopeScaling | None) -> list[str]:
    """Hashes of the documents that the search of `scaling` used, as its provenance says."""
    data = scaling.provenance.get("data") if scaling is not None else None
    hashes = data.get("document_sha256", []) if isinstance(data, dict) else []
    return [str(value) for value in hashes]


def _target(scaling: RopeScaling | None, lengths: Sequence[int]) -> int:
    return scaling.target_length if scaling is not None else max(lengths)


def _contenders(
    subject: Subject, scaling: RopeScaling | None, name: str, against: Sequence[str], target_length: int
) -> list[Contender]:
    target = max(target_length, subject.geometry.original_length)
    forms = list(dict.fromkeys(against))
    if scaling is None:  # the model as it is
        itself = "none" if subject.existing is None else CHECKPOINT
        forms = [*(form for form in forms if form != itself), itself]
    contenders = []
    for form in forms:
        if form != CHECKPOINT:
            contenders.append(closed_form_contender(form, subject.geometry, target))
        elif subject.existing is not None:
            contenders.append(checkpoint_contender(subject.existing))
        else:
            raise LongRopeError(f"{subject.name} carries no scaling to compare with; leave {CHECKPOINT!r} out")
    return contenders if scaling is None else [*contenders, scaling_contender(name, scaling)]


def _settings(
    subject: Subject, drawn: Samples, lengths: Sequence[int], seed: int, stride: int | None
) -> dict[str, Any]:
    return {
        "model": subject.name,
        "lengths": list(lengths),
        "samples_sha256": drawn.sha256,
        "document_sha256": list(drawn.document_hashes),
        "documents": sorted({row.document for row in drawn.rows}),
        "seed": seed,
        "stride": stride,
    }
