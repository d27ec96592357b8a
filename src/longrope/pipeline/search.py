"""Search rescale factors for a model and a target length, and leave a run folder: scaling, log and summary.

`run/search.jsonl` is the log and the state; `run/scaling.json` the result; `run/search.json` the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longrope.evaluation.contenders import CHECKPOINT
from longrope.files import json_ready, new_output_folder, write_json_atomic
from longrope.models.fingerprint import fingerprint
from longrope.models.install import install, uninstall
from longrope.objectives.sampled import SampledObjective
from longrope.pipeline.methods import Plan, Texts, plan, prepare_texts
from longrope.pipeline.options import SearchOptions
from longrope.pipeline.subject import Subject, require_longer, sources_or_books
from longrope.provenance import record
from longrope.rope.factors import CLOSED_FORMS, ntk_critical, yarn
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.critical import CriticalCandidate
from longrope.search.evaluators import CandidateSearch, SerialEvaluator, passes
from longrope.search.gradient import SEARCH
from longrope.search.log import SearchLog
from longrope.search.run import Progress, run_search

LOG, SCALING, SUMMARY = "search.jsonl", "scaling.json", "search.json"


@dataclass(frozen=True)
class SearchResult:
    """The best scaling found and what it cost; `best_loss` and `baselines` in nats per token on the search samples.

    `token_passes` counts the tokens of all questions asked, a forward once, a backward twice; the baselines' are not in
    it. `critical_dim` is d_rcd where the method finds one.
    """

    method: str
    objective: str
    best_loss: float
    evaluations: int
    token_passes: int
    baselines: dict[str, float]
    scaling: RopeScaling
    path: Path
    critical_dim: int | None = None

    def to_json(self) -> dict[str, Any]:
        row = {
            "method": self.method,
            "objective": self.objective,
            "best_loss": self.best_loss,
            "evaluations": self.evaluations,
            "token_passes": self.token_passes,
            "baselines": self.baselines,
            "scaling": str(self.path),
        }
        return row if self.critical_dim is None else row | {"critical_dim": self.critical_dim}


def search(
    subject: Subject,
    target_length: int,
    data: Sequence[str],
    out: Path,
    options: SearchOptions | None = None,
    *,
    resume: bool = False,
    on_start: Callable[[int, dict[str, float]], None] = lambda *_: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> SearchResult:
    """Search factors for `target_length` tokens on texts from `data`; write the run to the new folder `out`.

    `on_start` gets the number of evaluations and the baselines' losses, `on_progress` follows each evaluation. With
    `resume`, an interrupted search in `out` goes on to the end it would have had.

    Raises LongRopeError for what the user can mend; nothing that exists is overwritten.
    """
    options = options or SearchOptions()
    geometry = subject.geometry
    require_longer(geometry, target_length)
    sources = sources_or_books(subject.name, data, "search")
    texts = prepare_texts(subject, sources, target_length, options)
    installed = install(subject.model, RopeScaling.original(geometry))
    try:
        planned = plan(subject, installed, texts, target_length, options)
        identity = planned.identity | {"model_fingerprint": fingerprint(subject.model)}
        if not resume:
            new_output_folder(out)
        header = identity | {"record": record() | {"threads": torch.get_num_threads()}}
        with (SearchLog.resume if resume else SearchLog.create)(out / LOG, header) as log:
            objective = planned.objectives[SEARCH, target_length]
            baselines = _baselines(subject, objective, target_length)
            on_start(planned.questions, baselines)
            questions = run_search(planned.search, SerialEvaluator(planned.objectives), log, on_progress)
            best, best_loss = planned.search.best
            critical_dim = _critical_dim(planned)
            if critical_dim is not None:
                baselines |= _with_critical_dim(subject, objective, target_length, critical_dim)
    finally:
        uninstall(subject.model)
    spent = sum(
        passes(question, _count(question.samples, texts[question.split, question.window.max_length].rows), length)
        for question in questions
        for length in (question.window.max_length,)
    )
    result = SearchResult(
        options.method,
        options.chosen_objective,
        best_loss,
        len(questions),
        spent,
        baselines,
        RopeScaling.extended(geometry, target_length, best.factors, best.start_tokens, best.attention_factor),
        out / SCALING,
        critical_dim,
    )
    summary = json_ready(result.to_json()) | {"options": asdict(options)}
    scaling = result.scaling.with_provenance(
        model=subject.name, search=identity, data=_data_provenance(texts), **summary, **record()
    )
    scaling.save(out / SCALING)
    write_json_atomic(out / SUMMARY, summary | record())
    return SearchResult(**{**vars(result), "scaling": scaling})


def _count(samples: tuple[int, ...] | None, rows: Sequence[object]) -> int:
    return len(rows) if samples is None else len(samples)


def _baselines(subject: Subject, objective: SampledObjective, target_length: int) -> dict[str, float]:
    """The loss of every closed form, with its own attention factor, and of the scaling the checkpoint carries."""
    losses = {}
    for name, form in CLOSED_FORMS.items():
        factors, attention_factor = form(subject.geometry, target_length)
        losses[name] = objective.loss(Window(target_length, tuple(factors.tolist()), 0, attention_factor))
    if subject.existing is not None:
        losses[CHECKPOINT] = objective.loss(subject.existing.windows[-1])
    return losses


def _critical_dim(planned: Plan) -> int | None:
    """d_rcd of the best candidate, where candidates have one."""
    if not isinstance(planned.search, CandidateSearch):
        return None
    candidate, _ = planned.search.optimiser.best
    return candidate.critical_dim if isinstance(candidate, CriticalCandidate) else None


def _with_critical_dim(
    subject: Subject, objective: SampledObjective, target_length: int, critical_dim: int
) -> dict[str, float]:
    """YaRN-rcd and NTK-rcd (LongRoPE2): the closed forms with the real critical dimension that was found."""
    geometry = subject.geometry
    _, attention_factor = CLOSED_FORMS["yarn"](geometry, target_length)
    forms = {
        "yarn-rcd": (yarn(geometry, target_length, critical_dim=critical_dim), attention_factor),
        "ntk-rcd": (ntk_critical(geometry, target_length, critical_dim=critical_dim), 1.0),
    }
    return {
        name: objective.loss(Window(target_length, tuple(factors.tolist()), 0, m))
        for name, (factors, m) in forms.items()
    }


def _data_provenance(texts: Texts) -> dict[str, Any]:
    hashes = {digest for samples in texts.values() for digest in samples.document_hashes}
    return {
        "document_sha256": sorted(hashes),
        "samples": [
            {"split": split, "length": length, **asdict(row)}
            for (split, length), samples in texts.items()
            for row in samples.rows
        ],
    }
