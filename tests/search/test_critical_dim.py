"""The critical dimension of a search, the one that each objective would have chosen, and the closed forms with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from longrope.errors import LongRopeError
from longrope.rope.closed_forms import ntk_critical, yarn
from longrope.rope.geometry import RopeGeometry
from longrope.search.config import SearchConfig
from longrope.search.critical_dim import CriticalDims, critical_dim_by_objective, forms_with_critical_dim
from longrope.search.evaluator import OTHER, EvalRequest, EvalResult, SearchOutcome
from tests.search.conftest import Planned
from tests.search.lengths import NEEDLE_LENGTH
from tests.search.slopes import Reply, complete

PHI3 = RopeGeometry(rotary_dim=96, base=10_000.0, original_length=2048)


def preferring(search: int, other: int, bad: tuple[tuple[str, int], ...] = ()) -> Reply:
    """Losses by d_rcd: the search's are lowest at `search`, the other objective's at `other`; `bad` ones are NaN."""

    def reply(request: EvalRequest) -> EvalResult:
        dim = request.row.get("critical_dim", 0)
        if (request.split, dim) in bad:
            return EvalResult(math.nan)
        best, level = (other, 5.0) if request.split == OTHER else (search, 1.0)
        return EvalResult(level + abs(dim - best) + 0.01 * request.window.factors[-1])

    return reply


Chosen = tuple[CriticalDims | None, list[EvalRequest], SearchOutcome]


@pytest.fixture
def chosen(planned: Callable[..., Planned]) -> Callable[..., Chosen]:
    """`chosen(reply, method=…)`: the critical dimensions of a search on `reply`, their requests, and its outcome."""

    def run(reply: Reply, **config: Any) -> Chosen:
        ran = complete(planned(**config).prepared.run, reply)
        assert ran.outcome is not None
        assert all(request.split != OTHER for request, _ in ran.said)
        others: list[EvalRequest] = []

        def evaluate(requests: Sequence[EvalRequest]) -> list[EvalResult]:
            others.extend(requests)
            return [reply(request) for request in requests]

        return critical_dim_by_objective(evaluate, ran.outcome, SearchConfig(**config)), others, ran.outcome

    return run


FIRST = {"method": "longrope2", "population": 20, "iterations": 0, "samples": 2}  # four of each d_rcd from 1 to 5


@pytest.mark.parametrize("racing", [False, True])
@pytest.mark.parametrize("objective", [None, "perplexity"])
def test_each_objective_chooses_among_the_best_of_each_dimension(
    chosen: Callable[..., Any], racing: bool, objective: str | None
) -> None:
    found, others, outcome = chosen(preferring(4, 2), **FIRST, objective=objective, racing=racing)
    names = ("perplexity", "needle") if objective else ("needle", "perplexity")
    assert found.critical_dim == 4
    assert found.chosen == {names[0]: 4, names[1]: 2}
    # One request for each d_rcd, about its best candidate: the one with the smallest last factor here.
    best = {}
    for candidate, loss in outcome.ranked:
        best.setdefault(candidate.critical_dim, (candidate, loss))
    assert sorted(best) == [1, 2, 3, 4, 5]
    expected = [
        (candidate.window(NEEDLE_LENGTH, outcome.window.attention_factor), candidate.to_row() | {"split": OTHER})
        for candidate, _ in best.values()
    ]
    assert [(request.window, request.row) for request in others] == expected
    assert all((request.samples, request.gradient) == (None, False) for request in others)
    assert list(found.losses) == [1, 2, 3, 4, 5]
    for dim, (candidate, loss) in best.items():
        least = min(other.factors[-1] for other, _ in outcome.ranked if other.critical_dim == dim)
        assert candidate.factors[-1] == least
        assert found.losses[dim] == {names[0]: loss, names[1]: pytest.approx(5 + abs(dim - 2) + 0.01 * least)}


def test_the_dimension_of_a_whole_search_is_that_of_its_result(chosen: Callable[..., Any]) -> None:
    found, others, outcome = chosen(preferring(3, 5), **FIRST | {"iterations": 6})
    assert found.critical_dim == outcome.ranked[0][0].critical_dim == 3
    assert {request.row["critical_dim"] for request in others} == set(found.losses)


def test_json(chosen: Callable[..., Any]) -> None:
    found, _, _ = chosen(preferring(4, 2), **FIRST)
    said = json.loads(json.dumps(found.to_json()))
    assert said["chosen_by"] == {"needle": 4, "perplexity": 2}
    assert [row["critical_dim"] for row in said["losses"]] == [1, 2, 3, 4, 5]
    assert {key for row in said["losses"] for key in row} == {"critical_dim", "needle", "perplexity"}


@pytest.mark.parametrize(("bad", "best"), [(4, 1), (5, 2), (1, 3), (3, 5)])
def test_a_dimension_whose_other_loss_is_no_number_is_not_chosen(
    chosen: Callable[..., Any], bad: int, best: int
) -> None:
    """Wherever among the dimensions it is asked: first, last or between."""
    found, _, _ = chosen(preferring(4, best, ((OTHER, bad),)), **FIRST)
    assert found.chosen == {"needle": 4, "perplexity": best}
    assert math.isnan(found.losses[bad]["perplexity"])


def test_a_dimension_without_a_finite_search_loss_is_left_out(chosen: Callable[..., Any]) -> None:
    found, others, _ = chosen(preferring(4, 2, (("search", 2), ("search", 5))), **FIRST)
    assert list(found.losses) == [1, 3, 4]
    assert len(others) == 3
    assert found.chosen == {"needle": 4, "perplexity": 3}


def test_a_given_dimension_is_the_only_choice(chosen: Callable[..., Any]) -> None:
    found, others, _ = chosen(preferring(4, 2), **FIRST | {"critical_dim": 7})
    assert (found.critical_dim, found.chosen) == (7, {"needle": 7, "perplexity": 7})
    assert len(others) == 1


@pytest.mark.parametrize("method", ["longrope", "cma"])
@pytest.mark.parametrize("critical_dim", [None, 3])
def test_other_methods_choose_none(chosen: Callable[..., Any], method: str, critical_dim: int | None) -> None:
    options = {"population": 6, "iterations": 1} if method == "longrope" else {"evaluations": 11}
    found, others, _ = chosen(lambda _: EvalResult(1.0), method=method, samples=1, critical_dim=critical_dim, **options)
    assert found is None
    assert not others


# --- the closed forms


@pytest.mark.parametrize("dim", [19, 25, 31, 47])
def test_the_forms_are_those_of_the_dimension(dim: int) -> None:
    forms = forms_with_critical_dim(PHI3, 131_072, dim)
    assert list(forms) == ["yarn-rcd", "ntk-rcd"]
    assert forms["yarn-rcd"].factors == tuple(yarn(PHI3, 131_072, critical_dim=dim).tolist())
    assert forms["ntk-rcd"].factors == tuple(ntk_critical(PHI3, 131_072, critical_dim=dim).tolist())
    assert forms["yarn-rcd"].attention_factor == pytest.approx(0.1 * math.log(64) + 1)
    assert forms["ntk-rcd"].attention_factor == 1.0
    for window in forms.values():
        assert (window.max_length, window.start_tokens) == (131_072, 0)
        assert window.factors[dim] == pytest.approx(64)
        assert (np.diff(window.factors) >= 0).all()


def test_a_dimension_out_of_range_is_refused() -> None:
    for dim in (0, 49):
        with pytest.raises(LongRopeError, match="critical_dim"):
            forms_with_critical_dim(PHI3, 131_072, dim)


def test_a_dimension_so_low_that_no_window_holds_the_factors_is_refused() -> None:
    """64^47 at the last pair, and s^(i/d) beyond what a number holds."""
    for geometry, length in (
        (PHI3, 131_072),
        (RopeGeometry(rotary_dim=512, base=10_000.0, original_length=64), NEEDLE_LENGTH),
    ):
        with pytest.raises(LongRopeError, match=r"factors must lie in|overflow"):
            forms_with_critical_dim(geometry, length, 1)
