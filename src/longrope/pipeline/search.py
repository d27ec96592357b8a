"""Search rescale factors for a model and a target length, and leave a run folder: scaling, log and summary.

`run/search.jsonl` is the log and the state; `run/scaling.json` the result; `run/search.json` the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longrope.evaluation.contenders import CHECKPOINT
from longrope.files import json_ready, new_output_folder, write_json_atomic
from longrope.models.fingerprint import fingerprint
from longrope.models.install import install, uninstall
from longrope.pipeline.methods import Plan, Texts, plan, prepare_texts
from longrope.pipeline.options import SearchOptions
from longrope.pipeline.subject import Subject, require_longer, sources_or_books
from longrope.provenance import record, versions
from longrope.rope.factors import CLOSED_FORMS, ntk_critical, yarn, yarn_attention_factor
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.critical import CriticalCandidate
from longrope.search.evaluators import CandidateSearch, Question, SerialEvaluator
from longrope.search.log import SearchLog
from longrope.search.run import Conversation, Progress, run_search

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
    require_longer(subject, target_length)
    sources = sources_or_books(subject.name, data, "search")
    texts = prepare_texts(subject, sources, target_length, options)
    installed = install(subject.model, RopeScaling.original(subject.geometry))
    try:
        planned = plan(subject, installed, texts, target_length, options)
        # Another model, other texts or settings are another search; another way to compute gives other last bits.
        identity = planned.identity | {"model_fingerprint": fingerprint(subject.model), "numerics": _numerics(subject)}
        if not resume:
            new_output_folder(out)
        with (SearchLog.resume if resume else SearchLog.create)(out / LOG, identity | {"record": record()}) as log:
            evaluator = SerialEvaluator(planned.objectives)
            conversation = Conversation(evaluator, log)
            baselines = _losses(conversation, _baselines(subject, target_length))
            on_start(planned.questions, baselines)
            questions = run_search(planned.search, conversation, on_progress)
            best, best_loss = planned.search.best
            critical_dim = _critical_dim(planned)
            if critical_dim is not None:
                baselines |= _losses(conversation, _with_critical_dim(subject, target_length, critical_dim))
            conversation.finish()
    finally:
        uninstall(subject.model)
    result = SearchResult(
        method=options.method,
        objective=options.chosen_objective,
        best_loss=best_loss,
        evaluations=len(questions),
        token_passes=sum(map(evaluator.token_passes, questions)),
        baselines=baselines,
        scaling=_scaling(subject, best),
        path=out / SCALING,
        critical_dim=critical_dim,
    )
    summary = json_ready(result.to_json()) | {"options": asdict(options)}
    scaling = result.scaling.with_provenance(
        model=subject.name, search=identity, data=_data_provenance(texts), **summary, **record()
    )
    if not result.path.exists():  # a finished search that is resumed comes to the same end: nothing is written again
        scaling.save(result.path)
        write_json_atomic(out / SUMMARY, summary | record())
    return replace(result, scaling=scaling)


def _numerics(subject: Subject) -> dict[str, Any]:
    """What decides the last bits of a loss."""
    model = subject.model
    return {
        "dtype": str(model.dtype),
        "device": model.device.type,
        "attn_implementation": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _scaling(subject: Subject, best: Window) -> RopeScaling:
    """The windows that the model was trained with, then the one found.

    A checkpoint that carries a scaling was trained with it: within its reach it keeps it.
    """
    if subject.existing is None:
        return RopeScaling.extended(
            subject.geometry, best.max_length, best.factors, best.start_tokens, best.attention_factor
        )
    return RopeScaling(subject.geometry, (*subject.existing.windows, best))


def _losses(conversation: Conversation, windows: dict[str, Window]) -> dict[str, float]:
    """The loss of named windows on the search samples, through the log like every other question."""
    questions = [Question(window, {"baseline": name}) for name, window in windows.items()]
    return dict(zip(windows, (answer.loss for answer, _ in conversation.answers(questions)), strict=True))


def _baselines(subject: Subject, target_length: int) -> dict[str, Window]:
    """Every closed form, with its own attention factor, and the scaling the checkpoint carries."""
    windows = {}
    for name, form in CLOSED_FORMS.items():
        factors, attention_factor = form(subject.geometry, target_length)
        windows[name] = Window(target_length, tuple(factors.tolist()), 0, attention_factor)
    if subject.existing is not None:
        windows[CHECKPOINT] = replace(subject.existing.windows[-1], max_length=target_length)
    return windows


def _critical_dim(planned: Plan) -> int | None:
    """d_rcd of the best candidate, where candidates have one."""
    if not isinstance(planned.search, CandidateSearch):
        return None
    candidate, _ = planned.search.optimiser.best
    return candidate.critical_dim if isinstance(candidate, CriticalCandidate) else None


def _with_critical_dim(subject: Subject, target_length: int, critical_dim: int) -> dict[str, Window]:
    """YaRN-rcd and NTK-rcd (LongRoPE2): the closed forms with the real critical dimension that was found."""
    geometry = subject.geometry
    forms = {
        "yarn-rcd": (
            yarn(geometry, target_length, critical_dim=max(critical_dim, 1)),
            yarn_attention_factor(geometry, target_length),
        ),
        "ntk-rcd": (ntk_critical(geometry, target_length, critical_dim=max(critical_dim, 1)), 1.0),
    }
    return {
        name: Window(target_length, tuple(factors.tolist()), 0, attention_factor)
        for name, (factors, attention_factor) in forms.items()
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
