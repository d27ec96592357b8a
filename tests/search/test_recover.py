"""Recovery of short windows: what is searched, what it leaves, that it resumes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longrope.callbacks import Callbacks, SearchProgress
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.loading import LoadedModel
from longrope.rope.closed_forms import yarn, yarn_linear
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.config import SearchConfig
from longrope.search.initial import baselines, evolution_seeds
from longrope.search.objective import PerplexityObjective, SampledObjective
from longrope.search.recover import RecoveredLength, RecoveryResult, recover, recover_scaling
from longrope.search.run import search
from longrope.search.search_data import prepare_texts
from tests.checkpoints import WINDOW
from tests.search.extended import REACH, TRAINED, M, carried_by, extended_from

FEW = SearchConfig(method="longrope", population=12, iterations=1, samples=2)


@pytest.fixture(scope="module")
def extended(loaded: LoadedModel) -> LoadedModel:
    return extended_from(loaded)


@pytest.fixture(scope="module")
def recovered(
    extended: LoadedModel, source: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RecoveryResult, Path]:
    out = tmp_path_factory.mktemp("recover") / "run"
    return recover(extended, [2 * WINDOW, WINDOW], source, out, FEW), out


def test_what_a_recovery_leaves(recovered: tuple[RecoveryResult, Path], extended: LoadedModel) -> None:
    found, out = recovered
    assert sorted(path.name for path in out.iterdir()) == ["128", "64", "recover.json", "scaling.json"]
    assert [row.length for row in found.rows] == [WINDOW, 2 * WINDOW]
    for row in found.rows:
        assert row.stored == (row.found < row.before)
        assert row.after == min(row.found, row.before)
        assert row.max_factor == 1.25 * 8
    assert all(row.stored for row in found.rows)  # positions squeezed eightfold are not what the weights know
    assert RopeScaling.load(out / "scaling.json") == found.scaling
    assert [window.max_length for window in found.scaling.windows] == [WINDOW, 2 * WINDOW, TRAINED, REACH]
    assert found.scaling.windows[2:] == carried_by(extended).windows
    summary = json.loads((out / "recover.json").read_text())
    assert summary["lengths"] == [row.to_json() for row in found.rows]
    assert {"before", "original", "found", "after", "stored", "max_factor"} < summary["lengths"][0].keys()
    assert {"versions", "options"} < summary.keys()


def test_the_losses_are_those_of_the_windows(
    recovered: tuple[RecoveryResult, Path], extended: LoadedModel, source: list[str]
) -> None:
    """Asked again of the model, on the same samples."""
    found, _ = recovered
    before, original = carried_by(extended), RopeScaling.original(extended.geometry)
    scaled = apply_scaling(extended.model, original)
    try:
        for row in found.rows:
            (samples,) = prepare_texts(extended, source, row.length, FEW).values()
            objective = PerplexityObjective(scaled, samples)  # type: ignore[arg-type]
            under = [
                objective.loss(replace(scaling.window_for(WINDOW), max_length=row.length))
                for scaling in (before, original)
            ]
            assert under == [row.before, row.original]
            assert objective.loss(found.scaling.window_for(row.length)) == row.after
    finally:
        remove_scaling(extended.model)


def test_each_length_is_an_ordinary_search(recovered: tuple[RecoveryResult, Path]) -> None:
    found, out = recovered
    for row in found.rows:
        summary = json.loads((out / str(row.length) / "search.json").read_text())
        assert (summary["best_loss"], summary["options"]["max_factor"]) == (row.found, 10.0)
        lines = (out / str(row.length) / "search.jsonl").read_text().splitlines()
        header, asked = json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
        assert header["settings"]["space"]["upper"] == 10.0
        steps = np.array([entry["steps"] for entry in asked if "steps" in entry])
        assert steps.min() == 100
        assert steps.max() <= 1000
        assert (np.diff(steps, axis=1) >= 0).all()


def test_what_it_starts_from(extended: LoadedModel) -> None:
    """The original RoPE, the checkpoint's factors (those for this length first), YaRN and NTK of small ratios."""
    seeds = [seed.tolist() for seed, _ in evolution_seeds(extended, 2 * WINDOW)]
    trained, far = (list(window.factors) for window in carried_by(extended).windows)
    assert seeds[:3] == [[1.0] * 16, trained, far]
    assert seeds[3] == yarn(extended.geometry, 2 * WINDOW).tolist()
    assert [max(seed) for seed in seeds[3:]] == pytest.approx([2, 2, 2, 2, 4, 4])
    betas: dict[str, Any] = {"beta_fast": 4.0, "beta_slow": 2.0}
    chosen = SearchConfig(method="longrope", yarn_ramp="authors", **betas)
    ramps = [seed.tolist() for seed, _ in evolution_seeds(extended, 2 * WINDOW, chosen)[3::2]]
    assert ramps == [yarn_linear(extended.geometry, ratio * WINDOW, **betas).tolist() for ratio in (2, 2, 4)]
    other = replace(extended, checkpoint_scaling=carried_by(extended).with_window(Window(WINDOW, (1.5,) * 16)))
    assert [seed[0] for seed, _ in evolution_seeds(other, WINDOW)[:3]] == [1.0, 1.5, trained[0]]
    assert [seed[0] for seed, _ in evolution_seeds(other, 2 * WINDOW)[:3]] == [1.0, trained[0], 1.5]


def test_what_it_is_held_against(extended: LoadedModel) -> None:
    """At L every closed form is the original RoPE; there is nothing to stretch inside the reach."""
    assert list(baselines(extended, WINDOW)) == ["none", "checkpoint"]
    assert baselines(extended, WINDOW)["none"].is_identity
    assert list(baselines(extended, 2 * WINDOW))[-1] == "checkpoint"
    assert baselines(extended, 2 * WINDOW)["checkpoint"].factors == carried_by(extended).windows[0].factors


def test_the_attention_factor_is_the_carried_one_or_1(
    recovered: tuple[RecoveryResult, Path], extended: LoadedModel, source: list[str], tmp_path: Path
) -> None:
    """A random model does not like its logits doubled: 1 is found, and only where none was asked for."""
    found, out = recovered
    for row in found.rows:
        entries = [json.loads(line) for line in (out / str(row.length) / "search.jsonl").read_text().splitlines()[1:]]
        losses = {entry["baseline"]: entry["loss"] for entry in entries if "baseline" in entry}
        searched = min(entry["loss"] for entry in entries if "steps" in entry)
        with_one = losses["found, attention factor 1"]
        assert row.found == min(searched, with_one, losses["none"])
        window = found.scaling.window_for(row.length)
        assert window.attention_factor == (M if searched <= min(with_one, losses["none"]) else 1.0)
    given = recover(extended, [WINDOW], source, tmp_path / "given", FEW.replace(attention_factor="1.1"))
    assert given.scaling.windows[0].attention_factor == 1.1
    assert "found, attention factor 1" not in (tmp_path / "given/64/search.jsonl").read_text()


@pytest.mark.parametrize(
    ("with_m", "with_1", "original", "expected"),
    [(1.0, 2.0, 2.0, ("found", M)), (2.0, 1.0, 2.0, ("found", 1.0)), (2.0, 2.0, 1.0, ("original", 1.0))],
)
def test_the_outer_choice(
    extended: LoadedModel,
    source: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_m: float,
    with_1: float,
    original: float,
    expected: tuple[str, float],
) -> None:
    """The factors found with the checkpoint's attention factor, the same with 1, or the original RoPE."""

    def loss(_: Any, window: Window, samples: object = None) -> float:
        if set(window.factors) == {1.0}:
            return original if window.attention_factor == 1.0 else 9.0
        return (with_1 if window.attention_factor == 1.0 else with_m) - window.factors[-1] / 1000

    monkeypatch.setattr(SampledObjective, "loss", loss)
    found = recover(extended, [WINDOW], source, tmp_path / "run", FEW)
    window = found.scaling.windows[0]
    kind = "original" if set(window.factors) == {1.0} else "found"
    assert (kind, window.attention_factor) == expected
    assert found.rows[0].found == loss(None, window)


@pytest.mark.parametrize(("bound", "most"), [(1.0, 1.0), (1.5, 1.5), (None, 10.0)])
def test_the_largest_factor(
    extended: LoadedModel, source: list[str], tmp_path: Path, bound: float | None, most: float
) -> None:
    options = SearchConfig(method="longrope", population=12, iterations=2, samples=1)
    found = recover(extended, [WINDOW], source, tmp_path / "run", options, max_factor=bound)
    assert found.rows[0].max_factor == most
    window = RopeScaling.load(tmp_path / "run/64/scaling.json").window_for(WINDOW)
    assert max(window.factors) <= most
    through_options = options.replace(max_factor=bound)
    assert recover(extended, [WINDOW], source, tmp_path / "again", through_options).rows == found.rows


def test_the_default_bound_is_that_of_the_window_a_length_falls_into(
    extended: LoadedModel, source: list[str], tmp_path: Path
) -> None:
    mixed = replace(extended, checkpoint_scaling=carried_by(extended).with_window(Window(WINDOW, (1.0,) * 16)))
    found = recover(mixed, [WINDOW, 2 * WINDOW], source, tmp_path / "run", FEW.replace(population=2, iterations=0))
    assert [row.max_factor for row in found.rows] == [1.25, 10.0]


# --- stopped and gone on with


@pytest.mark.parametrize("stop_at", [3, 20])
def test_a_recovery_that_was_stopped_comes_to_the_same_end(
    recovered: tuple[RecoveryResult, Path], extended: LoadedModel, source: list[str], tmp_path: Path, stop_at: int
) -> None:
    class Stop(Callbacks):
        def __init__(self) -> None:
            self.count, self.lengths = 0, []

        def on_recover_length(self, length: int) -> None:
            self.lengths.append(length)

        def on_search_progress(self, progress: SearchProgress) -> None:
            self.count += 1
            if self.count == stop_at:
                raise KeyboardInterrupt

    stop = Stop()
    arguments: tuple[Any, ...] = ([WINDOW, 2 * WINDOW], source, tmp_path / "run", FEW)
    with pytest.raises(KeyboardInterrupt):
        recover(extended, *arguments, callbacks=stop)
    assert stop.lengths == [WINDOW, 2 * WINDOW][: 1 if stop_at == 3 else 2]
    with pytest.raises(LongRopeError) as error:
        recover(extended, *arguments)
    assert error.value.code == "output-exists"
    resumed = recover(extended, *arguments, resume=True)
    assert (resumed.rows, resumed.scaling.windows) == (recovered[0].rows, recovered[0].scaling.windows)


def test_a_finished_one_is_read_again(
    recovered: tuple[RecoveryResult, Path], extended: LoadedModel, source: list[str], tmp_path: Path
) -> None:
    found, out = recovered
    written = (out / "recover.json").stat().st_mtime_ns
    assert recover(extended, [WINDOW, 2 * WINDOW], source, out, FEW, resume=True) == found
    assert (out / "recover.json").stat().st_mtime_ns == written
    for lengths in ([WINDOW], [WINDOW, 2 * WINDOW, 4 * WINDOW], [3 * WINDOW]):
        with pytest.raises(LongRopeError, match="is another one, of windows of 64, 128 tokens"):
            recover(extended, lengths, source, out, FEW, resume=True)
    shutil.copytree(out, tmp_path / "other")
    with pytest.raises(LongRopeError) as error:
        recover(extended, [WINDOW, 2 * WINDOW], source, tmp_path / "other", FEW, max_factor=2.0, resume=True)
    assert error.value.code == "other-run"


def test_the_model_is_left_as_it_was(extended: LoadedModel, source: list[str], tmp_path: Path) -> None:
    ids = torch.arange(20)[None]
    before = extended.model(input_ids=ids).logits
    recover(extended, [WINDOW], source, tmp_path / "run", FEW.replace(population=2, iterations=0))
    assert torch.equal(extended.model(input_ids=ids).logits, before)


def test_the_front_door(
    recovered: tuple[RecoveryResult, Path], extended: LoadedModel, source: list[str], tmp_path: Path
) -> None:
    """Lengths as text, one source alone, a path as text: the same scaling."""
    lengths = [str(WINDOW), 2 * WINDOW]
    found = recover_scaling(extended, lengths=lengths, data=source[0], config=FEW, output_dir=str(tmp_path / "run"))
    assert found.windows == recovered[0].scaling.windows


# --- what is refused


def test_what_is_refused(extended: LoadedModel, loaded: LoadedModel, source: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"

    def says(code: str, pattern: str, call: Callable[[], object]) -> None:
        with pytest.raises(LongRopeError, match=pattern) as error:
            call()
        assert error.value.code == code
        assert "\n" not in str(error.value)
        assert not out.exists()

    says("invalid-setting", "has no scaling", lambda: recover(loaded, [WINDOW], source, out))
    for lengths, found in (([], "none"), ([WINDOW - 1, 2 * WINDOW], "63, 128"), ([REACH], "4096")):
        says(
            "invalid-setting",
            f"from 64 tokens on .* 4096, found {found}",
            lambda lengths=lengths: recover(extended, lengths, source, out),  # type: ignore[misc]
        )
    says(
        "invalid-setting",
        "max_factor.* of at least 1, found 0.5",
        lambda: recover(extended, [WINDOW], source, out, max_factor=0.5),
    )
    for method in ("longrope2", "gradient", "hybrid", "cma"):
        options = SearchConfig(method=method)
        says(
            "setting-of-another-method",
            "the method longrope only",
            lambda options=options: recover(extended, [64], source, out, options),
        )  # type: ignore[misc]
    for count, code, found in ((0, "invalid-number", "found 0"), (2, "invalid-setting", "2 .* expected `workers`")):
        says(
            code,
            f"`context_parallel` .*{found}",
            lambda count=count: recover_scaling(  # type: ignore[misc]
                extended, lengths=WINDOW, data=source, output_dir=out, context_parallel=count
            ),
        )
    says("not-resumable", "no recovery in", lambda: recover(extended, [WINDOW], source, out, resume=True))


def test_rows_are_whole() -> None:
    row = RecoveredLength(64, 2.0, 3.0, 4.0, 2.5, True)
    assert (row.after, replace(row, stored=False).after) == (2.5, 3.0)


def test_a_recovery_search_also_goes_beyond_the_context_length(
    loaded: LoadedModel, source: list[str], tmp_path: Path
) -> None:
    few = FEW.replace(population=2, iterations=0)
    found = search(loaded, 2 * WINDOW, source, tmp_path / "run", few, recovery=True)
    assert [window.max_length for window in found.scaling.windows] == [WINDOW, 2 * WINDOW]
