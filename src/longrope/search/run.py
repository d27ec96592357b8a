"""The search job: runs a search method on a model under a log, and leaves a run folder with scaling, log and summary.

`search.jsonl` is the log and the whole state, `scaling.json` the result, `search.json` the summary.

    scaling = search_scaling("tiny", target_length="1k", config=SearchConfig(method="gradient"))
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrope.callbacks import Callbacks
from longrope.checks import count_in
from longrope.data.sources import Field, TextData, TextSource, as_sources
from longrope.errors import LongRopeError
from longrope.locked import has_lines
from longrope.models.apply import kept_modes, scaled
from longrope.models.config import LoadOptions
from longrope.models.devices import says_where
from longrope.models.fingerprint import fingerprint
from longrope.models.finite import not_finite
from longrope.models.loading import LoadedModel, open_model
from longrope.models.processes import device_kind, sharing
from longrope.models.shared_texts import says_sharing
from longrope.models.targets import require_longer
from longrope.models.texts import require_texts, sources_or_books
from longrope.progress_log import LoggedProgress
from longrope.provenance import CIRCUMSTANCES, finished, record
from longrope.rope.scaling import RopeScaling, Window
from longrope.run_files import SCALING, SEARCH_LOG, SEARCH_SUMMARY, WRITTEN
from longrope.search.config import SearchConfig
from longrope.search.critical_dim import CriticalDims, critical_dim_by_objective, forms_with_critical_dim
from longrope.search.evaluator import (
    EvalRequest,
    EvaluateEach,
    LoggedEvaluator,
    SearchOutcome,
    SerialEvaluator,
    distinct,
    rank,
)
from longrope.search.gradient_memory import choose_layer_inputs
from longrope.search.initial import NONE, baselines
from longrope.search.log import SearchLog
from longrope.search.methods import build, identity
from longrope.search.replicas import numerics, processes_here, ray_evaluator
from longrope.search.search_data import Texts, data_provenance, objectives_over, prepare_texts
from longrope.search.verdict import SearchVerdict, search_verdict
from longrope.search.windows import extended_by, kept_windows, notes_before
from longrope.storage import (
    check_output_folder,
    json_ready,
    keep_or_write_json,
    new_output_folder,
    nothing_left_if_refused,
)
from longrope.units import parse_length
from longrope.written import begin_record, has_record, sweep

UNIT = "found, attention factor 1"
NAMED = CIRCUMSTANCES | {"model", "document", "scaling", "options"}
"""Keys of a search's outputs that do not decide its result: how it was run, and names of files."""


@dataclass(frozen=True)
class SearchResult:
    """The best scaling found and its cost; `best_loss` and `baselines` in nats per token on the search samples.

    `token_passes` counts the tokens of all evaluations of the search, a forward once, a backward twice, a repeated
    evaluation not again; baselines and `critical_dims` are not in it. `critical_dims`: where the method searches d_rcd,
    the one that it found and the one that each objective would have chosen. `chosen_seeds`: of a method with seeds, the
    one that each stage started from; `stretched` is the result of the stage before.
    """

    method: str
    objective: str
    best_loss: float
    evaluations: int
    token_passes: int
    baselines: dict[str, float]
    scaling: RopeScaling
    path: Path
    critical_dims: CriticalDims | None = None
    chosen_seeds: tuple[str, ...] = ()

    def __repr__(self) -> str:
        baselines = ", ".join(f"{name} {loss:.4f}" for name, loss in self.baselines.items())
        return (
            f"SearchResult(method={self.method!r}, objective={self.objective!r}, best_loss={self.best_loss:.4f}, "
            f"baselines=({baselines}), evaluations={self.evaluations}, path={str(self.path)!r})"
        )

    @property
    def verdict(self) -> SearchVerdict:
        """The result against the best baseline."""
        return search_verdict(self.best_loss, self.baselines)

    @property
    def critical_dim(self) -> int | None:
        """d_rcd where the method finds one."""
        return None if self.critical_dims is None else self.critical_dims.critical_dim

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
        if self.critical_dims is None:
            return row
        return row | {"critical_dim": self.critical_dim, "critical_dims": self.critical_dims.to_json()}


def search_scaling(
    model: PreTrainedModel | LoadedModel | Path | str,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    *,
    target_length: int | str,
    data: TextData = (),
    field: Field | None = None,
    config: SearchConfig | None = None,
    output_dir: Path | str | None = None,
    resume: bool = False,
    workers: int | None = None,
    ray_address: str | None = None,
    context_parallel: int = 1,
    load: LoadOptions | None = None,
    callbacks: Callbacks | None = None,
) -> RopeScaling:
    """Search rescale factors that extend the context window of `model` to `target_length` tokens, without training.

    `model` is a transformers model that you loaded, a folder, a hub name or an embedded model; a loaded one is left as
    it was found, under the scaling that was applied to it. `target_length` is an int or text such as "128k". `data` is
    a text file, a folder, `hf:NAME` or a list of them (embedded models bring books); `field` is where its rows have
    their text or chat messages (`a.b` for a nested field; of several, the first that a row has; by default `text`, else
    `messages`). `config` chooses the method and its budget, `load` how a named model is loaded.

    `output_dir` is a new folder for the scaling, the log and the summary (by default a temporary one); with `resume`,
    a search that was interrupted in it goes on to the end that it would have had, and begins where there is none.
    `workers` computes with that many Ray workers, of the cluster at `ray_address` if given, with the same result bit
    for bit on the same hardware. `context_parallel` shares every text among that many processes, for texts longer than
    one device's memory. With workers these are the processes of each worker. Without, torchrun has started them, and
    all of them make this call and get its result; the first one alone runs the search and writes files.

    Raises LongRopeError for everything that the caller can mend; nothing that exists is overwritten.
    """
    if resume and output_dir is None:
        raise LongRopeError("expected the `output_dir` of the search to resume, found none", code="not-resumable")

    def opened() -> LoadedModel:
        return open_model(model, tokenizer, load)

    here = processes_here(context_parallel, workers, ray_address)
    with (
        kept_modes(model),
        sharing(here, device_kind(model, load)) as processes,
        tempfile.TemporaryDirectory(prefix="longrope-search-") as temporary,
    ):
        if not processes.leads:
            return RopeScaling.from_json(processes.help(opened, callbacks))
        folder = Path(temporary) / "search" if output_dir is None else Path(output_dir)
        resume, sources = resume and has_lines(folder / SEARCH_LOG), as_sources(data, field)
        if not resume:  # the same call begins a search and continues it
            check_output_folder(folder)
        require_texts(model, sources, "search", load)
        found = search(
            processes.open(opened),
            parse_length(target_length),
            sources,
            folder,
            config,
            resume=resume,
            workers=workers,
            ray_address=ray_address,
            context_parallel=context_parallel,
            callbacks=callbacks,
        )
        processes.give(found.scaling.to_json())
        return found.scaling


def search(
    loaded: LoadedModel,
    target_length: int,
    data: Sequence[TextSource],
    output_dir: Path,
    config: SearchConfig | None = None,
    *,
    resume: bool = False,
    workers: int | None = None,
    ray_address: str | None = None,
    context_parallel: int = 1,
    callbacks: Callbacks | None = None,
    recovery: bool = False,
) -> SearchResult:
    """`search_scaling` with its full result, in the first process of those that share the texts of `loaded`.

    `recovery`: `target_length` may lie inside the model's context length.

    The scaling is that of the checkpoint with the window found among its own. In a recovery that gives no attention
    factor, it is a small outer choice: that of the checkpoint's window, which the search runs with, or 1 with the
    factors found or the original ones (`_outer_choice`).
    """
    started = time.perf_counter()
    config, callbacks = config or SearchConfig(), callbacks or LoggedProgress()
    if not recovery:
        require_longer(loaded, target_length)
    if workers is not None:
        count_in("`workers`", workers, 1)
    if not resume:
        check_output_folder(output_dir)  # before texts are read and workers start
    if guess := loaded.original_length_guess:
        callbacks.on_note(f"the original window L = {loaded.geometry.original_length} is a guess: {guess}")
    given = _forms_given(loaded, target_length, config)
    layer_inputs, how = choose_layer_inputs(loaded, target_length, config, workers or 1, context_parallel)
    texts = prepare_texts(loaded, sources_or_books(loaded.name, data, "search"), target_length, config)
    with scaled(loaded.model, RopeScaling.original(loaded.geometry)) as scaled_model:
        objectives = objectives_over(scaled_model, texts, layer_inputs)
        prepared = build(loaded, objectives, target_length, config)
        kept = loaded.checkpoint_scaling if recovery else kept_windows(loaded)
        if not recovery:
            start, m = config.start_tokens, prepared.attention_factor
            for note in notes_before(scaled_model, loaded, kept, target_length, start, m):
                callbacks.on_note(note)
        # Another model, other texts or settings are another search; other hardware or versions give other last bits.
        header = identity(prepared, loaded, texts, target_length, config)
        header |= {"model_fingerprint": fingerprint(loaded.model), "numerics": numerics(loaded, context_parallel)}
        serial, where = SerialEvaluator(objectives), says_where(loaded.model) + says_sharing(context_parallel)
        computing: AbstractContextManager[EvaluateEach] = nullcontext(serial)
        if workers is not None or ray_address is not None:
            computing = ray_evaluator(  # in whose block the model here is in main memory
                loaded,
                texts,
                workers=workers,
                address=ray_address,
                layer_inputs=layer_inputs,
                context_parallel=context_parallel,
                on_note=callbacks.on_note,
            )
        with computing as evaluate_each, _log(output_dir, header | {"record": record()}, resume) as (log, begun):
            evaluate = LoggedEvaluator(evaluate_each, log)
            windows = baselines(loaded, target_length, formulas=config.baselines)
            losses = _losses(evaluate, windows)
            if given and config.method != "longrope2":  # which reports them with the dimension that it finds
                losses |= _losses(evaluate, given)
            # The search would come to nothing, hours later; of the model without scaling alone that is not known.
            if config.baselines and not any(map(math.isfinite, losses.values())):
                raise not_finite(loaded.model, f"the losses of {', '.join(losses)} are all", target_length)
            begun()
            said = f"; {how}" if config.by_gradient else ""
            callbacks.on_device(where + said)
            callbacks.on_search_start(prepared.max_requests, losses)
            with evaluate.search(callbacks, target_length) as requests, _told_in_full(loaded, target_length):
                outcome = prepared.run(evaluate, on_best=evaluate.report_best)
            best, best_loss = outcome.window, outcome.loss
            if target_length <= loaded.context_length and config.attention_factor is None:
                best, best_loss = _outer_choice(evaluate, outcome, windows[NONE], losses[NONE])
            critical_dims = critical_dim_by_objective(evaluate, outcome, config)
            if critical_dims is not None and config.baselines:
                losses |= _losses(evaluate, _forms_found(loaded, target_length, critical_dims.critical_dim))
            evaluate.finish()
    result = SearchResult(
        method=config.method,
        objective=config.chosen_objective,
        best_loss=best_loss,
        evaluations=len(requests),
        token_passes=sum(map(serial.token_passes, distinct(requests))),
        baselines=losses,
        scaling=extended_by(loaded, kept, best),
        path=output_dir / SCALING,
        critical_dims=critical_dims,
        chosen_seeds=outcome.chosen_seeds,
    )
    result = _saved(result, loaded, texts, header, config, finished(started) | {"resumed": resume})
    callbacks.on_search_end(result.method, str(result.verdict))
    return result


@contextmanager
def _told_in_full(loaded: LoadedModel, target_length: int) -> Iterator[None]:
    """Add dtype, length and a remedy to an error about numbers that are not finite."""
    try:
        yield
    except LongRopeError as error:
        if error.code != "not-finite":
            raise
        full = not_finite(loaded.model, "losses or gradients are", target_length)
        raise LongRopeError(f"{error.message}; {full.message}", code=full.code, hint=full.hint) from error


def _saved(
    result: SearchResult,
    loaded: LoadedModel,
    texts: Texts,
    header: Mapping[str, Any],
    config: SearchConfig,
    timing: Mapping[str, Any],
) -> SearchResult:
    """Write scaling and summary; `timing` goes into the summary alone, so that equal searches give equal scalings.

    A finished search that is resumed comes to the same end: its files are kept.

    Raises LongRopeError where one of them holds another result than the log.
    """
    summary = json_ready(result.to_json()) | {"options": config.model_dump()}
    scaling = result.scaling.with_provenance(
        model=loaded.name, search=header, data=data_provenance(texts), **summary, **record()
    )
    keep_or_write_json(result.path.parent / SEARCH_SUMMARY, summary | record() | timing, but=NAMED)
    keep_or_write_json(result.path, json.loads(scaling.to_json()), but=NAMED)
    return replace(result, scaling=scaling)


@contextmanager
def _log(output_dir: Path, header: dict[str, Any], resume: bool) -> Iterator[tuple[SearchLog, Callable[[], None]]]:
    """The log to go on with, or that of a new run, in a new folder; and what to call when the search begins.

    Of a new run that is refused before, nothing stays.
    """
    if resume:
        with SearchLog.resume(output_dir / SEARCH_LOG, header) as log:
            sweep(output_dir, SEARCH_LOG, SEARCH_SUMMARY, SCALING)
            yield log, lambda: None
        return
    with nothing_left_if_refused(output_dir) as output:
        new_output_folder(output_dir)
        if has_record(output_dir.parent):  # of a recovery in a recipe
            begin_record(output_dir)
            output.wrote(output_dir / WRITTEN)
        with SearchLog.create(output_dir / SEARCH_LOG, header) as log:
            output.wrote(log.path)
            yield log, output.keep


def _forms_given(loaded: LoadedModel, target_length: int, config: SearchConfig) -> dict[str, Window]:
    """YaRN-rcd and NTK-rcd with the d_rcd of `config`; none without one."""
    given, last = config.critical_dim, loaded.geometry.pairs - 1
    if given is None:
        return {}
    if given > last:
        raise LongRopeError(f"expected a `critical_dim` from 1 to {last}, found {given}", code="invalid-setting")
    if not config.baselines:
        return {}
    try:
        return forms_with_critical_dim(loaded.geometry, target_length, given)
    except LongRopeError as error:
        raise LongRopeError(
            f"`critical_dim` {given} is too low for NTK-rcd: {error}", code="invalid-setting"
        ) from error


def _forms_found(loaded: LoadedModel, target_length: int, critical_dim: int) -> dict[str, Window]:
    """YaRN-rcd and NTK-rcd with the d_rcd that was found; none where it is too low for them, though not for the
    result."""
    try:
        return forms_with_critical_dim(loaded.geometry, target_length, max(critical_dim, 1))
    except LongRopeError:
        return {}


def _outer_choice(
    evaluate: LoggedEvaluator, outcome: SearchOutcome, original: Window, original_loss: float
) -> tuple[Window, float]:
    """The best of the window found, the same with attention factor 1, and the original RoPE, with its loss."""
    unit = replace(outcome.window, attention_factor=1.0)
    losses = {} if unit == outcome.window else _losses(evaluate, {UNIT: unit})
    others = [(original, original_loss), *((unit, loss) for loss in losses.values())]
    return min([(outcome.window, outcome.loss), *others], key=lambda pair: rank(pair[1]))


def _losses(evaluate: LoggedEvaluator, windows: dict[str, Window]) -> dict[str, float]:
    """The loss of named windows on the search samples."""
    results = evaluate([EvalRequest(window, {"baseline": name}) for name, window in windows.items()])
    return dict(zip(windows, (result.loss for result in results), strict=True))
