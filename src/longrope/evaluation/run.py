"""Evaluate a model: any of the suites, for a scaling and its baselines, on the same samples."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrope.callbacks import Callbacks
from longrope.checks import LARGEST_SEED, count_in
from longrope.data.sources import Field, TextData, as_sources
from longrope.data.tokens import tokenizer_hash
from longrope.errors import LongRopeError
from longrope.evaluation.base import EvalContext, Suite, run_tasks
from longrope.evaluation.compare import Baselines, Comparison, named_baselines, scaling_to_measure
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.harness import OpenLlmSuite
from longrope.evaluation.held_out import check_unseen, read_texts
from longrope.evaluation.needle import NeedleSuite
from longrope.evaluation.passkey import PasskeySuite
from longrope.evaluation.perplexity import PerplexitySuite, check_lengths
from longrope.evaluation.results import EvalResults
from longrope.evaluation.retention import RetentionSuite
from longrope.evaluation.ruler.suite import RulerSuite, summary_rows
from longrope.evaluation.server.config import ServerOptions, is_server
from longrope.evaluation.server.run import evaluate_server
from longrope.evaluation.task_log import samples_of, task_log
from longrope.locked import has_lines
from longrope.models.apply import kept_modes
from longrope.models.config import LoadOptions
from longrope.models.devices import device_of
from longrope.models.fingerprint import fingerprint
from longrope.models.loading import LoadedModel, open_model
from longrope.models.processes import device_kind, sharing
from longrope.models.shared_texts import sharing_processes
from longrope.models.texts import require_texts
from longrope.progress_log import LoggedProgress
from longrope.provenance import CIRCUMSTANCES, finished, record, versions
from longrope.rope.baselines import ORIGINAL, STRETCHING
from longrope.rope.closed_forms import CLOSED_FORMS
from longrope.rope.progressive import SECOND_FORMS
from longrope.rope.scaling import RopeScaling
from longrope.storage import check_output_file, keep_or_write_json, sha256_text
from longrope.units import doubling_lengths, parse_length, parse_lengths
from longrope.written import sweep

SUITES: Mapping[str, type[Suite]] = {
    suite.name: suite
    for suite in (PerplexitySuite, PasskeySuite, NeedleSuite, RulerSuite, RetentionSuite, OpenLlmSuite)
}
"""The suites by name, in the order of the results."""
_NAMED = CIRCUMSTANCES | {"documents", "warnings"}
"""Keys of the results that do not decide the numbers: how they were measured, names of files, sentences."""


def evaluate(
    model: PreTrainedModel | LoadedModel | Path | str,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    *,
    data: TextData = (),
    field: Field | None = None,
    lengths: int | str | Sequence[int | str] = (),
    suites: str | Sequence[str] = ("perplexity",),
    scaling: RopeScaling | Path | str | None = None,
    scaling_name: str | None = None,
    baselines: Baselines = (),
    config: EvalConfig | None = None,
    target_length: int | str | None = None,
    original: PreTrainedModel | LoadedModel | Path | str | None = None,
    seed: int = 0,
    allow_seen: bool = False,
    output: Path | str | None = None,
    resume: bool = False,
    load: LoadOptions | None = None,
    server: ServerOptions | None = None,
    context_parallel: int = 1,
    callbacks: Callbacks | None = None,
) -> EvalResults:
    """Measure a model under a scaling and under baselines, all on the same samples.

    Args:
        model: A loaded transformers model (its scaling, if one is applied, and its training mode are put back at the
            end), a folder, a hub name or the name of an embedded model; or the address of a server, http://…, which is
            measured as it is.
        tokenizer: Its tokenizer or the name of a model that has it; by default the one that `model` came with.
        data: Held-out texts: files, folders, `book:NAME`, `hf:NAME`. The search and training of the measured scalings
            must not have seen them, which is checked by hash.
        field: The field of rows of `data` that holds their text or chat messages (`a.b` for a nested one); of several,
            the first that a row has counts. By default `text`, else `messages`.
        lengths: Context lengths in tokens: `4096`, `"128k"`. By default L, 2L, … L', where L' is the longest window
            of the scaling, else `target_length`, else the context length of the checkpoint. `retention` and `open-llm`
            measure inside the original window and take none.
        suites: Any of `perplexity`, `passkey`, `needle`, `ruler`, `retention` (short-context quality), `open-llm`.
        scaling: The scaling to measure or its file. By default the one that is applied to `model`, else the model as it
            is.
        scaling_name: The name of `scaling` in the results: by default `longrope`, and a file's path for a file.
        baselines: The methods to compare with: names of closed forms (`none`, `pi`, `ntk`, `ntk-critical`,
            `dynamic-ntk`, `yarn`), `checkpoint` (the scaling of the checkpoint), `second-pi`, `second-yarn`, … (that
            scaling stretched further), `original` (the model before it was extended), paths of scalings ending in
            .json, `RopeScaling` objects, or a dictionary from names to scalings.
        config: The settings of the suites.
        target_length: The length that the closed forms are made for: by default the scaling's, else the longest length.
        original: The model before it was trained, where its weights were others: the method `original`, and the model
            that `retention` compares with.
        seed: Decides every sample.
        allow_seen: Measure on texts that a search or training has seen; the results say so.
        output: A new JSON file for the results. Finished tasks are kept in `NAME.cells.jsonl` beside it.
        resume: Go on with the finished tasks of an earlier run of the same evaluation, to the same results; those of a
            finished one are kept.
        load: The options of loading a model by name or folder.
        server: The options of a server that is measured.
        context_parallel: Processes that share every text, for texts longer than one device's memory: torchrun has
            started that many, which all make this call and get the results. The first one alone measures, as far as
            nothing is shared, and writes files. A needle and a passkey then count as found where each token of the
            answer is the most likely one; RULER is refused.
        callbacks: Gets `on_eval_start` and `on_eval_step`.

    Raises LongRopeError, before anything is measured, for anything that cannot be measured as asked.
    """

    def opened() -> LoadedModel:
        return open_model(model, tokenizer, load)

    started = time.perf_counter()
    if context_parallel > 1:
        _refuse_sharing(model, original)
    with (
        kept_modes(model),
        kept_modes(original),
        sharing(context_parallel, device_kind(model, load)) as processes,
    ):
        if not processes.leads:
            return EvalResults.from_json(json.loads(processes.help(opened, callbacks)), "the results")
        path = None if output is None else Path(output)
        config, callbacks = config or EvalConfig(), callbacks or LoggedProgress()
        if path is not None and not (resume and has_lines(log_path(path)) and path.is_file()):
            check_output_file(path)
        elif path is None and resume:
            raise LongRopeError(
                "only an evaluation with an output can be resumed", code="not-resumable", hint="give its `output`"
            )
        count_in("`seed`", seed, 0, LARGEST_SEED)
        windows = list(dict.fromkeys(parse_lengths(lengths)))
        chosen = _suites([suites] if isinstance(suites, str) else suites, windows, config)
        if context_parallel > 1 and (alone := [suite.name for suite in chosen if not suite.shareable]):
            shareable = ", ".join(suite.name for suite in SUITES.values() if suite.shareable)
            raise LongRopeError(
                f"`context_parallel` shares texts that are scored: expected suites of {shareable}; found "
                f"{', '.join(alone)}, in which the model generates its answers, on one device",
                code="not-together",
                hint="measure it without `context_parallel`",
            )
        if is_server(model):
            given: dict[str, object] = {"scaling": scaling, "baselines": baselines}
            given |= {"original": original, "target_length": target_length}
            given |= (load or LoadOptions()).model_dump(exclude_defaults=True)
            if wrong := [name for name, value in given.items() if value]:
                raise LongRopeError(
                    f"a server is measured as it is: `{wrong[0]}` has no effect on it",
                    code="invalid-setting",
                    hint=f"leave `{wrong[0]}` out",
                )
            if not windows and any(suite.by_length for suite in chosen):
                raise LongRopeError(
                    "expected `lengths` to measure a server at, found none",
                    code="invalid-setting",
                    hint="give context lengths up to the one that it was started for, such as 8k,32k",
                )
            results = evaluate_server(
                str(model),
                tokenizer or (server and server.tokenizer),
                chosen,
                windows,
                sources=as_sources(data, field),
                config=config,
                seed=seed,
                allow_seen=allow_seen,
                log_file=path and log_path(path),
                resume=resume,
                options=server,
                callbacks=callbacks,
            )
            results = replace(results, provenance=record() | finished(started))
            results.require_finite()
            if path is not None:
                keep_or_write_json(path, results.to_json(), but=_NAMED)
            return results
        if server not in (None, ServerOptions()):
            raise LongRopeError(
                "expected the address of a server, http://…, found a model",
                code="invalid-setting",
                hint="leave `server` out, or give the address",
            )
        aimed = None if target_length is None else parse_length(target_length)
        against = named_baselines(baselines)
        _refuse_unused(against, target_length if windows else None)
        if any(suite.needs_text(config) for suite in chosen):
            require_texts(model, as_sources(data, field), "evaluation", load)
        loaded = processes.open(opened)
        before = None if original is None else open_model(original, options=load)
        if before is not None and tokenizer_hash(before.tokenizer) != tokenizer_hash(loaded.tokenizer):
            raise LongRopeError(
                f"expected {before.name} to have the tokenizer of {loaded.name}; found another", code="other-tokenizer"
            )
        if before is not None and ORIGINAL not in against and not any(suite.with_original for suite in chosen):
            raise LongRopeError(
                f"nothing compares with the model `original`: it is for the baseline {ORIGINAL} and the suites "
                f"{' and '.join(suite.name for suite in SUITES.values() if suite.with_original)}",
                code="invalid-setting",
                hint="leave it out",
            )
        wanted, name = scaling_to_measure(loaded, scaling, scaling_name)
        if not windows and any(suite.by_length for suite in chosen):
            windows = _default_lengths(loaded, wanted, aimed)
        longest = max(windows, default=loaded.geometry.original_length)
        target = aimed or (longest if wanted is None else wanted.target_length)
        comparison = Comparison.of(loaded, wanted, name, against, target, before)
        for method in comparison.methods:  # a length that no window reaches is refused before anything is measured
            method.window(longest)
        documents = read_texts(loaded, data, field) if any(suite.needs_text(config) for suite in chosen) else []
        seen = check_unseen(loaded.recorded, documents, comparison.scalings.values(), allow_seen)
        context = EvalContext.of(loaded, windows, documents, seed, config)
        prepared = [suite(context) for suite in chosen]
        for suite in prepared:
            suite.check()
        settings = _settings(context, prepared, comparison, wanted, list(against), target, before) | seen
        with task_log(path and log_path(path), settings | {"versions": versions()}, resume) as log:
            if path is not None:
                sweep(path.parent, path.name, log_path(path).name)
            measured = run_tasks(prepared, loaded, comparison, before, log, callbacks)
        rows = [row for result in measured for row in result.rows]
        ruler = [row for row in rows if row.suite == RulerSuite.name]
        if ruler:
            rows += summary_rows(ruler, loaded.geometry.original_length, config)
        results = EvalResults(
            tuple(rows),
            _with_remarks(settings, loaded, list(against), target) | samples_of(measured),
            record() | finished(started),
        )
        results.require_finite()
        if path is not None:
            keep_or_write_json(path, results.to_json(), but=_NAMED)
        processes.give(json.dumps(results.to_json()))
        return results


def _refuse_sharing(model: object, original: object) -> None:
    """Raise LongRopeError for what processes cannot share texts of: a server, and two models at once."""
    if is_server(model):
        raise LongRopeError(
            "a server is measured as it is: `context_parallel` has no effect on it",
            code="invalid-setting",
            hint="leave `context_parallel` out",
        )
    if original is not None:
        raise LongRopeError(
            "processes share the texts of one model: expected `context_parallel` or another `original`, found both",
            code="not-together",
            hint="measure the original model in a run of its own",
        )


def log_path(output: Path) -> Path:
    """The file of the finished tasks of an evaluation with this output: `eval.json` -> `eval.cells.jsonl`."""
    return output.with_suffix(".cells.jsonl")


def _suites(names: Sequence[str], lengths: Sequence[int], config: EvalConfig) -> list[type[Suite]]:
    """The suites of these names, in the order of SUITES. Raises LongRopeError where they do not fit the rest."""
    unknown = [name for name in names if name not in SUITES]
    if unknown or not names:
        raise LongRopeError(
            f"expected suites of {', '.join(SUITES)}; found {', '.join(unknown) or 'none'}", code="invalid-setting"
        )
    chosen = [suite for name, suite in SUITES.items() if name in names]
    if config.tasks and RetentionSuite not in chosen:
        raise LongRopeError(
            f"lm-eval's tasks belong to the suite {RetentionSuite.name}",
            code="invalid-setting",
            hint="add it to `suites`, or leave `tasks` out",
        )
    config.refuse_unused(names, ("qa_file",))
    if any(suite.by_length for suite in chosen):
        if lengths:
            check_lengths(lengths, max(lengths), None)
    elif lengths:
        raise LongRopeError(
            f"expected no `lengths` for suites inside the original window ({', '.join(names)}), found {len(lengths)}",
            code="invalid-setting",
            hint="leave `lengths` out",
        )
    return chosen


def _default_lengths(loaded: LoadedModel, scaling: RopeScaling | None, target_length: int | None) -> list[int]:
    """L, 2L, … up to the longest window that is measured."""
    longest = loaded.context_length if scaling is None else scaling.target_length
    original_length = loaded.geometry.original_length
    return doubling_lengths(original_length, max(original_length, target_length or longest))


def _with_remarks(
    settings: dict[str, Any], loaded: LoadedModel, against: Sequence[str], target_length: int
) -> dict[str, Any]:
    """The settings, with a warning about closed forms that were made for the original window and change nothing."""
    plain = [name for name in against if name in STRETCHING]
    if not plain or target_length > loaded.geometry.original_length:
        return settings
    warning = (
        f"{', '.join(plain)} rescale nothing: they are made for {target_length} tokens, and the original window has "
        f"{loaded.geometry.original_length}; a longer target length shows what they do"
    )
    return settings | {"warnings": [*settings.get("warnings", []), warning]}


def _refuse_unused(against: Mapping[str, RopeScaling | None], target_length: object) -> None:
    """Raise LongRopeError for a target length that no closed form of this evaluation would use."""
    made = [name for name, scaling in against.items() if scaling is None and name in (*CLOSED_FORMS, *SECOND_FORMS)]
    if target_length is not None and not set(made) - {"none"}:
        raise LongRopeError(
            "`target_length` is the window that closed forms in `baselines` are made for; found none of them",
            code="invalid-setting",
            hint="leave it out",
        )


def _settings(
    context: EvalContext,
    suites: Sequence[Suite],
    comparison: Comparison,
    scaling: RopeScaling | None,
    against: Sequence[str],
    target_length: int,
    original: LoadedModel | None,
) -> dict[str, Any]:
    """The settings that decide the numbers, which a resumed run must share."""
    loaded = context.loaded
    settings: dict[str, Any] = {
        "model": loaded.name,
        "model_fingerprint": fingerprint(loaded.model),
        "tokenizer_sha256": tokenizer_hash(loaded.tokenizer),
        "dtype": str(loaded.model.dtype),
        "device": device_of(loaded.model).type,
        "original_length": loaded.geometry.original_length,
        "scaling_sha256": None if scaling is None else sha256_text(scaling.to_json()),
        "against": list(against),
        "against_sha256": {name: sha256_text(other.to_json()) for name, other in comparison.scalings.items()},
        "target_length": target_length,
        "lengths": list(context.lengths),
        "seed": context.seed,
        "data_sha256": context.data_sha256,
        "suites": {suite.name: suite.settings() for suite in suites},
    }
    if loaded.checkpoint_scaling is not None:
        settings["carried_sha256"] = sha256_text(loaded.checkpoint_scaling.to_json())
    if (processes := sharing_processes(loaded.model)) > 1:
        settings["context_parallel"] = processes
    if original is not None:
        settings |= {"original": original.name, "original_fingerprint": fingerprint(original.model)}
    return settings
