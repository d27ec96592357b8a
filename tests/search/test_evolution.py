"""Algorithm 1: what it asks, of whom, how often, in which order, and that it finds minima."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from longrope.errors import LongRopeError
from longrope.search.evaluator import EvalRequest, EvalResult
from longrope.search.evolution import Evolution, EvolutionSettings, evolution_search
from longrope.search.spaces import Candidate, SearchSpace
from tests.search.slopes import complete as complete_search
from tests.search.targets import SEEDS, SETTINGS, SPACE, TARGET_LENGTH, complete, distance, to_window


def loss_of(candidate: Candidate) -> float:
    return distance(candidate.window(TARGET_LENGTH, 1.0))


class Recorder:
    """A space that remembers which parents each operator was given since the last `clear`."""

    def __init__(self) -> None:
        self.mutated: list[Candidate] = []
        self.crossed: list[tuple[Candidate, Candidate]] = []
        recorder = self

        class RecordingSpace(SearchSpace):
            def mutate(self, parent: Candidate, probability: float, rng: np.random.Generator) -> Candidate:
                recorder.mutated.append(parent)
                return SearchSpace.mutate(self, parent, probability, rng)

            def cross(self, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate:
                recorder.crossed.append((first, second))
                return SearchSpace.cross(self, first, second, rng)

        self.space = RecordingSpace(pairs=SPACE.pairs, upper=SPACE.upper, start_tokens=SPACE.start_tokens)


@pytest.fixture(scope="module")
def paper_run() -> tuple[Evolution, list[Candidate]]:
    """A search with the paper's settings on the cheap loss, and every candidate it asked."""
    optimizer = Evolution(SPACE, SEEDS, EvolutionSettings(seed=1))
    return optimizer, complete(optimizer, loss_of)


def test_paper_defaults_evaluate_1344_candidates(paper_run: tuple[Evolution, list[Candidate]]) -> None:
    optimizer, asked = paper_run
    assert len(asked) == 64 + 40 * 32 == optimizer.settings.evaluations == 1344
    assert optimizer.settings == EvolutionSettings.for_population(64, seed=1)


def test_no_candidate_is_evaluated_twice(paper_run: tuple[Evolution, list[Candidate]]) -> None:
    _, asked = paper_run
    assert len(set(asked)) == len(asked)


def test_candidates_are_not_repeated_where_children_often_coincide() -> None:
    """With p = 0.05 most mutants equal their parent, and crossovers of relatives each other."""
    asked = complete(
        Evolution(SPACE, SEEDS, EvolutionSettings(probability=0.05, population=16, iterations=10)), loss_of
    )
    assert len(set(asked)) == len(asked) == 16 + 10 * 32


def test_finds_the_minimum_better_than_seeds_and_random_search(paper_run: tuple[Evolution, list[Candidate]]) -> None:
    optimizer, asked = paper_run
    best, loss = optimizer.incumbent
    assert loss == loss_of(best) == min(map(loss_of, asked))
    rng = np.random.default_rng(1)
    # Random search with as many evaluations: anywhere in the space, and mutations of the seeds only.
    anywhere = min(loss_of(SPACE.mutate(SEEDS[0], 1.0, rng)) for _ in range(1344))
    around = min(loss_of(SPACE.mutate(SEEDS[index % 3], 0.3, rng)) for index in range(1344))
    assert loss < 0.2 * min(map(loss_of, SEEDS))
    assert loss < 0.3 * min(anywhere, around)


def test_first_generation_begins_with_the_seeds_and_mutates_each() -> None:
    recorder = Recorder()
    generation = Evolution(recorder.space, SEEDS, EvolutionSettings(population=30)).ask()
    assert generation[:3] == SEEDS
    assert len(set(generation)) == 30
    assert set(recorder.mutated) == set(SEEDS)
    assert not recorder.crossed


def test_small_population_takes_the_first_seeds() -> None:
    assert Evolution(SPACE, SEEDS, EvolutionSettings(population=2)).ask() == SEEDS[:2]


def test_equal_seeds_count_once() -> None:
    generation = Evolution(SPACE, [SEEDS[0], SEEDS[1], SEEDS[0]], EvolutionSettings(population=8)).ask()
    assert generation[:2] == SEEDS[:2]
    assert len(set(generation)) == 8


def test_children_have_parents_among_the_top_k_of_all_told() -> None:
    recorder = Recorder()
    settings = EvolutionSettings(population=24, mutations=20, crossovers=20, iterations=6, top_k=5, seed=2)
    optimizer = Evolution(recorder.space, SEEDS, settings)
    scored: list[tuple[float, Candidate]] = []
    while not optimizer.done:
        recorder.mutated.clear()
        recorder.crossed.clear()
        generation = optimizer.ask()
        if scored:
            top = {candidate for _, candidate in sorted(scored, key=lambda pair: pair[0])[:5]}
            assert set(recorder.mutated) <= top
            assert {parent for pair in recorder.crossed for parent in pair} <= top
            assert all(first != second for first, second in recorder.crossed)
            assert len(set(recorder.mutated)) >= 3  # the whole of Top-k has children, not only the best
            assert len(recorder.mutated) >= 20
            assert len(recorder.crossed) >= 20
        scored += [(loss_of(candidate), candidate) for candidate in generation]
        optimizer.tell([loss_of(candidate) for candidate in generation])


@pytest.mark.parametrize(("mutations", "crossovers"), [(0, 6), (6, 0), (5, 1)])
def test_children_are_split_as_asked(mutations: int, crossovers: int) -> None:
    recorder = Recorder()
    optimizer = Evolution(
        recorder.space, SEEDS, EvolutionSettings(population=12, mutations=mutations, crossovers=crossovers, top_k=12)
    )
    optimizer.tell([loss_of(candidate) for candidate in optimizer.ask()])
    recorder.mutated.clear()
    assert len(optimizer.ask()) == 6
    assert (len(recorder.mutated) > 0, len(recorder.crossed) > 0) == (mutations > 0, crossovers > 0)


def test_one_parent_alone_is_mutated() -> None:
    optimizer = Evolution(SPACE, SEEDS[:1], EvolutionSettings(population=1, top_k=1, mutations=2, crossovers=2))
    optimizer.tell([1.0] * len(optimizer.ask()))
    assert len(optimizer.ask()) == 4


def test_same_seed_same_questions_other_seed_others() -> None:
    def run(seed: int) -> list[Candidate]:
        settings = EvolutionSettings(population=8, mutations=3, crossovers=3, iterations=4, top_k=4, seed=seed)
        return complete(Evolution(SPACE, SEEDS, settings), loss_of)

    assert run(0) == run(0)
    assert len({tuple(run(seed)) for seed in range(4)}) == 4


def test_questions_depend_on_the_losses_and_on_nothing_else() -> None:
    """Asking twice, reading `incumbent` and `done`: none advances the generator. Other losses change them."""
    quiet, curious, other = (Evolution(SPACE, SEEDS, SETTINGS) for _ in range(3))
    for _ in range(3):
        generation = quiet.ask()
        assert curious.ask() == curious.ask() == generation
        for optimizer in (quiet, curious):
            optimizer.tell([loss_of(candidate) for candidate in generation])
        other.tell([-loss_of(candidate) for candidate in other.ask()])
        assert curious.incumbent == quiet.incumbent
        assert not curious.done
    assert quiet.ask() == curious.ask() != other.ask()


def test_what_ask_returns_is_the_callers() -> None:
    optimizer = Evolution(SPACE, SEEDS, SETTINGS)
    optimizer.ask().clear()
    assert len(optimizer.ask()) == SETTINGS.population


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_are_worst(bad: float) -> None:
    recorder = Recorder()
    settings = EvolutionSettings(population=8, mutations=8, crossovers=8, iterations=3, top_k=4)
    optimizer = Evolution(recorder.space, SEEDS, settings)
    generation = optimizer.ask()
    optimizer.tell([bad, bad, 5.0, 4.0, bad, 3.0, 6.0, bad])
    assert optimizer.incumbent == (generation[5], 3.0)
    recorder.mutated.clear()
    optimizer.ask()
    assert set(recorder.mutated) <= {generation[index] for index in (2, 3, 5, 6)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_finite_loss_at_all_is_an_error_of_best(bad: float) -> None:
    optimizer = Evolution(SPACE, SEEDS, SETTINGS)
    asked = complete(optimizer, lambda _: bad)
    assert len(asked) == SETTINGS.evaluations
    assert optimizer.incumbent is None
    ran = complete_search(
        partial(evolution_search, optimizer=Evolution(SPACE, SEEDS, SETTINGS), to_window=to_window),
        lambda _: EvalResult(bad),
    )
    assert len(ran.said) == SETTINGS.evaluations
    assert not ran.bests
    assert ran.error is not None
    assert ran.error.code == "not-finite"


def test_the_search_evaluates_what_the_optimizer_asks() -> None:
    """A batch for each generation, in its order; the best so far is reported after each."""
    optimizer, expected = Evolution(SPACE, SEEDS, SETTINGS), Evolution(SPACE, SEEDS, SETTINGS)
    assert expected.incumbent is None
    ran = complete_search(
        partial(evolution_search, optimizer=optimizer, to_window=to_window),
        lambda request: EvalResult(distance(request.window)),
    )
    asked, bests = [], []
    while not expected.done:
        generation = expected.ask()
        asked += [EvalRequest(to_window(candidate), candidate.to_row()) for candidate in generation]
        expected.tell([loss_of(candidate) for candidate in generation])
        assert expected.incumbent is not None
        bests.append((to_window(expected.incumbent[0]), expected.incumbent[1]))
    assert [request for request, _ in ran.said] == asked
    assert ran.batches == [8, 6, 6, 6, 6]
    assert ran.bests == bests
    assert ran.best == bests[-1]
    assert ran.outcome is not None
    assert list(ran.outcome.ranked) == expected.ranked


def test_of_equal_losses_the_first_asked_is_best() -> None:
    optimizer = Evolution(SPACE, SEEDS, SETTINGS)
    complete(optimizer, lambda _: 1.0)
    assert optimizer.incumbent == (SEEDS[0], 1.0)


def generations(loss: Callable[[int], float], patience: int | None) -> int:
    """Generations scored, P₀ included, when the best of generation g is `loss(g)`."""
    settings = EvolutionSettings(population=4, mutations=2, crossovers=2, iterations=9, top_k=2, patience=patience)
    optimizer = Evolution(SPACE, SEEDS, settings)
    while not optimizer.done:
        optimizer.tell([loss(optimizer.iteration)] * len(optimizer.ask()))
    return optimizer.iteration


def test_patience_counts_iterations_without_a_better_candidate() -> None:
    assert generations(lambda _: 1.0, None) == 10
    assert generations(lambda _: 1.0, 3) == 1 + 3
    assert generations(lambda g: -g, 1) == 10  # better every time
    assert generations(lambda g: -(g // 2), 1) == 2  # better every second time only
    assert generations(lambda g: -(g // 2), 2) == 10
    assert generations(lambda g: -min(g, 4), 3) == 1 + 4 + 3
    assert generations(lambda g: math.nan if g else 1.0, 2) == 1 + 2


def test_an_exhausted_space_ends_the_search() -> None:
    space = SearchSpace(pairs=2, upper=1.04)  # 15 monotone vectors
    optimizer = Evolution(space, [space.snap([1.0, 1.0])], EvolutionSettings(population=4, top_k=15))
    asked = complete(optimizer, lambda candidate: float(sum(candidate.steps)))
    assert len(set(asked)) == len(asked) <= 15
    assert len(asked) >= 12
    assert optimizer.incumbent[0] == Candidate((100, 100))


def test_a_space_of_one_point_ends_after_it() -> None:
    space = SearchSpace(pairs=3, upper=1.0)
    optimizer = Evolution(space, [space.snap([1.0] * 3)], EvolutionSettings())
    assert complete(optimizer, lambda _: 2.0) == [Candidate((100, 100, 100))]
    assert optimizer.incumbent == (Candidate((100, 100, 100)), 2.0)


def test_no_iterations_is_the_first_generation_only() -> None:
    asked = complete(Evolution(SPACE, SEEDS, EvolutionSettings(population=6, iterations=0)), loss_of)
    assert len(asked) == 6


@pytest.mark.parametrize("count", [0, 7, 9])
def test_tell_of_another_count_is_refused(count: int) -> None:
    optimizer = Evolution(SPACE, SEEDS, SETTINGS)
    generation = optimizer.ask()
    with pytest.raises(ValueError, match=f"expected 8 losses .* found {count}"):
        optimizer.tell([1.0] * count)
    assert optimizer.ask() == generation  # nothing was taken
    optimizer.tell([1.0] * 8)


def test_tell_before_ask_is_refused() -> None:
    optimizer = Evolution(SPACE, SEEDS, SETTINGS)
    with pytest.raises(ValueError, match="losses for the generation asked"):
        optimizer.tell([1.0])


def test_no_seeds_is_refused() -> None:
    with pytest.raises(LongRopeError, match="at least one seed"):
        Evolution(SPACE, [], SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"population": 0}, "`population` of at least 1, found 0"),
        ({"iterations": -1}, "`iterations` of at least 0, found -1"),
        ({"top_k": 0}, "`top_k` of at least 1, found 0"),
        ({"seed": -1}, "`seed` of at least 0, found -1"),
        ({"mutations": 0, "crossovers": 0}, "needs mutations or crossovers; found none"),
        ({"mutations": -1}, "`mutations` of at least 0, found -1"),
        ({"crossovers": -1}, "`crossovers` of at least 0, found -1"),
        ({"probability": 0.0}, "found 0.0"),
        ({"probability": 1.5}, "found 1.5"),
        ({"probability": math.nan}, "found nan"),
        ({"patience": 0}, "`patience` of at least 1, found 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(LongRopeError, match=says) as error:
        EvolutionSettings(**wrong)  # type: ignore[arg-type]
    assert error.value.code == "invalid-setting"
    assert "\n" not in str(error.value)


def test_other_populations_keep_the_papers_proportions() -> None:
    halved = EvolutionSettings.for_population(32)
    assert (halved.population, halved.mutations, halved.crossovers, halved.top_k) == (32, 8, 8, 16)
    least = EvolutionSettings.for_population(1)
    assert (least.population, least.mutations, least.crossovers, least.top_k) == (1, 1, 1, 1)
    with pytest.raises(LongRopeError, match="`population` of at least 1"):
        EvolutionSettings.for_population(0)
