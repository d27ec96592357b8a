"""Search rescale factors for a model and a target length, and leave a run folder: scaling, log and summary.

`run/search.jsonl` is the log and the state; `run/scaling.json` the result; `run/search.json` the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longrope.data.needles import NeedleSamples, draw_needles
from longrope.data.samples import Samples
from longrope.data.sources import read_all
from longrope.data.tokens import tokenize
from longrope.errors import LongRopeError
from longrope.evaluation.contenders import CHECKPOINT
from longrope.files import json_ready, new_output_folder, write_json_atomic
from longrope.models.fingerprint import fingerprint
from longrope.models.install import install, uninstall
from longrope.objectives.needle import NeedleObjective
from longrope.objectives.perplexity import PerplexityObjective
from longrope.objectives.sampled import SampledObjective
from longrope.pipeline.subject import Subject, prepare_samples, require_longer, sources_or_books
from longrope.provenance import record
from longrope.rope.factors import CLOSED_FORMS, su_attention_factor, yarn_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.evaluators import CandidateSearch, SerialEvaluator
from longrope.search.evolution import Evolution, EvolutionSettings
from longrope.search.log import SearchLog
from longrope.search.run import Progress, run_search
from longrope.search.space import START_TOKENS, Candidate, SearchSpace

FAR = 512 * 1024  # tokens; the paper halves its budget beyond
METHODS = ("longrope",)
SEED_FORMS = ("pi", "ntk", "yarn")  # P₀ of Algorithm 1
LOG, SCALING, SUMMARY = "search.jsonl", "scaling.json", "search.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What a search can be told. The defaults are LongRoPE's: P = 64 on 5 texts, beyond 512k tokens P = 32 on 3.

    `objective`: `perplexity`, or `needle` (LongRoPE2's, on 10 texts by default) with its `needle_depth`: `spread`,
    `start`, or a number in [0, 1].

    `start_tokens`: `0` (portable: no runtime but ours can express others), a number, or `search` (the paper's set as a
    gene). `attention_factor`: `su`, `yarn`, or a number; 1 keeps short sequences exactly those of the original model.
    """

    method: str = "longrope"
    objective: str = "perplexity"
    needle_depth: str = "spread"
    population: int | None = None
    iterations: int = 40
    patience: int | None = None
    samples: int | None = None
    seed: int = 0
    start_tokens: str = "0"
    attention_factor: str = "1"


@dataclass(frozen=True)
class SearchResult:
    """The best scaling found and what it cost; `best_loss` and `baselines` in nats per token on the search samples.

    `token_passes` counts the tokens of all candidates evaluated, a forward once; the baselines' are not in it.
    """

    method: str
    best_loss: float
    evaluations: int
    token_passes: int
    baselines: dict[str, float]
    scaling: RopeScaling
    path: Path

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "best_loss": self.best_loss,
            "evaluations": self.evaluations,
            "token_passes": self.token_passes,
            "baselines": self.baselines,
            "scaling": str(self.path),
        }


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
    if options.method not in METHODS:
        raise LongRopeError(f"expected a search method of {', '.join(METHODS)}; found {options.method!r}")
    far = target_length > FAR
    settings = EvolutionSettings.for_population(
        options.population or (32 if far else 64),
        iterations=options.iterations,
        patience=options.patience,
        seed=options.seed,
    )
    attention_factor = attention_factor_of(options.attention_factor, geometry, target_length)
    ratio = target_length / geometry.original_length
    space = SearchSpace.for_ratio(geometry.pairs, ratio, start_tokens_of(options.start_tokens))
    sources = sources_or_books(subject.name, data, "search")
    samples = _samples(subject, sources, target_length, options)
    if not resume:
        new_output_folder(out)
    installed = install(subject.model, RopeScaling.original(geometry))
    try:
        objective: SampledObjective = (
            NeedleObjective(installed, samples)
            if isinstance(samples, NeedleSamples)
            else PerplexityObjective(installed, samples)
        )
        seeds = _seeds(subject, space, target_length)
        header = {
            "method": options.method,
            "target_length": target_length,
            "geometry": asdict(geometry),
            "model_fingerprint": fingerprint(subject.model),
            "objective": objective.name,
            "samples_sha256": samples.sha256,
            "attention_factor": attention_factor,
            "settings": asdict(settings),
            "space": asdict(space),
            "seeds": [[list(seed.steps), seed.start_tokens] for seed in seeds],
            "record": record() | {"threads": torch.get_num_threads()},
        }
        opened = SearchLog.resume if resume else SearchLog.create
        with opened(out / LOG, header) as log:
            baselines = _baselines(subject, objective, target_length)
            optimiser = Evolution(space, seeds, settings)
            on_start(settings.evaluations, baselines)

            def to_window(candidate: Candidate) -> Window:
                return candidate.window(target_length, attention_factor)

            evaluator = SerialEvaluator({("search", target_length): objective})
            found = CandidateSearch(optimiser, to_window)
            evaluations = len(run_search(found, evaluator, log, on_progress))
            best, best_loss = found.best
    finally:
        uninstall(subject.model)
    scaling = RopeScaling.extended(
        geometry, target_length, best.factors, best.start_tokens, attention_factor
    ).with_provenance(
        method=options.method,
        model=subject.name,
        options=asdict(options),
        search={key: value for key, value in header.items() if key != "record"},
        data=_data_provenance(samples),
        best_loss=best_loss,
        baselines=json_ready(baselines),
        evaluations=evaluations,
        **record(),
    )
    scaling.save(out / SCALING)
    result = SearchResult(
        options.method,
        best_loss,
        evaluations,
        evaluations * objective.token_passes,
        baselines,
        scaling,
        out / SCALING,
    )
    write_json_atomic(out / SUMMARY, json_ready(result.to_json()) | {"options": asdict(options), **record()})
    return result


def _samples(
    subject: Subject, sources: Sequence[str], target_length: int, options: SearchOptions
) -> Samples | NeedleSamples:
    """The texts that every candidate is scored on, for the objective that `options` name."""
    if options.objective == "perplexity":
        count = options.samples or (3 if target_length > FAR else 5)
        return prepare_samples(subject, sources, length=target_length, count=count, seed=options.seed)
    if options.objective == "needle":
        return draw_needles(
            tokenize(read_all(sources), subject.tokenizer),
            subject.tokenizer,
            length=target_length,
            count=options.samples or 10,
            seed=options.seed,
            depth=options.needle_depth,
        )
    raise LongRopeError(f"expected an objective of perplexity or needle; found {options.objective!r}")


def attention_factor_of(text: str, geometry: RopeGeometry, target_length: int) -> float:
    """The attention factor that `su`, `yarn` or a number names. Raises LongRopeError for anything else."""
    named = {"su": su_attention_factor, "yarn": yarn_attention_factor}
    if text in named:
        return named[text](geometry, target_length)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise LongRopeError(f"expected an attention factor of su, yarn or a positive number; found {text!r}")
    return value


def start_tokens_of(text: str) -> tuple[int, ...]:
    """The choices of n̂ that `search` or a number names. Raises LongRopeError for anything else."""
    if text == "search":
        return START_TOKENS
    if text.isdecimal():
        return (int(text),)
    raise LongRopeError(f"expected start tokens of 'search' or a number of tokens, found {text!r}")


def _seeds(subject: Subject, space: SearchSpace, target_length: int) -> list[Candidate]:
    """P₀'s closed forms (PI, NTK, YaRN) on the grid, and the scaling that the checkpoint carries."""
    seeds = [space.snap(CLOSED_FORMS[name](subject.geometry, target_length)[0]) for name in SEED_FORMS]
    if subject.existing is not None:
        seeds.append(space.snap(subject.existing.windows[-1].factors))
    return seeds


def _baselines(subject: Subject, objective: SampledObjective, target_length: int) -> dict[str, float]:
    """The loss of every closed form, with its own attention factor, and of the scaling the checkpoint carries."""
    losses = {}
    for name, form in CLOSED_FORMS.items():
        factors, attention_factor = form(subject.geometry, target_length)
        losses[name] = objective.loss(Window(target_length, tuple(factors.tolist()), 0, attention_factor))
    if subject.existing is not None:
        window = subject.existing.windows[-1]
        losses[CHECKPOINT] = objective.loss(window)
    return losses


def _data_provenance(samples: Samples | NeedleSamples) -> dict[str, Any]:
    return {
        "samples_sha256": samples.sha256,
        "document_sha256": list(samples.document_hashes),
        "samples": [asdict(row) for row in samples.rows],
    }
