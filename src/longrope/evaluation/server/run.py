"""Evaluate the model of a server: passkeys, needles, RULER and perplexity on the samples that a loaded model gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from longrope.callbacks import Callbacks
from longrope.data.sources import TextSource, read_all
from longrope.data.tokens import encode, tokenizer_hash
from longrope.errors import LongRopeError
from longrope.evaluation.base import EvalTask, Suite, TextContext, sources_of
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.held_out import check_unseen
from longrope.evaluation.needle import NeedleSuite, needle_rows
from longrope.evaluation.passkey import PasskeySuite, passkey_rows
from longrope.evaluation.perplexity import PerplexitySuite, perplexity_rows
from longrope.evaluation.results import EvalResults, EvalRow
from longrope.evaluation.retrieval import joined
from longrope.evaluation.ruler.suite import RulerSuite, ruler_row, summary_rows
from longrope.evaluation.server.client import PROBE, Server
from longrope.evaluation.server.config import ServerOptions
from longrope.evaluation.task_log import TaskKey, TaskLog, TaskResult, samples_of, task_log
from longrope.models.loading import load_tokenizer, recorded_scaling
from longrope.models.texts import sources_or_books
from longrope.provenance import versions

Measured = tuple[list[EvalRow], str, dict[str, str]]
"""The rows of a task, the hash of its samples, and the documents that they were taken from (SHA-256 -> name)."""


def evaluate_server(
    address: str,
    tokenizer: PreTrainedTokenizerBase | str | None,
    suites: Sequence[type[Suite]],
    lengths: Sequence[int],
    *,
    sources: Sequence[TextSource] = (),
    config: EvalConfig,
    seed: int = 0,
    allow_seen: bool = False,
    log_file: Path | None = None,
    resume: bool = False,
    options: ServerOptions | None = None,
    callbacks: Callbacks,
) -> EvalResults:
    """Measure the model that `address` serves at `lengths` tokens; `tokenizer` is that of its model, or its name.

    The samples are those of `evaluate` for a loaded model with this tokenizer and seed. A reply may have as many tokens
    as the answer needs, one less than from a loaded model, so that prompt and reply fit a server of exactly the length.
    The finished tasks are kept in `log_file`; `resume` goes on with them.

    Raises LongRopeError for what a server cannot give (retention, open-llm, a stride; perplexity where it gives no
    log-probabilities of prompts), another tokenizer, lengths above its context, and requests that it refuses.
    """
    impossible = [suite.name for suite in suites if suite not in _MEASURES]
    if impossible or config.stride is not None:
        raise LongRopeError(
            f"a server can be measured by {', '.join(suite.name for suite in _MEASURES)}; found "
            f"{', '.join(impossible) or 'a `stride`'}",
            code="not-expressible",
            hint="give the model itself for the others",
        )
    if tokenizer is None:
        raise LongRopeError(
            "a server needs the `tokenizer` of its model, found none",
            code="missing-tokenizer",
            hint="give the model's folder or its name on the hub",
        )
    name = tokenizer if isinstance(tokenizer, str) else getattr(tokenizer, "name_or_path", "")
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    server = Server(address, options or ServerOptions())
    server.check_lengths(lengths)
    compared = server.check_tokenizer(loaded)
    if PerplexitySuite in suites:
        probe = encode(loaded, PROBE)
        server.check_losses([*probe, probe[0]], max(lengths, default=0))
    needed = any(suite.needs_text(config) for suite in suites)
    documents = read_all(sources_or_books(name, sources, "evaluation"), tokenizer=loaded) if needed else []
    in_folder = isinstance(tokenizer, str) or (bool(name) and (Path(name) / "config.json").is_file())
    seen = check_unseen(recorded_scaling(name) if in_folder else None, documents, [], allow_seen)
    context = TextContext(loaded, lengths, documents, seed, config)
    prepared = [suite(context) for suite in suites]
    for suite in prepared:
        suite.check()
    settings = {
        "model": server.model,
        "server": server.address,
        "server_context": server.context_length,
        "tokenizer_sha256": tokenizer_hash(loaded),
        "tokenizer_compared": compared,
        "lengths": list(lengths),
        "seed": seed,
        "data_sha256": context.data_sha256,
        "suites": {suite.name: suite.settings() for suite in prepared},
        **seen,
    }
    if server.warnings:
        settings["warnings"] = [*seen.get("warnings", []), *server.warnings]
    with task_log(log_file, settings | {"versions": versions()}, resume) as log:
        results = list(_run(server, prepared, log, callbacks))
    rows = [row for result in results for row in result.rows]
    if ruler := [row for row in rows if row.suite == RulerSuite.name]:
        rows += summary_rows(ruler, 0, config)  # the original window is not known: no relative length
    return EvalResults(tuple(rows), settings | samples_of(results))


def _run(server: Server, suites: Sequence[Suite], log: TaskLog | None, callbacks: Callbacks) -> Iterator[TaskResult]:
    """The results of all tasks, from `log` where it has them."""
    tasks = [(suite, task) for suite in suites for task in suite.tasks()]
    callbacks.on_eval_start(sum(task.steps for _, task in tasks))
    done = {} if log is None else dict(log.results)
    for suite, task in tasks:
        key = TaskKey(server.model, task.suite, task.task, task.length)
        if key in done:
            for _ in range(task.steps):
                callbacks.on_eval_step()
            yield done[key]
            continue
        rows, digest, used = _MEASURES[type(suite)](server, suite, task, callbacks.on_eval_step)
        result = TaskResult(key, tuple(rows), digest, used)
        if log is not None:
            log.append(result)
        yield result


def _passkeys(server: Server, suite: Any, task: EvalTask, step: Callable[[], None]) -> Measured:
    drawn = suite.draw(task.length, suite.context.config.trials)
    replies = server.each(lambda ids: server.reply(ids, drawn.room), drawn.prompts, step)
    return passkey_rows(drawn, replies, server.model), drawn.sha256, {}


def _needles(server: Server, suite: Any, task: EvalTask, step: Callable[[], None]) -> Measured:
    grid = suite.draw(task.length, suite.context.config.trials)

    def ask(document: Any) -> list[str]:
        """A document's needles one after the other: its keys are in the server's prefix cache."""
        return [server.reply(joined(document.context, asked.question), grid.room) for asked in document.needles]

    replies = [reply for found in server.each(ask, grid.documents, step) for reply in found]
    return needle_rows(grid, replies, None, server.model), grid.sha256, grid.sources


def _ruler(server: Server, suite: Any, task: EvalTask, step: Callable[[], None]) -> Measured:
    drawn = suite.draw(task.task, task.length, suite.context.config.trials)
    replies = server.each(lambda sample: server.reply(sample.ids, sample.room), drawn.samples, step)
    return [ruler_row(drawn, replies, server.model)], drawn.sha256, drawn.sources


def _perplexity(server: Server, suite: Any, task: EvalTask, step: Callable[[], None]) -> Measured:
    ids = suite.samples.ids[:, : task.length]
    losses = [torch.tensor(row, dtype=torch.float64) for row in server.each(server.losses, ids.tolist(), step)]
    return perplexity_rows(server.model, ids, losses), suite.samples.sha256, sources_of(suite.samples)


_MEASURES: Mapping[type[Suite], Callable[[Server, Any, EvalTask, Callable[[], None]], Measured]] = {
    PerplexitySuite: _perplexity,
    PasskeySuite: _passkeys,
    NeedleSuite: _needles,
    RulerSuite: _ruler,
}
"""The function that measures each suite on a server."""
