"""Search rescale factors for a model and a target length, and leave a run folder: scaling, log and summary.

`run/search.jsonl` is the log and the state; `run/scaling.json` the result; `run/search.json` the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longrope.data.sources import TextSource
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.loading import LoadedModel, fingerprint, require_longer, sources_or_books
from longrope.provenance import record
from longrope.rope.scaling import RopeScaling, Window
from longrope.run_files import SCALING, SEARCH_LOG, SEARCH_SUMMARY
from longrope.search.config import SearchConfig
from longrope.search.critical_dim import Choices, choices, forms_with_critical_dim
from longrope.search.dialogue import DialogueSearch, rank
from longrope.search.evaluator import Evaluator, Question, SerialEvaluator
from longrope.search.initial import NONE
from longrope.search.initial import baselines as baseline_windows
from longrope.search.log import SearchLog
from longrope.search.loop import Conversation, Progress, distinct, run_search
from longrope.search.methods import plan
from longrope.search.ray_evaluator import numerics, ray_evaluator
from longrope.search.search_data import Texts, data_provenance, prepare_texts
from longrope.storage import json_ready, new_output_folder, write_json_atomic

UNIT = "found, attention factor 1"


@dataclass(frozen=True)
class SearchResult:
    """The best scaling found and what it cost; `best_loss` and `baselines` in nats per token on the search samples.

    `token_passes` counts the tokens of all questions asked, a forward once, a backward twice, a question that was asked
    before not again; those about baselines and for `choices` are not in it. `choices` says, where the method searches
    d_rcd, which one it found and what each objective would have chosen. `chosen_seeds`: of a search that races seeds,
    the one that each stage started from; `stretched` is the last stage's result.
    """

    method: str
    objective: str
    best_loss: float
    evaluations: int
    token_passes: int
    baselines: dict[str, float]
    scaling: RopeScaling
    path: Path
    choices: Choices | None = None
    chosen_seeds: tuple[str, ...] = ()

    @property
    def critical_dim(self) -> int | None:
        """d_rcd where the method finds one."""
        return None if self.choices is None else self.choices.critical_dim

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
        if self.chosen_seeds:
            row["chosen_seeds"] = list(self.chosen_seeds)
        if self.choices is None:
            return row
        return row | {"critical_dim": self.choices.critical_dim, "critical_dims": self.choices.to_json()}


def search(
    loaded: LoadedModel,
    target_length: int,
    data: Sequence[TextSource],
    out: Path,
    options: SearchConfig | None = None,
    *,
    resume: bool = False,
    workers: int | None = None,
    ray_address: str | None = None,
    on_start: Callable[[int, dict[str, float]], None] = lambda *_: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> SearchResult:
    """Search factors for `target_length` tokens on texts from `data`; write the run to the new folder `out`.

    `on_start` gets the number of evaluations and the baselines' losses, `on_progress` follows each evaluation. With
    `resume`, an interrupted search in `out` goes on to the end it would have had. `workers` answer in so many Ray
    processes, of the cluster at `ray_address` if given, with the same result bit for bit on the same hardware.

    Raises LongRopeError for what the user can mend; nothing that exists is overwritten.
    """
    require_longer(loaded, target_length)
    return search_window(
        loaded,
        target_length,
        data,
        out,
        options or SearchConfig(),
        resume=resume,
        workers=workers,
        ray_address=ray_address,
        on_start=on_start,
        on_progress=on_progress,
    )


def search_window(
    loaded: LoadedModel,
    target_length: int,
    data: Sequence[TextSource],
    out: Path,
    options: SearchConfig,
    *,
    resume: bool = False,
    workers: int | None = None,
    ray_address: str | None = None,
    on_start: Callable[[int, dict[str, float]], None] = lambda *_: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> SearchResult:
    """`search` for any window of at least L tokens: beyond what the subject reaches, or inside it (`recover`).

    The scaling found is the carried one with the found window among its own. Inside its reach, where none is given,
    the attention factor is a small outer choice: that of the carried window, which the search runs with, or 1 with the
    factors found or the original ones.

    Raises LongRopeError for what the user can mend; nothing that exists is overwritten.
    """
    given = _forms_given(loaded, target_length, options)
    sources = sources_or_books(loaded.name, data, "search")
    texts = prepare_texts(loaded, sources, target_length, options)
    scaled = apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    try:
        planned = plan(loaded, scaled, texts, target_length, options)
        # Another model, other texts or settings are another search; another way to compute gives other last bits.
        identity = planned.identity | {"model_fingerprint": fingerprint(loaded.model), "numerics": numerics(loaded)}
        cost = SerialEvaluator(planned.objectives)
        with (
            _evaluator(loaded, texts, cost, workers, ray_address) as evaluator,
            _log(out, identity | {"record": record()}, resume) as log,
        ):
            conversation = Conversation(evaluator, log)
            held_against = baseline_windows(loaded, target_length)
            baselines = _losses(conversation, held_against)
            if given and options.method != "longrope2":  # which reports them with the one that it found
                baselines |= _losses(conversation, given)
            on_start(planned.questions, baselines)
            questions = run_search(planned.search, conversation, on_progress)
            best, best_loss = planned.search.best
            if target_length <= loaded.context_length and options.attention_factor is None:
                unit = replace(best, attention_factor=1.0)
                losses = {} if unit == best else _losses(conversation, {UNIT: unit})
                others = [(held_against[NONE], baselines[NONE]), *((unit, loss) for loss in losses.values())]
                best, best_loss = min([(best, best_loss), *others], key=lambda pair: rank(pair[1]))
            chosen = choices(conversation, planned, options)
            if chosen is not None:
                baselines |= _losses(conversation, _forms_found(loaded, target_length, chosen.critical_dim))
            conversation.finish()
    finally:
        remove_scaling(loaded.model)
    result = SearchResult(
        method=options.method,
        objective=options.chosen_objective,
        best_loss=best_loss,
        evaluations=len(questions),
        token_passes=sum(map(cost.token_passes, distinct(questions))),
        baselines=baselines,
        scaling=_scaling(loaded, best),
        path=out / SCALING,
        choices=chosen,
        chosen_seeds=tuple(planned.search.chosen_seeds) if isinstance(planned.search, DialogueSearch) else (),
    )
    summary = json_ready(result.to_json()) | {"options": options.model_dump()}
    scaling = result.scaling.with_provenance(
        model=loaded.name, search=identity, data=data_provenance(texts), **summary, **record()
    )
    # A finished search that is resumed comes to the same end: what is there is not written again.
    if not (out / SEARCH_SUMMARY).exists():
        write_json_atomic(out / SEARCH_SUMMARY, summary | record())
    if not result.path.exists():
        scaling.save(result.path)
    return replace(result, scaling=scaling)


@contextmanager
def _evaluator(
    loaded: LoadedModel, texts: Texts, serial: SerialEvaluator, workers: int | None, ray_address: str | None
) -> Iterator[Evaluator]:
    """Who answers: this process, or Ray workers where any are asked for."""
    if workers is None and ray_address is None:
        yield serial
        return
    with ray_evaluator(loaded, texts, workers=workers, address=ray_address) as evaluator:
        yield evaluator


def _log(out: Path, identity: dict[str, Any], resume: bool) -> SearchLog:
    """The log to go on with, or that of a new run, in a new folder."""
    if resume:
        return SearchLog.resume(out / SEARCH_LOG, identity)
    new_output_folder(out)
    return SearchLog.create(out / SEARCH_LOG, identity)


def _forms_given(loaded: LoadedModel, target_length: int, options: SearchConfig) -> dict[str, Window]:
    """YaRN-rcd and NTK-rcd with the d_rcd that is given; none where it is not."""
    given, last = options.critical_dim, loaded.geometry.pairs - 1
    if given is None:
        return {}
    if given > last:
        raise LongRopeError(f"expected a critical dimension from 1 to {last}, found {given}")
    try:
        return forms_with_critical_dim(loaded.geometry, target_length, given)
    except LongRopeError as error:
        raise LongRopeError(f"the critical dimension {given} is too low for NTK-rcd: {error}") from error


def _forms_found(loaded: LoadedModel, target_length: int, critical_dim: int) -> dict[str, Window]:
    """The same with the d_rcd that was found; none where it is so low that they cannot be: the result still can."""
    try:
        return forms_with_critical_dim(loaded.geometry, target_length, max(critical_dim, 1))
    except LongRopeError:
        return {}


def _scaling(loaded: LoadedModel, best: Window) -> RopeScaling:
    """The windows that the model was trained with, then the one found.

    A checkpoint that carries a scaling was trained with it: within its reach it keeps it.
    """
    if loaded.checkpoint_scaling is None:
        return RopeScaling.extended(
            loaded.geometry, best.max_length, best.factors, best.start_tokens, best.attention_factor
        )
    return replace(loaded.checkpoint_scaling, provenance={"carried": loaded.checkpoint_scaling.provenance}).with_window(
        best
    )


def _losses(conversation: Conversation, windows: dict[str, Window]) -> dict[str, float]:
    """The loss of named windows on the search samples, through the log like every other question."""
    questions = [Question(window, {"baseline": name}) for name, window in windows.items()]
    return dict(zip(windows, (answer.loss for answer, _ in conversation.answers(questions)), strict=True))
