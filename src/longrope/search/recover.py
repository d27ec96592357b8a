"""Recovery of short windows (LongRoPE, 2402.13753, §3.3): search again at short lengths on the extended model.

A model that was fine-tuned and stretched far pays inside its original window: all factors are large there, too. At
inference the factors are chosen by the length of the text, so short lengths may have factors of their own, with less
interpolation. `out/<length>/` holds an ordinary search run for each, `out/scaling.json` the carried scaling with the
windows that are better, and `out/recover.json` what each gained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longrope.data.sources import TextSource
from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.provenance import record
from longrope.rope.baselines import CHECKPOINT
from longrope.rope.scaling import RopeScaling, Window
from longrope.run_files import RECOVER_SUMMARY, SCALING, SEARCH_LOG
from longrope.search.config import SearchConfig
from longrope.search.initial import NONE
from longrope.search.loop import Progress
from longrope.search.run import search_window
from longrope.search.spaces import UPPER_RATIO
from longrope.storage import json_ready, new_output_folder, write_json_atomic


@dataclass(frozen=True, slots=True)
class Recovered:
    """One short length: losses in nats per token on its search samples, under different windows.

    `before`: what the subject carried for this length. `original`: its original RoPE. `found`: the best of the search
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
class Recovery:
    """What recovery left: a row for each length, shortest first, the scaling and its path."""

    rows: tuple[Recovered, ...]
    scaling: RopeScaling
    path: Path

    def to_json(self) -> dict[str, Any]:
        return {"scaling": str(self.path), "lengths": [row.to_json() for row in self.rows]}


@dataclass(frozen=True, slots=True)
class Listener:
    """What a display wants to hear: the length that is searched now, and what `search` says of it."""

    on_length: Callable[[int], None] = lambda _: None
    on_start: Callable[[int, dict[str, float]], None] = lambda *_: None
    on_progress: Callable[[Progress], None] = lambda _: None


def recover(
    loaded: LoadedModel,
    lengths: Sequence[int],
    data: Sequence[TextSource],
    out: Path,
    options: SearchConfig | None = None,
    *,
    max_factor: float | None = None,
    resume: bool = False,
    workers: int | None = None,
    ray_address: str | None = None,
    listener: Listener | None = None,
) -> Recovery:
    """Search factors λ ∈ [1, `max_factor`] for windows of `lengths` tokens inside what `loaded` reaches.

    The search (`options`; its method is `longrope`) starts from the original RoPE, the factors the subject carries, and
    YaRN and NTK of small ratios; its attention factor is that of the carried window, or 1 where that is better. A
    window that does not improve the loss at its length is not stored, and what the carried scaling does there stays.
    The model has its weights as they are; nothing is trained.

    The paper lowers the largest λ for this search, short texts needing less interpolation, and gives no number (§3.3).
    `max_factor` is by default, for each length, 1.25·(max_length of the carried window that this length falls into)/L:
    the bound of Table 4 for the window that such texts use so far. So factors that the model was trained with lie
    inside the space, and those of windows that reach further, stretched without training, do not.

    `resume` goes on with an interrupted recovery in `out`. Raises LongRopeError for what the user can mend; nothing
    that exists is overwritten.
    """
    options, listener = options or SearchConfig(), listener or Listener()
    if options.method != "longrope":
        raise LongRopeError(f"a recovery searches by the method longrope only; found {options.method!r}")
    carried, lengths = _checked(loaded, lengths)
    max_factor = options.max_factor if max_factor is None else max_factor
    bounds = {length: _default_bound(carried, length) if max_factor is None else max_factor for length in lengths}
    searches = {length: options.replace(max_factor=bound) for length, bound in bounds.items()}
    _open(out, lengths, resume)
    rows, windows, data_seen = [], {}, []
    for length, bounded in searches.items():
        listener.on_length(length)
        folder = out / str(length)
        found = search_window(
            loaded,
            length,
            data,
            folder,
            bounded,
            resume=(folder / SEARCH_LOG).exists(),
            workers=workers,
            ray_address=ray_address,
            on_start=listener.on_start,
            on_progress=listener.on_progress,
        )
        before, original = found.baselines[CHECKPOINT], found.baselines[NONE]
        better = not before <= found.best_loss  # a loss that is no number is not worth keeping
        rows.append(Recovered(length, bounds[length], before, original, found.best_loss, better))
        windows[length] = found.scaling.window_for(length) if better else carried.window_for(length)
        data_seen.append(found.scaling.provenance["data"])
    made = [json_ready(row.to_json()) | {"data": seen} for row, seen in zip(rows, data_seen, strict=True)]
    scaling = _with_windows(carried, windows).with_provenance(model=loaded.name, recovery=made)
    result = Recovery(tuple(rows), scaling, out / SCALING)
    if not (out / RECOVER_SUMMARY).exists():  # a finished recovery that is resumed comes to the same end
        scaling.with_provenance(**record()).save(result.path)
        write_json_atomic(
            out / RECOVER_SUMMARY, json_ready(result.to_json()) | {"options": options.model_dump()} | record()
        )
    return replace(result, scaling=RopeScaling.load(result.path))


def _checked(loaded: LoadedModel, lengths: Sequence[int]) -> tuple[RopeScaling, list[int]]:
    """The carried scaling, and the lengths, each once, shortest first."""
    carried, original = loaded.checkpoint_scaling, loaded.geometry.original_length
    if carried is None:
        raise LongRopeError(f"{loaded.name} carries no scaling: there are no short windows to recover")
    lengths = sorted(set(lengths))
    if not lengths or lengths[0] < original or lengths[-1] >= loaded.context_length:
        raise LongRopeError(
            f"expected lengths to recover from {original} tokens on and below the model's window of "
            f"{loaded.context_length}, "
            f"found {', '.join(map(str, lengths)) or 'none'}"
        )
    return carried, lengths


def _default_bound(carried: RopeScaling, length: int) -> float:
    """Table 4's largest λ for the window that texts of `length` tokens have so far."""
    return UPPER_RATIO * carried.window_for(length).max_length / carried.geometry.original_length


def _open(out: Path, lengths: Sequence[int], resume: bool) -> None:
    """A new folder, or that of the recovery to go on with. Raises LongRopeError where that is another one."""
    if not resume:
        new_output_folder(out)
        return
    begun = {path.parent.name for path in out.glob(f"*/{SEARCH_LOG}")}
    if not begun:
        raise LongRopeError(f"there is no recovery in {out} to resume; start without resuming")
    wanted = set(map(str, lengths))
    if begun - wanted or ((out / RECOVER_SUMMARY).exists() and begun != wanted):
        raise LongRopeError(
            f"the recovery in {out} is another one, of windows of {', '.join(sorted(begun, key=int))} tokens; use the "
            "same lengths or another folder"
        )


def _with_windows(carried: RopeScaling, windows: Mapping[int, Window]) -> RopeScaling:
    """`carried` with `windows`, by length: each of them holds for texts of that length afterwards, and only where it
    differs from what held before is a window added."""
    scaling = carried
    for length in sorted(windows, reverse=True):
        window = replace(windows[length], max_length=length)
        if replace(scaling.window_for(length), max_length=length) != window:
            scaling = scaling.with_window(window)
    return scaling
