"""Which windows a recovery stores, and that texts of all other lengths keep what they had. Searches are pretended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longrope.evaluation.held_out import seen_documents
from longrope.models.loading import LoadedModel
from longrope.rope.scaling import Window
from longrope.search import recover as module
from longrope.search.recover import recover
from tests.checkpoints import WINDOW
from tests.search.extended import REACH, TRAINED, carried_by, extended_from


@pytest.fixture(scope="module")
def extended(loaded: LoadedModel) -> LoadedModel:
    return extended_from(loaded)


def pretending(monkeypatch: pytest.MonkeyPatch, found: dict[int, tuple[float, float]]) -> None:
    """Searches that end at once: loss before and after, by length."""

    def ends(loaded: LoadedModel, length: int, *_: Any, **__: Any) -> Any:
        before, after = found[length]
        window = Window(length, (1.0 + length / 1024,) * 16, attention_factor=1.1)
        scaling = carried_by(loaded).with_window(window).with_provenance(data={"document_sha256": ["a" * 64]})

        baselines = {"checkpoint": before, "none": 9.0}
        return SimpleNamespace(baselines=baselines, best_loss=after, scaling=scaling)

    monkeypatch.setattr(module, "search", ends)


@pytest.mark.parametrize(
    ("found", "lengths", "stored"),
    [
        ({64: (2.0, 1.0), 128: (2.0, 1.0)}, [64, 128, TRAINED, REACH], [64, 128]),
        ({64: (2.0, 1.0), 128: (1.0, 1.0)}, [64, TRAINED, REACH], [64]),
        ({64: (1.0, 2.0), 128: (1.0, 1.0)}, [TRAINED, REACH], []),
        # Texts of up to 64 tokens keep what they had, although those of up to 128 now have a window of their own.
        ({64: (1.0, 2.0), 128: (2.0, 1.0)}, [64, 128, TRAINED, REACH], [128]),
        ({64: (float("nan"), 2.0)}, [64, TRAINED, REACH], [64]),
    ],
)
def test_only_what_is_better_is_stored(
    extended: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    found: dict[int, tuple[float, float]],
    lengths: list[int],
    stored: list[int],
) -> None:
    pretending(monkeypatch, found)
    left = recover(extended, list(found), [], tmp_path / "run")
    assert [window.max_length for window in left.scaling.windows] == lengths
    assert [row.length for row in left.rows if row.stored] == stored
    before = carried_by(extended)
    for length in found:
        window = left.scaling.window_for(length)
        if length in stored:
            assert window.factors == (1.0 + length / 1024,) * 16
        else:
            assert replace(window, max_length=1) == replace(before.window_for(length), max_length=1)
    for length in (129, TRAINED, TRAINED + 1, REACH):
        assert left.scaling.window_for(length) == before.window_for(length)
    assert set(seen_documents(left.scaling)) == {"a" * 64, "e" * 64}


def test_a_window_of_the_same_length_is_replaced(
    extended: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = replace(extended, checkpoint_scaling=carried_by(extended).with_window(Window(WINDOW, (1.0,) * 16)))
    pretending(monkeypatch, {WINDOW: (2.0, 1.0)})
    left = recover(mixed, [WINDOW], [], tmp_path / "run").scaling
    assert [window.max_length for window in left.windows] == [WINDOW, TRAINED, REACH]
    assert left.windows[0].factors == (1.0625,) * 16
