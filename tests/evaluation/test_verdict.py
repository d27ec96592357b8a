"""The verdict of an evaluation: the best within the standard error, and the difference to the original model."""

from __future__ import annotations

import math

import pytest

from longrope.evaluation.results import EvalRow, mean_and_stderr
from longrope.evaluation.verdict import Measured, alike, best_by_length, headline_cells, rank_methods, verdict


def row(name: str, length: int, value: float, stderr: float | None = 0.1, **more: object) -> EvalRow:
    fields = {"suite": "perplexity", "metric": "perplexity", "trials": 10, "detail": {}} | more
    return EvalRow(scaling=name, length=length, value=value, stderr=stderr, **fields)


def test_alike_are_those_within_the_standard_error_of_the_difference():
    values = {"a": Measured(10.0, 0.3), "b": Measured(10.49, 0.4), "c": Measured(10.51, 0.4), "d": Measured(9.99, None)}
    ranking = rank_methods({name: values[name] for name in "abc"}, lower_is_better=True)
    assert (ranking.best, ranking.alike) == ("a", ("b",))  # √(0.3² + 0.4²) = 0.5
    assert rank_methods(values, lower_is_better=True).best == "d"
    assert rank_methods(values, lower_is_better=False).best == "c"


def test_losses_of_the_same_texts_are_compared_text_by_text():
    """Texts differ by 1 nat, methods by 0.01: that is a difference. Between other texts it is none."""
    texts = {"x": 3.0, "y": 4.0, "z": 5.0}
    better = {text: loss - 0.01 - 0.001 * place for place, (text, loss) in enumerate(texts.items())}
    mixed = {"x": 2.9, "y": 4.05, "z": 5.01}
    ranking = rank_methods(
        {"a": Measured(54.6, 30.0, texts), "b": Measured(54.0, 30.0, better), "c": Measured(54.2, 30.0, mixed)},
        lower_is_better=True,
    )
    assert (ranking.best, ranking.alike) == ("b", ("c",))
    assert alike(Measured(54.6, 30.0, texts), Measured(54.0, 30.0, {f"other {text}": better[text] for text in better}))
    assert alike(Measured(54.6, None, {"x": 3.0}), Measured(54.6, None, {"x": 3.0}))


def test_one_method_and_numbers_that_are_none_have_no_rank():
    assert rank_methods({"a": Measured(1.0)}, lower_is_better=True) is None
    assert rank_methods({"a": Measured(math.nan), "b": Measured(math.inf)}, lower_is_better=True) is None
    assert rank_methods({"a": Measured(math.nan), "b": Measured(2.0)}, lower_is_better=True).best == "b"


def test_needles_of_all_depths_count_together():
    needles = [
        row("a", 64, share, suite="needle", metric="accuracy", detail={"depth": depth})
        for depth, share in ((0.0, 1.0), (1.0, 0.5))
    ]
    cells = headline_cells(needles, "needle")
    assert cells["a"][64].value == 0.75
    assert cells["a"][64].stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 19))


@pytest.mark.parametrize("trials", [5, 8, 10, 16, 20, 25, 30, 40, 50, 64, 100, 200, 300])
def test_all_and_all_but_one_are_alike_however_many(trials: int):
    """They are one standard error of the difference apart, and no rounding decides."""
    all_of_them, but_one = ([1.0] * trials, [1.0] * (trials - 1) + [0.0])
    assert alike(Measured(*mean_and_stderr(all_of_them)), Measured(*mean_and_stderr(but_one)))
    needles = [
        row(name, 64, hit, suite="needle", metric="accuracy", trials=1, detail={"depth": place})
        for name, hits in (("a", all_of_them), ("b", but_one))
        for place, hit in enumerate(hits)
    ]
    assert best_by_length(headline_cells(needles, "needle"), "needle")[64].winners == {"a", "b"}


def test_what_was_measured_twice_counts_once():
    """Only needles are shares of depths; of two perplexities at one length the one of more texts stands."""
    rows = [row("a", 64, 50.0, trials=2), row("a", 64, 55.0, trials=60), row("a", 64, 40.0, trials=5)]
    assert headline_cells(rows, "perplexity")["a"][64].value == 55.0


def test_the_sentences():
    rows = [row("none", 64, 5.0), row("none", 256, 50.0), row("yarn", 64, 5.5), row("yarn", 256, 6.1)]
    rows += [row("own", 64, 5.1), row("own", 256, 6.0)]
    cells = headline_cells(rows, "perplexity")
    assert best_by_length(cells, "perplexity")[64].winners == {"none", "own"}
    assert verdict(cells, "perplexity", "own") == [
        "Best at 256 tokens: own, perplexity 6.00; within the standard error of the difference: yarn.",
        "own against the original model (none): +2.0% at 64, −88.0% at 256.",
    ]
    alone = headline_cells([row("own", 64, 5.1)], "perplexity")
    assert verdict(alone, "perplexity", "own") == []


def test_shares_differ_by_points():
    passkey = {"suite": "passkey", "metric": "accuracy"}
    rows = [row("original", 64, 0.9, **passkey), row("own", 64, 0.4, **passkey)]
    assert verdict(headline_cells(rows, "passkey"), "passkey", "own") == [
        "Best at 64 tokens: original, 90.0% of the passkeys.",
        "own against the original model (original): −50.0 points at 64.",
    ]
