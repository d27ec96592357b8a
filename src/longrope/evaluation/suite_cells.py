"""Every cell of an evaluation, measured or taken from the log of a run that was stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from longrope.errors import LongRopeError
from longrope.evaluation.base import Entrant, Part, Suite
from longrope.evaluation.compare import Field
from longrope.evaluation.results import Cell, CellKey, CellLog
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.loading import LoadedModel
from longrope.rope.baselines import ORIGINAL, Method
from longrope.rope.scaling import RopeScaling


def measure(
    suites: Sequence[Suite],
    field: Field,
    original: LoadedModel | None,
    log: CellLog | None,
    on_start: Callable[[int], None],
    on_sample: Callable[[], None],
) -> list[Cell]:
    """All cells in the order of the results: by suite, contender and part, whatever order they were measured in.

    They are measured part by part, so that samples are made once and only those of one part exist. `original` is the
    model before it was extended, where it is another. Raises LongRopeError when a cell of the log was measured on other
    samples than are drawn now, or the log cannot be written.
    """
    done = {} if log is None else dict(log.cells)
    parts = [(suite, part) for suite in suites for part in suite.parts()]
    on_start(sum(part.steps * len(_contenders(suite, field)) for suite, part in parts))
    loaded = suites[0].material.loaded
    scaled = apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    try:
        before = scaled if original is None else apply_scaling(original.model, RopeScaling.original(original.geometry))
        for suite, part in parts:
            entrants = [(before if method.name == ORIGINAL else scaled, method) for method in _contenders(suite, field)]
            for cell in _measured(part, entrants, (before, field.original), done, on_sample):
                if log is not None:
                    log.append(cell)
                done[cell.key] = cell
    finally:
        remove_scaling(loaded.model)
        if original is not None:
            remove_scaling(original.model)
    return [
        done[_key(part, method)] for suite in suites for method in _contenders(suite, field) for part in suite.parts()
    ]


def _contenders(suite: Suite, field: Field) -> list[Method]:
    """The contenders of a suite: for short texts with the original model among them."""
    missing = suite.with_original and ORIGINAL not in (method.name for method in field.methods)
    return [*([field.original] if missing else []), *field.methods]


def _measured(
    part: Part,
    entrants: Sequence[Entrant],
    original: Entrant,
    done: dict[CellKey, Cell],
    on_sample: Callable[[], None],
) -> Iterator[Cell]:
    """The cells of a part that are not done yet."""
    missing = [entrant for entrant in entrants if _key(part, entrant[1]) not in done]
    for _ in range(part.steps * (len(entrants) - len(missing))):
        on_sample()
    if not missing:
        return
    prepared = part.prepare(original)
    for _, method in entrants:
        kept = done.get(_key(part, method))
        if kept is not None and kept.samples_sha256 != prepared.samples_sha256:
            raise LongRopeError(
                f"the cell of {method.name} that was kept of {part.suite} at {part.length} tokens was measured on "
                "other samples than are drawn now; choose another -o"
            )
    for scaled, method in missing:
        rows = prepared.measure(scaled, method, on_sample)
        yield Cell(_key(part, method), tuple(rows), prepared.samples_sha256, prepared.documents)


def _key(part: Part, method: Method) -> CellKey:
    return CellKey(method.name, part.suite, part.task, part.length)
