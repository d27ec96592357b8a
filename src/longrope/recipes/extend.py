"""`extend`: for one model, search, compare on other books, export, reload the checkpoint, prove it, and report.

The run folder holds everything: `search.jsonl`, `scaling.json`, `search.json`, `eval.json`, `checkpoint/`,
`extend.json`, the figures in `report_figures/`, and at the end `report.html`. For a model from a GGUF file, the file
with the factors is in place of `checkpoint/`, proved in llama.cpp (`extend_gguf.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longrope.callbacks import Callbacks
from longrope.data.samples import require_disjoint
from longrope.data.sources import Field, TextSource, as_sources, read_all
from longrope.errors import LongRopeError
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.perplexity import check_lengths
from longrope.evaluation.results import OWN, EvalResults
from longrope.evaluation.run import evaluate, log_path
from longrope.export.config import ExportConfig
from longrope.export.hf import export_hf
from longrope.locked import has_lines
from longrope.models.apply import scaled
from longrope.models.config import LoadOptions
from longrope.models.devices import AUTO, device_of, is_spread, moved_to_cpu
from longrope.models.loading import LoadedModel, load_model
from longrope.models.scoring import last_logits
from longrope.models.targets import require_longer
from longrope.models.texts import prepare_samples, require_all_texts, sources_or_books
from longrope.provenance import CIRCUMSTANCES, finished, record
from longrope.recipes.costs import StepCost, extension_costs, measure_rates
from longrope.recipes.extend_gguf import check_file, export_file, extended_file, prove_file
from longrope.report.collect import Proof
from longrope.report.run import Written, report
from longrope.rope.baselines import CHECKPOINT
from longrope.rope.closed_forms import CLOSED_FORMS
from longrope.rope.hf_config import refuse_unsupported, transformers_scaling, unsupported_by_transformers
from longrope.rope.scaling import RopeScaling
from longrope.run_files import CHECKPOINT as CHECKPOINT_DIR
from longrope.run_files import EVALUATION, EXTENSION, REPORT
from longrope.search.config import RayOptions, SearchConfig
from longrope.search.run import SearchResult, search
from longrope.search.windows import extended_by, kept_windows
from longrope.storage import json_ready, keep_or_write_json, refuse_links
from longrope.units import doubling_lengths, parse_length, parse_lengths
from longrope.written import sweep, sweep_links

PROOF_POSITIONS = 1024  # how many logits of a text the proof compares: all positions at L' would not fit anywhere


@dataclass(frozen=True)
class Extension:
    """The results of a run of `extend`: search, comparison, checkpoint, proofs and report."""

    search: SearchResult
    evaluation: EvalResults
    checkpoint: Path
    losses: list[str]
    proofs: list[Proof]
    report: Written


STAGES = ("search", "compare", "export", "prove", "report")


@dataclass(frozen=True, kw_only=True)
class PreparedExtension:
    """A run of `extend` whose settings and texts were checked, before anything is computed or written."""

    loaded: LoadedModel
    target_length: int
    output_dir: Path
    lengths: Sequence[int]
    """The lengths of the comparison, in tokens."""
    search_data: Sequence[TextSource | str]
    evaluation_data: Sequence[TextSource | str]
    evaluation_samples: int
    proof_ids: Tensor
    """(1, L'): the text that the proof compares logits on."""
    config: SearchConfig
    ray: RayOptions
    allow_lossy: bool
    resume: bool

    def costs(self) -> list[StepCost]:
        """The costs of the stages that take long, at the rate that two short texts are scored with here, now."""
        methods, rates = len(_baselines(self.loaded)) + 1, measure_rates(self.loaded)
        return extension_costs(
            self.loaded, self.target_length, self.config, self.lengths, self.evaluation_samples, methods, rates
        )

    def run(self, callbacks: Callbacks | None = None) -> Extension:
        """Search, compare, export, prove, report. Raises LongRopeError for faults that the user can mend."""
        started, callbacks = time.perf_counter(), callbacks or Callbacks()
        loaded, output_dir, config = self.loaded, self.output_dir, self.config
        _begin(callbacks, "search")
        found = search(
            loaded,
            self.target_length,
            self.search_data,
            output_dir,
            config,
            resume=self.resume,
            **self.ray.model_dump(),
            callbacks=callbacks,
        )
        # The saved scaling is measured and exported: resuming does not save it again.
        found = replace(found, scaling=RopeScaling.load(found.path))
        _begin(callbacks, "compare")
        evaluation = evaluate(
            loaded,
            data=self.evaluation_data,
            lengths=self.lengths,
            scaling=found.scaling,
            scaling_name=OWN,
            baselines=_baselines(loaded),
            config=EvalConfig(samples=self.evaluation_samples),
            seed=config.seed,
            output=output_dir / EVALUATION,
            resume=has_lines(log_path(output_dir / EVALUATION)),
            callbacks=callbacks,
        )
        _begin(callbacks, "export")
        file = extended_file(loaded, self.target_length, output_dir)
        sweep(output_dir, EXTENSION, *([] if file is None else [file.name]))
        checkpoint = output_dir / CHECKPOINT_DIR if file is None else file
        if file is not None:
            export_file(loaded, found.scaling, file, self.allow_lossy)
        elif (checkpoint / "config.json").exists():  # written last: with it, a run that was stopped had exported
            sweep(checkpoint)
        else:
            export_hf(
                loaded.name,
                found.scaling,
                checkpoint,
                ExportConfig(allow_lossy=self.allow_lossy),
                evidence=list(evaluation.rows),
                original_length=loaded.geometry.original_length,
                trust_remote_code=loaded.options.trust_remote_code,
            )
        _begin(callbacks, "prove")
        proofs = (prove if file is None else prove_file)(loaded, found.scaling, checkpoint, self.proof_ids)
        losses = unsupported_by_transformers(found.scaling)
        proved = {"checkpoint": str(checkpoint), "losses": losses, "proofs": [asdict(proof) for proof in proofs]}
        last_bits = {"max_logit_difference", "top1_agreement", "divergence", "divergence_without"}  # of a GPU
        but = CIRCUMSTANCES | last_bits | {"scaling", "checkpoint"}
        whole = json_ready(found.to_json()) | proved | record() | finished(started)
        keep_or_write_json(output_dir / EXTENSION, whole, but=but)
        _begin(callbacks, "report")
        written = report([output_dir], output_dir / REPORT)
        return Extension(found, evaluation, checkpoint, losses, proofs, written)


def extend(
    loaded: LoadedModel,
    target_length: int | str | None,
    output_dir: Path,
    *,
    callbacks: Callbacks | None = None,
    **settings: Any,
) -> Extension:
    """Extend `loaded` to `target_length` tokens without training, and prove it; everything goes to `output_dir`.

    `settings`: the other arguments of `prepare_extension`. Raises LongRopeError for faults that the user can mend.
    """
    return prepare_extension(loaded, target_length, output_dir, **settings).run(callbacks)


def check_data(
    model: str,
    search_data: Sequence[str],
    evaluation_data: Sequence[str],
    field: Field | None,
    load: LoadOptions | None = None,
) -> tuple[list[TextSource | str], list[TextSource | str]]:
    """The sources of the search and of the comparison; of an embedded model, its books where none are given.

    Raises LongRopeError, naming the argument, where a model has no texts. It reads no weights and no texts.
    """
    own = field if search_data or not evaluation_data else None
    given = {
        "search": (as_sources(search_data, own), "search_data"),
        "evaluation": (as_sources(evaluation_data, field if evaluation_data else None), "evaluation_data"),
    }
    require_all_texts(model, given, load)
    of_search, of_evaluation = (sources_or_books(model, sources, role) for role, (sources, _) in given.items())
    return of_search, of_evaluation


def prepare_extension(
    loaded: LoadedModel,
    target_length: int | str | None,
    output_dir: Path,
    *,
    search_data: Sequence[str] = (),
    evaluation_data: Sequence[str] = (),
    field: Field | None = None,
    lengths: Sequence[int | str] | str | None = None,
    evaluation_samples: int = 10,
    config: SearchConfig | None = None,
    ray: RayOptions | None = None,
    allow_lossy: bool = False,
    resume: bool = False,
) -> PreparedExtension:
    """Check everything that a run of `extend` needs, its later stages too: an error after a long search wastes it.

    `target_length`: by default 8 L. `field`: where the rows of both data have their text. `lengths` are those of the
    comparison (default: L, 2L, … L'). `ray`: the workers that compute the search. `resume` goes on where a run of the
    same command was stopped. Raises LongRopeError for faults that the user can mend.
    """
    config = config or SearchConfig()
    target_length, compared = _lengths(loaded, target_length, lengths)
    check_file(loaded)
    if config.start_tokens != "0" and not allow_lossy:
        raise LongRopeError(
            "transformers cannot express start tokens",
            code="not-expressible",
            hint="give `allow_lossy=True`, or leave `start_tokens` at 0",
        )
    kept = kept_windows(loaded)
    if kept is not None and not allow_lossy:
        wanted = replace(kept.windows[-1], max_length=target_length)  # its factors do not matter here
        lost = unsupported_by_transformers(extended_by(loaded, kept, wanted))
        refuse_unsupported(lost, "transformers", "give `allow_lossy=True` to export the rest")
    search_sources, evaluation_sources = check_data(loaded.name, search_data, evaluation_data, field, loaded.options)
    held_out = read_all(evaluation_sources, tokenizer=loaded.tokenizer)
    searched = read_all(search_sources, tokenizer=loaded.tokenizer)
    require_disjoint([document.sha256 for document in searched], held_out)
    text = prepare_samples(loaded, held_out, length=target_length, count=evaluation_samples, seed=config.seed)
    if (output_dir / REPORT).exists():  # written last
        sweep_links(output_dir)
        raise LongRopeError(
            f"the run in '{output_dir}' is finished, its report is {output_dir / REPORT}; nothing is overwritten",
            code="output-exists",
            hint="choose another `output_dir`",
        )
    refuse_links(output_dir / CHECKPOINT_DIR)
    return PreparedExtension(
        loaded=loaded,
        target_length=target_length,
        output_dir=output_dir,
        lengths=compared,
        search_data=search_sources,
        evaluation_data=evaluation_sources,
        evaluation_samples=evaluation_samples,
        proof_ids=text.ids[:1],
        config=config,
        ray=ray or RayOptions(),
        allow_lossy=allow_lossy,
        resume=resume,
    )


def _lengths(
    loaded: LoadedModel, target_length: int | str | None, lengths: Sequence[int | str] | str | None
) -> tuple[int, list[int]]:
    """The target length and those of the comparison, by default L, 2L, … L'."""
    original = loaded.geometry.original_length
    target = 8 * original if target_length is None else parse_length(target_length)
    require_longer(loaded, target)
    compared = parse_lengths(lengths) if lengths is not None else doubling_lengths(original, target)
    check_lengths(compared, target, None)
    return target, compared


def _baselines(loaded: LoadedModel) -> list[str]:
    return [*CLOSED_FORMS, *([CHECKPOINT] if loaded.checkpoint_scaling is not None else [])]


def _begin(callbacks: Callbacks, stage: str) -> None:
    callbacks.on_stage(stage, STAGES.index(stage) + 1, len(STAGES))


def prove(loaded: LoadedModel, scaling: RopeScaling, checkpoint: Path, ids: Tensor) -> list[Proof]:
    """Logits of the reloaded checkpoint against the searched model's, inside the first window and at L'.

    `ids` (1, L') is one text. Raises LongRopeError when the most likely next token differs at more than 1 position in
    1,000 (1 in 20 in bfloat16 or float16, where near ties fall either way).
    """
    model, options = loaded.model, loaded.options
    allowed = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    expressed = transformers_scaling(scaling)
    lengths = [window.max_length for window in expressed.windows]
    with scaled(model, expressed):
        ours = [_last_logits(model, ids[:, :length]) for length in lengths]
    device = AUTO if is_spread(model) else str(model.device)
    with moved_to_cpu(model):  # room for the second copy
        reloaded = load_model(
            str(checkpoint),
            dtype=str(model.dtype).removeprefix("torch."),
            device=device,
            attn_implementation=model.config._attn_implementation,
            trust_remote_code=options.trust_remote_code,
        )
        theirs = [_last_logits(reloaded, ids[:, :length]) for length in lengths]
    proofs = []
    for length, mine, other in zip(lengths, ours, theirs, strict=True):
        agreement = float((mine.argmax(-1) == other.argmax(-1)).double().mean())
        proofs.append(Proof(length, mine.shape[1], float((mine - other).abs().max()), agreement))
        if 1.0 - agreement > allowed:
            raise LongRopeError(
                f"the reloaded checkpoint at {checkpoint} does not give the searched model's logits: "
                f"top-1 agreement {agreement:.4f} at {length} tokens"
            )
    return proofs


def _last_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return last_logits(model, ids.to(device_of(model)), min(PROOF_POSITIONS, ids.shape[1])).float().cpu()


def summary(extension: Extension) -> dict[str, Any]:
    """The object that `longrope extend --json` prints."""
    return {
        **json_ready(extension.search.to_json()),
        "results": extension.evaluation.to_json()["results"],
        "checkpoint": str(extension.checkpoint),
        "losses": extension.losses,
        "proofs": [asdict(proof) for proof in extension.proofs],
        "report": str(extension.report.html),
        "figures": [str(path) for path in extension.report.figures],
    }
