"""The whole way for one model: inspect, search, compare on other books, export, reload, prove, and show.

The run folder holds everything: `search.jsonl`, `scaling.json`, `search.json`, `eval.json`, `checkpoint/`, and the
figures `factors.png` and `perplexity.png`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from longrope.data.samples import assert_disjoint
from longrope.data.sources import read_all
from longrope.errors import LongRopeError
from longrope.evaluation.contenders import CHECKPOINT, closed_form_contender
from longrope.export.hf import Export, export_hf
from longrope.files import write_json_atomic
from longrope.models.install import install, uninstall
from longrope.pipeline.evaluate import Evaluation, evaluate
from longrope.pipeline.options import SearchOptions
from longrope.pipeline.search import SearchResult, search
from longrope.pipeline.subject import Subject, prepare_samples, require_longer, sources_or_books
from longrope.report.figures import factors_figure, perplexity_figure
from longrope.rope.factors import CLOSED_FORMS
from longrope.search.run import Progress

NAME = "longrope"  # the searched scaling's name in tables and figures
EVALUATION, CHECKPOINT_FOLDER = "eval.json", "checkpoint"


@dataclass(frozen=True, slots=True)
class Proof:
    """Reloaded by plain transformers against the searched model, on one held-out text of `length` tokens."""

    length: int
    max_logit_difference: float
    top1_agreement: float


@dataclass(frozen=True)
class Extension:
    """Everything a run of `extend` made."""

    search: SearchResult
    evaluation: Evaluation
    export: Export
    proofs: list[Proof]
    figures: list[Path]


@dataclass(frozen=True, slots=True)
class Listener:
    """What a display wants to hear while `extend` works."""

    on_stage: Callable[[str], None] = lambda _: None
    on_search_start: Callable[[int, dict[str, float]], None] = lambda *_: None
    on_search_progress: Callable[[Progress], None] = lambda _: None
    on_evaluation_start: Callable[[int], None] = lambda _: None
    on_evaluation_sample: Callable[[], None] = lambda: None


def extend(
    subject: Subject,
    target_length: int,
    out: Path,
    *,
    search_data: Sequence[str] = (),
    evaluation_data: Sequence[str] = (),
    lengths: Sequence[int] | None = None,
    evaluation_samples: int = 10,
    options: SearchOptions | None = None,
    allow_lossy: bool = False,
    resume: bool = False,
    listener: Listener | None = None,
) -> Extension:
    """Extend `subject` to `target_length` tokens without training, and prove it; everything goes to `out`.

    `lengths` are those of the comparison (default: L, 2L, … L'). Raises LongRopeError for what the user can mend.
    """
    listener, options = listener or Listener(), options or SearchOptions()
    geometry = subject.geometry
    require_longer(geometry, target_length)
    if options.start_tokens != "0" and not allow_lossy:
        raise LongRopeError("transformers cannot express start tokens; add --allow-lossy, or leave them at 0")
    # What the later stages need is looked at now: an error after a long search would waste it.
    search_sources = sources_or_books(subject.name, search_data, "search")
    evaluation_sources = sources_or_books(subject.name, evaluation_data, "evaluation")
    assert_disjoint([document.sha256 for document in read_all(search_sources)], read_all(evaluation_sources))
    prepare_samples(subject, evaluation_sources, length=target_length, count=evaluation_samples, seed=options.seed)
    listener.on_stage("search")
    found = search(
        subject,
        target_length,
        search_sources,
        out,
        options,
        resume=resume,
        on_start=listener.on_search_start,
        on_progress=listener.on_search_progress,
    )
    listener.on_stage("compare")
    lengths = list(lengths or doubling_lengths(geometry.original_length, target_length))
    evaluation = evaluate(
        subject,
        lengths,
        evaluation_sources,
        scaling=found.scaling,
        scaling_name=NAME,
        against=[*CLOSED_FORMS, *([CHECKPOINT] if subject.existing is not None else [])],
        samples=evaluation_samples,
        seed=options.seed,
        on_start=listener.on_evaluation_start,
        on_sample=listener.on_evaluation_sample,
    )
    write_json_atomic(out / EVALUATION, evaluation.to_json())
    listener.on_stage("export")
    checkpoint = out / CHECKPOINT_FOLDER
    if resume and checkpoint.is_dir() and any(checkpoint.iterdir()):
        raise LongRopeError(f"this run is finished: {checkpoint} exists; nothing is overwritten")
    exported = export_hf(
        subject.name,
        found.scaling,
        checkpoint,
        allow_lossy=allow_lossy,
        evidence=evaluation.rows,
        original_length=geometry.original_length,
    )
    listener.on_stage("prove")
    proofs = prove(subject, found, checkpoint, evaluation_sources, options.seed)
    listener.on_stage("show")
    figures = draw(subject, found, evaluation, out)
    return Extension(found, evaluation, exported, proofs, figures)


def doubling_lengths(original_length: int, target_length: int) -> list[int]:
    """L, 2L, 4L, … and L'."""
    lengths, length = [], original_length
    while length < target_length:
        lengths.append(length)
        length *= 2
    return [*lengths, target_length]


def prove(subject: Subject, found: SearchResult, checkpoint: Path, sources: Sequence[str], seed: int) -> list[Proof]:
    """Logits of the reloaded checkpoint against the searched model's, inside the original window and at L'.

    Raises LongRopeError when the most likely next token differs at more than 1 position in 1,000.
    """
    model = subject.model
    samples = prepare_samples(subject, sources, length=found.scaling.target_length, count=1, seed=seed)
    reloaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=model.dtype, local_files_only=True)
    reloaded = reloaded.to(model.device).eval()
    proofs = []
    for length in (subject.geometry.original_length, found.scaling.target_length):
        ids = samples.ids[:, :length].to(model.device)
        install(model, found.scaling)
        try:
            with torch.inference_mode():
                ours = model(ids, use_cache=False).logits
        finally:
            uninstall(model)
        with torch.inference_mode():
            theirs = reloaded(ids, use_cache=False).logits
        agreement = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
        proofs.append(Proof(length, float((ours - theirs).abs().max()), agreement))
        if agreement < 0.999:
            raise LongRopeError(
                f"the reloaded checkpoint at {checkpoint} does not give the searched model's logits: "
                f"top-1 agreement {agreement:.4f} at {length} tokens"
            )
    return proofs


def draw(subject: Subject, found: SearchResult, evaluation: Evaluation, out: Path) -> list[Path]:
    """The two figures of a run."""
    geometry, target = subject.geometry, found.scaling.target_length
    forms = [name for name in CLOSED_FORMS if name not in ("none", "dynamic-ntk")]
    windows = {name: closed_form_contender(name, geometry, target).window(target) for name in forms}
    windows[NAME] = found.scaling.window_for(target)
    return [
        *factors_figure(out / "factors", geometry, windows, NAME),
        *perplexity_figure(out / "perplexity", evaluation.rows, geometry.original_length, NAME),
    ]


def summary(extension: Extension) -> dict[str, Any]:
    """What `longrope extend --json` prints."""
    return {
        **extension.search.to_json(),
        "results": extension.evaluation.to_json()["results"],
        "checkpoint": str(extension.export.path),
        "proofs": [
            {"length": p.length, "max_logit_difference": p.max_logit_difference, "top1_agreement": p.top1_agreement}
            for p in extension.proofs
        ],
        "figures": [str(path) for path in extension.figures],
    }
