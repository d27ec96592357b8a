"""Recovery of short windows (LongRoPE, 2402.13753, §3.3): search again at short lengths on the extended model.

A model that was fine-tuned and stretched far loses quality inside its original window, because its factors are large
for short texts too. Factors are chosen by the length of the text at inference, so that short lengths can have factors
of their own, with less interpolation. In the output folder, `<length>/` holds an ordinary search run for each,
`scaling.json` the checkpoint's scaling with the windows that are better, and `recover.json` the gains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrope.callbacks import Callbacks
from longrope.data.sources import Field, TextData, TextSource, as_sources
from longrope.errors import LongRopeError
from longrope.locked import has_lines
from longrope.models.apply import kept_modes
from longrope.models.config import LoadOptions
from longrope.models.loading import LoadedModel, open_model
from longrope.models.texts import require_texts
from longrope.progress_log import LoggedProgress
from longrope.provenance import record
from longrope.rope.baselines import CHECKPOINT
from longrope.rope.scaling import RopeScaling, Window
from longrope.run_files import RECOVER_SUMMARY, SCALING, SEARCH_LOG
from longrope.search.config import SearchConfig
from longrope.search.initial import NONE
from longrope.search.replicas import processes_here
from longrope.search.run import NAMED, search
from longrope.search.spaces import UPPER_RATIO
from longrope.storage import check_output_folder, json_ready, keep_or_write_json, new_output_folder
from longrope.units import parse_lengths
from longrope.written import has_record, remove_own, sweep


@dataclass(frozen=True, slots=True)
class RecoveredLength:
    """One short length: losses in nats per token on its search samples, under different windows.

    `before`: the checkpoint's window for this length. `original`: the original RoPE. `found`: the best of the search
    with λ ≤ `max_factor`. `stored`: whether that is better than before, and so among the windows now.
    """

    length: int
    max_factor: float
    before: float
    original: float
    found: float
    stored: bool

    @property
    def after(self) -> float:
        """The loss under the scaling that recovery leaves."""
        return self.found if self.stored else self.before

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"after": self.after}


@dataclass(frozen=True)
class RecoveryResult:
    """The result of a recovery: a row for each length, shortest first, the scaling and its path."""

    rows: tuple[RecoveredLength, ...]
    scaling: RopeScaling
    path: Path

    def __repr__(self) -> str:
        rows = ", ".join(f"{row.length}: {row.before:.4f} to {row.after:.4f}" for row in self.rows)
        return f"RecoveryResult(losses=({rows}), path={str(self.path)!r})"

    def to_json(self) -> dict[str, Any]:
        return {"scaling": str(self.path), "lengths": [row.to_json() for row in self.rows]}


def recover_scaling(
    model: PreTrainedModel | LoadedModel | Path | str,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    *,
    lengths: int | str | Sequence[int | str],
    data: TextData = (),
    field: Field | None = None,
    config: SearchConfig | None = None,
    output_dir: Path | str,
    max_factor: float | None = None,
    resume: bool = False,
    workers: int | None = None,
    ray_address: str | None = None,
    context_parallel: int = 1,
    load: LoadOptions | None = None,
    callbacks: Callbacks | None = None,
) -> RopeScaling:
    """Search short windows inside the context length of an extended model again, where they have lost quality.

    `model`, whose checkpoint has a scaling, and the other arguments are those of `search_scaling`; `lengths` are ints
    or text such as "8k", the original window among them. `context_parallel` is the number of processes of each worker,
    and needs workers here. The result is the checkpoint's scaling with the windows that are better; `recover` says how
    they are searched.

    Raises LongRopeError for everything that the caller can mend; nothing that exists is overwritten.
    """
    folder, sources = Path(output_dir), as_sources(data, field)
    if processes_here(context_parallel, workers, ray_address) > 1:
        raise LongRopeError(
            f"`context_parallel` {context_parallel} shares the texts of a recovery in Ray workers: expected `workers`",
            code="invalid-setting",
        )
    resume = resume and bool(begun(folder))  # the same call begins and continues
    if not resume:
        check_output_folder(folder)
    require_texts(model, sources, "search", load)
    with kept_modes(model):
        return recover(
            open_model(model, tokenizer, load),
            parse_lengths(lengths),
            sources,
            folder,
            config,
            max_factor=max_factor,
            resume=resume,
            workers=workers,
            ray_address=ray_address,
            context_parallel=context_parallel,
            callbacks=callbacks,
        ).scaling


def recover(
    loaded: LoadedModel,
    lengths: Sequence[int],
    data: Sequence[TextSource],
    output_dir: Path,
    config: SearchConfig | None = None,
    *,
    max_factor: float | None = None,
    resume: bool = False,
    workers: int | None = None,
    ray_address: str | None = None,
    context_parallel: int = 1,
    callbacks: Callbacks | None = None,
) -> RecoveryResult:
    """Search factors λ ∈ [1, `max_factor`] for windows of `lengths` tokens inside the context length of `loaded`.

    The search (`config`; its method is `longrope`) starts from the original RoPE, the checkpoint's factors, and YaRN
    and NTK of small ratios; its attention factor is that of the checkpoint's window, or 1 where that is better. A
    window that does not improve the loss at its length is not stored, and the checkpoint's stays in force there.
    The weights stay as they are; nothing is trained.

    The paper lowers the largest λ for this search, short texts needing less interpolation, and gives no number (§3.3).
    `max_factor` is by default, for each length, 1.25·(max_length of the checkpoint's window that this length falls
    into)/L: the bound of Table 4 for the window that such texts use so far. So factors that the model was trained with
    lie inside the space, and those of windows that reach further, stretched without training, do not.

    `resume` goes on with an interrupted recovery in `output_dir`. Raises LongRopeError for everything that the caller
    can mend; nothing that exists is overwritten.
    """
    config, callbacks = config or SearchConfig(method="longrope"), callbacks or LoggedProgress()
    if config.method != "longrope":
        raise LongRopeError(
            f"a recovery searches by the method longrope only; found {config.method!r}",
            code="setting-of-another-method",
        )
    before, lengths = _checked(loaded, lengths)
    max_factor = config.max_factor if max_factor is None else max_factor
    bounds = {length: _default_bound(before, length) if max_factor is None else max_factor for length in lengths}
    configs = {length: config.replace(max_factor=bound) for length, bound in bounds.items()}
    _open(output_dir, lengths, resume)
    rows, windows, data_seen = [], {}, []
    for length in lengths:
        callbacks.on_recover_length(length)
        folder = output_dir / str(length)
        resumes = has_lines(folder / SEARCH_LOG)
        if not resumes and has_record(folder):
            remove_own(folder)
        found = search(
            loaded,
            length,
            data,
            folder,
            configs[length],
            resume=resumes,
            workers=workers,
            ray_address=ray_address,
            context_parallel=context_parallel,
            callbacks=callbacks,
            recovery=True,
        )
        losses = found.baselines[CHECKPOINT], found.baselines[NONE]
        better = not losses[0] <= found.best_loss  # a loss that is NaN is not worth keeping
        rows.append(RecoveredLength(length, bounds[length], *losses, found.best_loss, better))
        windows[length] = found.scaling.window_for(length) if better else before.window_for(length)
        data_seen.append(found.scaling.provenance["data"])
    made = [json_ready(row.to_json()) | {"data": seen} for row, seen in zip(rows, data_seen, strict=True)]
    scaling = _with_windows(before, windows).with_provenance(model=loaded.name, recovery=made)
    result = RecoveryResult(tuple(rows), scaling, output_dir / SCALING)
    # A finished recovery that is resumed comes to the same end.
    whole = json.loads(scaling.with_provenance(**record()).to_json())
    keep_or_write_json(result.path, whole, but=NAMED)
    summary = json_ready(result.to_json()) | {"options": config.model_dump()} | record()
    keep_or_write_json(output_dir / RECOVER_SUMMARY, summary, but=NAMED)
    return replace(result, scaling=RopeScaling.load(result.path))


def _checked(loaded: LoadedModel, lengths: Sequence[int]) -> tuple[RopeScaling, list[int]]:
    """The checkpoint's scaling, and the lengths, each once, shortest first."""
    scaling, original = loaded.checkpoint_scaling, loaded.geometry.original_length
    if scaling is None:
        raise LongRopeError(
            f"the checkpoint of {loaded.name} has no scaling, so it has no short windows to recover",
            code="invalid-setting",
        )
    lengths = sorted(set(lengths))
    if not lengths or lengths[0] < original or lengths[-1] >= loaded.context_length:
        raise LongRopeError(
            f"expected lengths to recover from {original} tokens on and below the model's window of "
            f"{loaded.context_length}, found {', '.join(map(str, lengths)) or 'none'}",
            code="invalid-setting",
        )
    return scaling, lengths


def _default_bound(scaling: RopeScaling, length: int) -> float:
    """Table 4's largest λ for the window that texts of `length` tokens have so far."""
    return UPPER_RATIO * scaling.window_for(length).max_length / scaling.geometry.original_length


def begun(output_dir: Path) -> set[str]:
    """The folders in `output_dir` whose search has begun."""
    return {path.parent.name for path in output_dir.glob(f"*/{SEARCH_LOG}") if has_lines(path)}


def _open(output_dir: Path, lengths: Sequence[int], resume: bool) -> None:
    """A new folder, or that of the recovery to go on with. Raises LongRopeError where that is another one."""
    if not resume:
        new_output_folder(output_dir)
        return
    found = begun(output_dir)
    if not found:
        raise LongRopeError(
            f"there is no recovery in {output_dir} to resume", code="not-resumable", hint="start without `resume=True`"
        )
    wanted = set(map(str, lengths))
    if found - wanted or ((output_dir / RECOVER_SUMMARY).exists() and found != wanted):
        raise LongRopeError(
            f"the recovery in {output_dir} is another one, of windows of {', '.join(sorted(found, key=int))} tokens",
            code="other-run",
            hint="use the same lengths or another `output_dir`",
        )
    sweep(output_dir, SCALING, RECOVER_SUMMARY)


def _with_windows(scaling: RopeScaling, windows: Mapping[int, Window]) -> RopeScaling:
    """`scaling` with `windows`, by length: each of them holds for texts of that length afterwards, and a window is
    added only where it differs from the one that held before."""
    for length in sorted(windows, reverse=True):
        window = replace(windows[length], max_length=length)
        if replace(scaling.window_for(length), max_length=length) != window:
            scaling = scaling.with_window(window)
    return scaling
