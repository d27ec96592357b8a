"""A search beyond a fine-tuned window: it starts from the factors the model was trained with, also stretched."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope.errors import LongRopeError
from longrope.evaluation.compare import Comparison, named_baselines
from longrope.models.loading import LoadedModel
from longrope.models.scaled import ScaledModel
from longrope.recipes.run import run_recipe
from longrope.rope.baselines import second_method
from longrope.rope.closed_forms import CLOSED_FORMS, ntk_critical, yarn
from longrope.rope.geometry import FloatArray, RopeGeometry
from longrope.rope.progressive import SECOND_FORMS, second_pi, second_yarn
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.config import SearchConfig
from longrope.search.evolution import Evolution
from longrope.search.initial import baselines, checkpoint_seeds, evolution_seeds, knot_seeds
from longrope.search.methods import PreparedSearch, build
from longrope.search.run import search
from longrope.search.search_data import objectives_over, prepare_texts
from longrope.search.spaces import SearchSpace
from tests.checkpoints import WINDOW
from tests.recipes.recipes import SEARCH_4, SEARCH_8, SEARCH_16, TRAIN_4, recipe

REACH, TARGET, M = 4 * WINDOW, 8 * WINDOW, 1.25
CONTINUED = M * (0.1 * math.log(2) + 1)  # YaRN's, for s₂ = 2
FIRST, SECOND = ["pi", "ntk", "yarn"], ["second-pi", "second-ntk", "second-ntk-critical", "second-yarn"]
KEEPING = ["second-yarn, β_fast 8", "second-yarn, β_fast 2"]


@pytest.fixture(scope="module")
def tuned(loaded: LoadedModel) -> LoadedModel:
    """A model that was trained for 4·L, and for L as it was."""
    short = Window(WINDOW, (1.0,) * loaded.geometry.pairs)
    long = Window(REACH, tuple(yarn(loaded.geometry, REACH).tolist()), attention_factor=M)
    return replace(loaded, checkpoint_scaling=RopeScaling(loaded.geometry, (short, long)))


@pytest.fixture
def second(tuned: LoadedModel, scaled: ScaledModel, source: list[str]) -> Callable[..., PreparedSearch]:
    def make(**options: Any) -> PreparedSearch:
        chosen = SearchConfig(samples=1, **options)
        objectives = objectives_over(scaled, prepare_texts(tuned, source, TARGET, chosen))
        return build(tuned, objectives, TARGET, chosen)

    return make


def test_what_algorithm_1_starts_from(
    tuned: LoadedModel, loaded: LoadedModel, second: Callable[..., PreparedSearch]
) -> None:
    planned: Any = second(method="longrope", population=16, space="absolute")
    evolution = planned.run.keywords["optimizer"]
    assert isinstance(evolution, Evolution)
    # Table 4's bounds, relative to the original RoPE.
    assert evolution.space == SearchSpace(pairs=16, upper=1.25 * TARGET / WINDOW)
    recorded = tuned.checkpoint_scaling
    assert recorded is not None
    expected = [np.asarray(recorded.windows[-1].factors)]
    expected += [SECOND_FORMS[name](loaded.geometry, recorded.windows[-1].factors, REACH, TARGET) for name in SECOND]
    expected += [second_yarn(loaded.geometry, recorded.windows[-1].factors, REACH, TARGET, beta) for beta in (8, 2)]
    expected = expected[::-1] + [CLOSED_FORMS[name](loaded.geometry, TARGET)[0] for name in FIRST]
    assert [seed.tolist() for seed, _ in evolution_seeds(tuned, TARGET)] == [seed.tolist() for seed in expected]
    proposed = [candidate.factors for candidate in evolution.ask()]
    seeds = list(dict.fromkeys(evolution.space.snap(factors).factors for factors in expected))
    assert proposed[: len(seeds)] == seeds
    assert len(seeds) >= 7
    assert planned.attention_factor == M
    assert [one.tolist() for one, _ in evolution_seeds(loaded, TARGET)] == [one.tolist() for one in expected[-3:]]


def test_what_a_relative_algorithm_1_starts_from(tuned: LoadedModel, second: Callable[..., PreparedSearch]) -> None:
    """The authors' second search: λ_trained ∘ μ, μ on the grid of Table 4 for s₂ = 2, from PI, NTK and YaRN for s₂."""
    planned: Any = second(method="longrope", population=16)
    evolution, to_window = planned.run.keywords["optimizer"], planned.run.keywords["to_window"]
    assert evolution.space == SearchSpace(pairs=16, upper=1.25 * TARGET / REACH)
    assert tuned.checkpoint_scaling is not None
    trained = np.asarray(tuned.checkpoint_scaling.windows[-1].factors)
    assert planned.settings["relative_to"] == trained.tolist()
    proposed = evolution.ask()
    forms = [np.ones(16), *(form / trained for form in relative_forms(tuned))]
    seeds = list(dict.fromkeys(evolution.space.snap(form) for form in forms))
    assert proposed[: len(seeds)] == seeds
    for candidate in proposed:
        multiples = np.asarray(candidate.steps) / 100
        assert (np.diff(multiples) >= 0).all()
        assert multiples.min() >= 1.0
        assert multiples.max() <= 1.25 * TARGET / REACH
        assert to_window(candidate).factors == tuple((trained * multiples).tolist())


@pytest.mark.parametrize("space", ["relative", "absolute"])
@pytest.mark.parametrize(("asked", "kept"), [("search", 8), ("8", 8), ("0", 0)])
def test_seeds_keep_the_start_tokens_that_the_model_was_trained_with(
    tuned: LoadedModel, scaled: ScaledModel, source: list[str], space: Any, asked: str, kept: int
) -> None:
    """Those made of the checkpoint's factors, where the search has a choice of that n̂; so do the baselines."""
    assert tuned.checkpoint_scaling is not None
    last = replace(tuned.checkpoint_scaling.windows[-1], start_tokens=8)
    trained = replace(tuned, checkpoint_scaling=RopeScaling(tuned.geometry, (last,)))
    options = SearchConfig(method="longrope", samples=1, space=space, start_tokens=asked)
    texts = prepare_texts(trained, source, TARGET, options)
    planned = build(trained, objectives_over(scaled, texts), TARGET, options)
    found = [row["start_tokens"] for row in planned.settings["seeds"]]
    closed = 0 if space == "relative" else 3
    first = 8 if asked == "8" else 0
    assert found == [kept] * (len(found) - closed) + [first] * closed
    assert len(found) > closed
    windows = baselines(trained, TARGET)
    assert {windows[name].start_tokens for name in ("checkpoint", *SECOND)} == {8}


def relative_forms(tuned: LoadedModel) -> list[FloatArray]:
    assert tuned.checkpoint_scaling is not None
    stretch = (tuned.geometry, tuned.checkpoint_scaling.windows[-1].factors, REACH, TARGET)
    return [second_pi(*stretch), SECOND_FORMS["second-ntk"](*stretch), second_yarn(*stretch)]


@pytest.mark.parametrize("method", ["gradient", "hybrid", "cma", "longrope", "longrope2"])
def test_factors_that_the_model_was_trained_with_stay_what_they_are(
    tuned: LoadedModel, source: list[str], tmp_path: Path, method: str
) -> None:
    """Of every method: the result is λ_trained ∘ μ with a monotone μ of at least 1, though λ_trained falls once."""
    assert tuned.checkpoint_scaling is not None
    factors = np.array(tuned.checkpoint_scaling.windows[-1].factors)
    factors[9] = 0.8 * factors[8]
    windows = (*tuned.checkpoint_scaling.windows[:-1], Window(REACH, tuple(factors.tolist()), attention_factor=M))
    fallen = replace(tuned, checkpoint_scaling=RopeScaling(tuned.geometry, windows))
    budget: dict[str, Any] = {"gradient": {"steps": 2}, "hybrid": {"steps": 2, "evaluations": 11}}.get(
        method, {"evaluations": 11} if method == "cma" else {"population": 8, "iterations": 1}
    )
    found = search(fallen, TARGET, source, tmp_path / "run", SearchConfig(method=method, samples=1, **budget))
    assert found.scaling.windows[:-1] == windows
    multiples = np.asarray(found.scaling.windows[-1].factors) / factors
    assert (np.diff(multiples) >= -1e-12).all()
    assert multiples.min() >= 1 - 1e-12
    if method == "longrope2":
        assert found.critical_dim is not None
        assert (multiples[found.critical_dim :] >= TARGET / REACH - 1e-9).all()
    assert found.scaling.provenance["search"]["settings"]["relative_to"] == factors.tolist()


@pytest.mark.parametrize("method", ["gradient", "cma", "longrope"])
def test_multiples_end_where_windows_do(
    tuned: LoadedModel, scaled: ScaledModel, source: list[str], method: Any
) -> None:
    """The factors of a window are at most 10^9; a multiple of a trained factor is one."""
    trained = Window(REACH, tuple(np.geomspace(1.0, 1e6 / 3, 16).tolist()))
    far = replace(tuned, checkpoint_scaling=RopeScaling(tuned.geometry, (trained,)))
    chosen = SearchConfig(method=method, samples=1, max_factor=1e9)
    planned: Any = build(far, objectives_over(scaled, prepare_texts(far, source, TARGET, chosen)), TARGET, chosen)
    given, most = planned.run.keywords, np.full(16, 1e9)
    if method == "longrope":
        window = given["to_window"](given["optimizer"].space.snap(most))
    else:
        window = (given["stage"] if method == "cma" else given["stages"][-1]).window(most, M, given["bounds"])
    assert max(window.factors) == pytest.approx(1e9, rel=1e-4)


@pytest.mark.parametrize("space", ["relative", "absolute"])
@pytest.mark.parametrize("method", ["gradient", "longrope"])
def test_a_space_is_of_a_second_search(
    loaded: LoadedModel, source: list[str], tmp_path: Path, method: str, space: Any
) -> None:
    with pytest.raises(LongRopeError, match="a checkpoint with a scaling that the search goes beyond") as error:
        search(loaded, TARGET, source, tmp_path, SearchConfig(method=method, samples=1, space=space))
    assert error.value.code == "invalid-setting"


def test_searches_on_knots_may_start_from_them(tuned: LoadedModel, loaded: LoadedModel) -> None:
    before, now = knot_seeds(loaded, TARGET), knot_seeds(tuned, TARGET)
    assert list(now) == [*before, "checkpoint", *SECOND, *KEEPING]
    assert {name: factors.tolist() for name, factors in checkpoint_seeds(tuned, TARGET).items()} == {
        name: now[name].tolist() for name in ("checkpoint", *SECOND, *KEEPING)
    }
    assert checkpoint_seeds(loaded, TARGET) == {}


@pytest.mark.parametrize("method", ["gradient", "hybrid", "cma"])
def test_the_stages_of_searches_on_knots_have_them(
    second: Callable[..., PreparedSearch], tuned: LoadedModel, method: str
) -> None:
    planned: Any = second(method=method)
    stages = planned.run.keywords["stages"] if method != "cma" else [planned.run.keywords["stage"]]
    assert [stage.length for stage in stages] == [TARGET]
    assert list(stages[-1].seeds) == ["checkpoint", *SECOND, *KEEPING]
    geometry, base = tuned.geometry, stages[-1].base
    ramp = second_yarn(geometry, base, REACH, TARGET, 8.0, 0.6, truncate=False)
    assert (stages[-1].ramp(8.0, 0.6) * base).tolist() == pytest.approx(ramp.tolist(), rel=1e-15)
    assert (np.diff(stages[-1].ramp(8.0, 0.6)) >= 0).all()
    assert stages[-1].seeds["checkpoint"].tolist() == [1.0] * 16
    absolute: Any = second(method=method, space="absolute")
    stages = absolute.run.keywords["stages"] if method != "cma" else [absolute.run.keywords["stage"]]
    assert list(stages[-1].seeds)[-7:] == ["checkpoint", *SECOND, *KEEPING]
    assert stages[-1].ramp(8.0, 0.6).tolist() == yarn(geometry, TARGET, 8.0, 0.6, truncate=False).tolist()


def test_the_baselines(tuned: LoadedModel, loaded: LoadedModel) -> None:
    windows = baselines(tuned, TARGET)
    assert list(windows) == [*CLOSED_FORMS, "checkpoint", *SECOND]
    assert {window.max_length for window in windows.values()} == {TARGET}
    assert tuned.checkpoint_scaling is not None
    last = tuned.checkpoint_scaling.windows[-1]
    assert (windows["checkpoint"].factors, windows["checkpoint"].attention_factor) == (last.factors, M)
    assert [windows[name].attention_factor for name in SECOND] == [M, M, M, CONTINUED]
    assert windows["second-pi"].factors == tuple(second_pi(tuned.geometry, last.factors, REACH, TARGET).tolist())
    assert windows["second-yarn"].factors == tuple(second_yarn(tuned.geometry, last.factors, REACH, TARGET).tolist())
    assert list(baselines(loaded, TARGET)) == list(CLOSED_FORMS)
    assert baselines(tuned, TARGET, formulas=False) == {name: windows[name] for name in ("none", "checkpoint")}


def test_a_second_search_end_to_end(tuned: LoadedModel, source: list[str], tmp_path: Path) -> None:
    options = SearchConfig(method="longrope", population=8, iterations=1, samples=1, attention_factor="continued")
    found = search(tuned, TARGET, source, tmp_path / "run", options)
    assert set(found.baselines) == {*CLOSED_FORMS, "checkpoint", *SECOND}
    assert tuned.checkpoint_scaling is not None
    assert found.scaling.windows[:-1] == tuned.checkpoint_scaling.windows
    assert found.scaling.windows[-1].attention_factor == CONTINUED
    # YaRN's form was evaluated, with the same attention factor: the search loses to it by the grid's rounding at most.
    assert found.best_loss <= found.baselines["second-yarn"] + 1e-3
    resumed = search(tuned, TARGET, source, tmp_path / "run", options, resume=True)
    assert (resumed.best_loss, resumed.scaling.windows) == (found.best_loss, found.scaling.windows)


def test_searches_of_a_recipe_leave_a_window_each(loaded: LoadedModel, tmp_path: Path) -> None:
    """After the last fine-tuning: the second goes on from the first, whose window it keeps and stretches."""
    made = recipe(tmp_path, SEARCH_4, {**TRAIN_4, "steps": 1}, {**SEARCH_8, "attention_factor": "continued"}, SEARCH_16)
    done = run_recipe(loaded, made, tmp_path / "run")
    trained, first, second = done.scaling.windows
    assert [window.max_length for window in (trained, first, second)] == [256, 512, 1024]
    assert first.attention_factor == second.attention_factor == trained.attention_factor * (0.1 * math.log(2) + 1)
    said = json.loads((tmp_path / "run/04-search-1k/search.json").read_text("utf-8"))["baselines"]
    identity = json.loads((tmp_path / "run/04-search-1k/search.jsonl").read_text("utf-8").splitlines()[0])
    stretched = SearchSpace(pairs=16, upper=1.25 * 2).snap([2.0] * 16).to_row()
    assert stretched in identity["settings"]["seeds"]
    assert identity["settings"]["relative_to"] == list(first.factors)
    multiples = np.asarray(second.factors) / np.asarray(first.factors)
    assert (np.diff(multiples) >= -1e-12).all()
    assert said["checkpoint"] != said["second-pi"]


# --- evaluation


LLAMA = RopeGeometry(rotary_dim=128, base=10_000.0, original_length=4096)
RECORDED = RopeScaling(
    LLAMA,
    (Window(4096, (1.0,) * 64), Window(262_144, tuple(ntk_critical(LLAMA, 262_144).tolist()), attention_factor=1.2)),
)


@pytest.mark.parametrize("name", SECOND)
def test_a_second_form_as_a_method(name: str) -> None:
    method = second_method(name, RECORDED, 2_097_152)
    assert method.name == name
    for length in (1, 4096, 4097, 262_144):  # within reach, the model as it was trained
        assert method.window(length) == RECORDED.window_for(length)
    beyond = method.window(262_145)
    continued = 1.2 * (0.1 * math.log(8) + 1) if name == "second-yarn" else 1.2
    assert (beyond.max_length, beyond.attention_factor) == (2_097_152, pytest.approx(continued, rel=1e-15))
    expected = SECOND_FORMS[name](LLAMA, RECORDED.windows[-1].factors, 262_144, 2_097_152)
    assert beyond.factors == tuple(expected.tolist())


def compared(loaded: LoadedModel, names: list[str], target_length: int) -> Comparison:
    return Comparison.of(loaded, None, "longrope", named_baselines(names), target_length)


def test_named_in_a_comparison(tuned: LoadedModel, loaded: LoadedModel) -> None:
    methods = compared(tuned, ["second-pi", "second-yarn", "none"], TARGET).methods
    assert [method.name for method in methods] == ["second-pi", "second-yarn", "none", "checkpoint"]
    assert methods[0].window(TARGET).factors == baselines(tuned, TARGET)["second-pi"].factors
    with pytest.raises(LongRopeError, match=r"has no scaling to stretch; leave 'second-pi' out"):
        compared(loaded, ["second-pi"], TARGET)
    with pytest.raises(LongRopeError, match=f"{REACH} tokens for second-pi, found {REACH}"):
        compared(tuned, ["second-pi"], REACH)
    with pytest.raises(LongRopeError, match=r"expected one of second-pi, .* found 'second'"):
        second_method("second", RECORDED, 2_097_152)
    with pytest.raises(LongRopeError, match=r"second-ntk-critical, second-yarn or a scaling's path .* found 'second'"):
        compared(tuned, ["second"], TARGET)
