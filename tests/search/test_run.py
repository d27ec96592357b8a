"""A search by each method, end to end on a tiny random checkpoint, and resumed; and its front door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrope.errors import LongRopeError
from longrope.models.apply import applied_scaling, apply_scaling
from longrope.models.loading import LoadedModel
from longrope.rope.closed_forms import yarn
from longrope.rope.scaling import RopeScaling
from longrope.search.config import START_TOKENS, SearchConfig
from longrope.search.recover import recover_scaling
from longrope.search.run import search, search_scaling
from longrope.search.spaces import CriticalCandidate
from tests.search.lengths import NEEDLE_LENGTH
from tests.search.slopes import starts_of

GRADIENT: dict[str, Any] = {"method": "gradient", "steps": 4, "samples": 2}
LONGROPE2: dict[str, Any] = {"method": "longrope2", "population": 4, "iterations": 1, "samples": 2}
CMA: dict[str, Any] = {"evaluations": 11, "samples": 2}  # one generation
JUMP: dict[str, Any] = {"continuation": False}

Run = Callable[..., dict[str, Any]]
BASELINES = {"none", "pi", "ntk", "ntk-critical", "dynamic-ntk", "yarn"}


@pytest.fixture
def run(loaded: LoadedModel, source: list[str]) -> Callable[..., dict[str, Any]]:
    """`run(out, length, method=…)`: the summary of a search into the folder `out`."""

    def make(out: Path, length: int, *, resume: bool = False, **config: Any) -> dict[str, Any]:
        found = search(loaded, length, source, out, SearchConfig(**config), resume=resume)
        summary: dict[str, Any] = json.loads(json.dumps(found.to_json()))
        return summary

    return make


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()[1:]]


def passes(row: dict[str, Any]) -> int:
    """Token passes of a request about 2 search or 3 validation texts."""
    texts = len(row["samples"] or ([0, 1, 2] if row["split"] == "validation" else [0, 1]))
    return int(row["length"]) * texts * (3 if "gradient" in row else 1)


def computed(rows: list[dict[str, Any]]) -> int:
    """Token passes of all different requests."""
    parts = ("length", "factors", "attention_factor", "split", "samples")
    return sum({str([row[part] for part in parts]) + str("gradient" in row): passes(row) for row in rows}.values())


def test_gradient_end_to_end(run: Run, loaded: LoadedModel, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = run(out, 256, **GRADIENT, attention_factor=1)
    assert (found["method"], found["objective"]) == ("gradient", "perplexity")
    assert "critical_dim" not in found
    assert set(found["baselines"]) == BASELINES
    rows = [line for line in lines_of(out) if "baseline" not in line]
    n = len(starts_of(rows))
    m = len(starts_of(rows[n + 8 :]))
    assert len(rows) == found["evaluations"] == (n + 2 + 4 + 2) + (m + 2 + 4 + 2) + 1
    stages = json.loads((out / "search.jsonl").read_text().splitlines()[0])["settings"]["stages"]
    names = [stages[0]["seeds"], [*stages[1]["seeds"], "stretched"]]
    for tried, seeds, chosen in zip((rows[:n], rows[n + 8 :][:m]), names, found["chosen_seeds"], strict=True):
        losses = {tuple(row["factors"]): row["loss"] for row in tried[:-4]}
        assert len(losses) > len(seeds) + 2  # ramps too
        final = min(tried[-4:], key=lambda row: row["loss"] + losses[tuple(row["factors"])])
        place = list(losses).index(tuple(final["factors"]))
        if place < len(seeds):
            assert chosen == seeds[place]
        else:
            fast, slow = (float(turns.split()[-1]) for turns in chosen.removeprefix("ramp, ").split(", "))
            ramp = yarn(loaded.geometry, tried[0]["length"], fast, slow, truncate=False)
            assert final["factors"] == pytest.approx(ramp.tolist(), rel=0.01)  # the name has three digits
    # A forward counts 1 and a gradient 3 per token: starts on 1 text, the end on 2, validations on 3 + 2, steps on 1.
    assert sum(map(passes, rows)) == 128 * (n + 2 * 5 + 4 * 3) + 256 * (m + 2 * 5 + 4 * 3 + 2)
    assert found["token_passes"] == computed(rows) < sum(map(passes, rows))  # the result was known before the end
    steps = [row for row in rows if "gradient" in row]
    assert len(steps) == 8
    assert all(len(row["gradient"]) == 17 and row["samples"] in ([0], [1]) for row in steps)
    assert any(value != 0.0 for row in steps for value in row["gradient"][:-1])
    scaling = RopeScaling.load(out / "scaling.json")
    assert [window.max_length for window in scaling.windows] == [64, 256]
    assert scaling.windows[0].is_identity
    best = scaling.windows[-1]
    assert (list(best.factors), found["best_loss"]) == (rows[-1]["factors"], rows[-1]["loss"])
    last = [place for place, row in enumerate(rows) if row["split"] == "validation" and row["length"] == 256]
    chosen = min(last, key=lambda place: row_loss(rows, place))
    assert list(best.factors) == rows[chosen]["factors"] == rows[chosen + 1]["factors"]
    assert {row["split"] for row in scaling.provenance["data"]["samples"]} == {"search", "validation"}


def test_gradient_on_needles_learns_the_attention_factor(run: Run, tmp_path: Path) -> None:
    more = {"objective": "needle", "learn_attention_factor": True}
    found = run(tmp_path / "run", NEEDLE_LENGTH, **GRADIENT, **JUMP, **more)
    assert found["objective"] == "needle"
    rows = lines_of(tmp_path / "run")
    validated = [row["loss"] for row in rows if row.get("split") == "validation"]
    assert len(validated) == 2  # the start, the last step
    assert len({row["attention_factor"] for row in rows if "gradient" in row}) == 4
    scaling = RopeScaling.load(tmp_path / "run" / "scaling.json")
    assert {window.attention_factor for window in scaling.windows} == {rows[-1]["attention_factor"]}


def test_a_gradient_search_cut_off_anywhere_comes_to_the_same_end(run: Run, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    expected = run(whole, 256, **GRADIENT)
    lines = (whole / "search.jsonl").read_text().splitlines(keepends=True)
    first, *_, last = [place for place, row in enumerate(lines_of(whole)) if "gradient" in row]
    for kept in (
        3,
        9,
        15,
        first + 2,
        last - 1,
    ):  # baselines, seeds, ramps, first and last descent
        out = tmp_path / f"{kept}"
        out.mkdir()
        (out / "search.jsonl").write_text("".join(lines[: 1 + kept]))
        found = run(out, 256, **GRADIENT, resume=True)
        assert (out / "search.jsonl").read_text() == "".join(lines)
        assert found | {"scaling": ""} == expected | {"scaling": ""}
        assert RopeScaling.load(out / "scaling.json").windows == RopeScaling.load(whole / "scaling.json").windows


def test_longrope2_end_to_end_and_resumed(run: Run, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    found = run(whole, NEEDLE_LENGTH, **LONGROPE2)
    assert (found["method"], found["objective"]) == ("longrope2", "needle")
    assert 4 < found["evaluations"] <= 4 + 2  # corners crossed are nothing new
    assert found["token_passes"] == found["evaluations"] * 2 * NEEDLE_LENGTH
    assert 1 <= found["critical_dim"] <= 5
    assert {"yarn-rcd", "ntk-rcd", "yarn", "ntk-critical"} <= set(found["baselines"])
    rows = [line for line in lines_of(whole) if "critical_dim" in line and "split" not in line]
    assert len(rows) == found["evaluations"]
    best = min(rows, key=lambda row: row["loss"])
    assert (best["critical_dim"], best["loss"]) == (found["critical_dim"], found["best_loss"])
    factors = RopeScaling.load(whole / "scaling.json").windows[-1].factors
    assert factors == CriticalCandidate(best["critical_dim"], tuple(best["steps"])).factors
    assert json.loads((whole / "search.json").read_text())["critical_dim"] == found["critical_dim"]
    # The choice of plain perplexity, evaluated when the search was over: not part of its cost.
    others = [line for line in lines_of(whole) if line.get("split") == "other"]
    dims = {row["critical_dim"] for row in rows}
    assert {row["critical_dim"] for row in others} == dims
    reported = {row["critical_dim"]: row for row in found["critical_dims"]["losses"]}
    for row in others:
        dim = row["critical_dim"]
        own = min(one["loss"] for one in rows if one["critical_dim"] == dim)
        assert reported[dim] == {"critical_dim": dim, "needle": own, "perplexity": row["loss"]}
    least = min(others, key=lambda row: row["loss"])
    assert found["critical_dims"]["chosen_by"] == {"needle": found["critical_dim"], "perplexity": least["critical_dim"]}
    lines = (whole / "search.jsonl").read_text().splitlines(keepends=True)
    # Header, baselines, candidates, the other objective's losses, and the two forms with the dimension found.
    assert len(lines) == 1 + 6 + len(rows) + len(dims) + 2
    out.mkdir()
    for kept in (9, 14, len(lines) - 1):  # among the candidates, the other losses, and within the last two
        (out / "search.jsonl").write_text("".join(lines[:kept]))
        again = run(out, NEEDLE_LENGTH, **LONGROPE2, resume=True)
        assert again | {"scaling": ""} == found | {"scaling": ""}
        assert (out / "search.jsonl").read_text() == "".join(lines)


def test_a_dimension_too_low_for_the_closed_forms_costs_no_result(run: Run, tmp_path: Path) -> None:
    """8^15 at the last pair of NTK-rcd is more than a window holds; the candidate itself is at most 16."""
    found = run(tmp_path / "run", NEEDLE_LENGTH, method="longrope2", population=1, iterations=0, samples=1)
    assert found["critical_dim"] == 1
    assert set(found["baselines"]) == BASELINES
    assert (tmp_path / "run" / "scaling.json").exists()


def row_loss(rows: list[dict[str, Any]], place: int) -> float:
    """The loss on the validation texts plus that on the search texts, which are asked about right after."""
    return float(rows[place]["loss"] + rows[place + 1]["loss"])


@pytest.mark.parametrize("method", ["hybrid", "cma"])
def test_cma_and_hybrid_end_to_end_and_cut_off(run: Run, tmp_path: Path, method: str) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    more = {"method": method, **CMA, **({"steps": 2, **JUMP} if method == "hybrid" else {})}
    found = run(whole, 128, **more)
    assert (found["method"], found["objective"]) == (method, "perplexity")
    rows = [line for line in lines_of(whole) if "baseline" not in line]
    assert len(rows) == found["evaluations"]
    full = [row for row in rows if row["split"] == "search" and row["samples"] is None]
    best = next(row for row in full if row["loss"] == found["best_loss"])
    window = RopeScaling.load(whole / "scaling.json").windows[-1]
    assert list(window.factors) == best["factors"]
    if method == "cma":
        tried = len(starts_of(rows))
        assert len(rows) == tried + 1 + 11
        assert found["token_passes"] == computed(rows) == sum(map(passes, rows)) == 128 * (tried + 2 * 12)
        assert found["best_loss"] == min(row["loss"] for row in full)
    else:
        validated = [place for place, row in enumerate(rows) if row["split"] == "validation"]
        chosen = min(validated, key=lambda place: row_loss(rows, place))
        assert rows[chosen]["factors"] == best["factors"]
        assert {row["split"] for row in rows} == {"search", "validation"}
    lines = (whole / "search.jsonl").read_text().splitlines(keepends=True)
    out.mkdir()
    for kept in (10, len(lines) - 6, len(lines) - 1):  # among the starts, in the generation, before the end
        (out / "search.jsonl").write_text("".join(lines[:kept]))
        again = run(out, 128, **more, resume=True)
        assert again | {"scaling": ""} == found | {"scaling": ""}
        assert (out / "search.jsonl").read_text() == "".join(lines)


@pytest.mark.parametrize("method", ["longrope", "longrope2"])
def test_racing_end_to_end_and_cut_off(run: Run, tmp_path: Path, method: str) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    more: dict[str, Any] = {"method": method, "population": 8, "iterations": 3, "samples": 3, "racing": True}
    found = run(whole, NEEDLE_LENGTH, **more)
    rows = [line for line in lines_of(whole) if "steps" in line and "split" not in line]
    assert len(rows) == found["evaluations"]
    assert found["token_passes"] == NEEDLE_LENGTH * len(rows)  # a text at a time
    scored: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        scored.setdefault(json.dumps(row["steps"]), []).append(row)
    assert 8 < len(scored) <= 8 + 3 * 4
    assert all([row["samples"] for row in one] == [[n] for n in range(len(one))] for one in scored.values())
    complete = {steps: one for steps, one in scored.items() if len(one) == 3}
    assert len(complete) < len(scored)
    losses = {steps: sum(row["loss"] for row in one) / 3 for steps, one in complete.items()}
    assert found["best_loss"] == pytest.approx(min(losses.values()), rel=1e-3 if method == "longrope2" else 1e-9)
    lines = (whole / "search.jsonl").read_text().splitlines(keepends=True)
    out.mkdir()
    for kept in (20, len(lines) - 9):
        (out / "search.jsonl").write_text("".join(lines[:kept]))
        again = run(out, NEEDLE_LENGTH, **more, resume=True)
        assert again | {"scaling": ""} == found | {"scaling": ""}
        assert (out / "search.jsonl").read_text() == "".join(lines)


@pytest.mark.parametrize(
    "more",
    [{"method": "longrope", "population": 4, "iterations": 0, "samples": 1}, GRADIENT | JUMP, {"method": "cma", **CMA}],
)
def test_every_method_reports_the_forms_with_a_given_dimension(run: Run, tmp_path: Path, more: dict[str, Any]) -> None:
    """And searches as it would without."""
    runs = [
        run(tmp_path / name, 256, **more, critical_dim=dim)
        for name, dim in (("plain", None), ("three", 3), ("five", 5))
    ]
    plain, three, five = (one["baselines"] for one in runs)
    assert set(plain) == BASELINES
    assert set(three) == set(five) == BASELINES | {"yarn-rcd", "ntk-rcd"}
    assert all("critical_dim" not in one for one in runs)
    # d_tcd of the checkpoint is 5: with it, NTK-rcd is NTK by critical dimension, and YaRN-rcd is YaRN.
    assert (five["ntk-rcd"], five["yarn-rcd"]) == (five["ntk-critical"], five["yarn"])
    assert three["ntk-rcd"] != five["ntk-rcd"]
    assert three["yarn-rcd"] != five["yarn-rcd"]
    assert len({one["best_loss"] for one in runs}) == 1
    assert {one["token_passes"] for one in runs} == {runs[0]["token_passes"]}


def test_longrope2_with_a_given_dimension(run: Run, tmp_path: Path) -> None:
    found = run(tmp_path / "run", NEEDLE_LENGTH, **LONGROPE2, critical_dim=7)
    rows = [line for line in lines_of(tmp_path / "run") if "steps" in line]
    assert {row["critical_dim"] for row in rows} == {found["critical_dim"]} == {7}
    assert found["critical_dims"]["chosen_by"] == {"needle": 7, "perplexity": 7}
    assert set(found["baselines"]) == BASELINES | {"yarn-rcd", "ntk-rcd"}
    names = [line["baseline"] for line in lines_of(tmp_path / "run") if "baseline" in line]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"objective": "needle", "needle_depth": "2"}, "a needle depth"),
        ({"method": "gradient", "knots": 40}, "2 to 16 knots"),
        ({"method": "hybrid", **JUMP, "evaluations": 10}, "at least 11 evaluations"),
        ({"critical_dim": 16}, "from 1 to 15, found 16"),
        ({"method": "longrope2", "critical_dim": 16, "baselines": False}, "from 1 to 15, found 16"),
        ({"method": "longrope2", "critical_dim": 16}, "from 1 to 15, found 16"),
        ({"critical_dim": 1}, "`critical_dim` 1 is too low for NTK-rcd"),
    ],
)
def test_a_config_that_makes_no_search_leaves_nothing(
    run: Run, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(LongRopeError, match=says):
        run(tmp_path / "run", NEEDLE_LENGTH, **config)
    assert not (tmp_path / "run").exists()


def test_another_search_is_not_resumed(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "run", 128, **GRADIENT)
    for other in ({"learning_rate": 0.2}, {"knots": 4}, {"seed": 1}, {"critical_dim": 4}, {"baselines": False}):
        with pytest.raises(LongRopeError) as error:
            run(tmp_path / "run", 128, **GRADIENT, **other, resume=True)
        assert error.value.code == "other-run"


@pytest.mark.parametrize(
    "method",
    [
        {"method": "gradient", "steps": 2, "samples": 2, **JUMP},
        {"method": "hybrid", "steps": 2, **JUMP, **CMA},
        {"method": "cma", **CMA},
    ],
    ids=lambda method: method["method"],
)
def test_bounds_and_start_tokens_end_to_end(run: Run, tmp_path: Path, method: dict[str, Any]) -> None:
    """PI's factors are 2 here: a largest λ of 1.5 cuts them, and n̂ is chosen when the factors are."""
    found = run(tmp_path / "given", 128, **method, max_factor=1.5, start_tokens=8)
    rows = [line for line in lines_of(tmp_path / "given") if "baseline" not in line]
    assert {row["start_tokens"] for row in rows} == {8}
    assert max(max(row["factors"]) for row in rows) == 1.5
    assert RopeScaling.load(tmp_path / "given" / "scaling.json").windows[-1].start_tokens == 8
    searched = run(tmp_path / "searched", 128, **method, max_factor=1.5, start_tokens="search")
    window = RopeScaling.load(tmp_path / "searched" / "scaling.json").windows[-1]
    tried = [
        row.get("start_tokens", 0)
        for row in lines_of(tmp_path / "searched")
        if row.get("factors") == list(window.factors) and row["split"] == "search" and row["samples"] is None
    ]
    assert set(START_TOKENS) <= set(tried)
    assert searched["evaluations"] > found["evaluations"]


def test_a_stop_between_the_two_result_files_loses_neither(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more: dict[str, Any] = {"method": "cma", **CMA}
    run(out, 128, **more)
    for name in ("search.json", "scaling.json"):
        before = json.loads((out / name).read_text())
        (out / name).unlink()
        run(out, 128, **more, resume=True)
        assert json.loads((out / name).read_text()).keys() == before.keys()


# --- the front door


def test_the_front_door_on_a_loaded_model(
    loaded: LoadedModel, source: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    """A transformers model and its tokenizer, a length and a source as text; the model keeps what was applied to it."""
    config = SearchConfig(method="longrope", population=4, iterations=0, samples=1)
    result = search(loaded, 128, source, tmp_path / "named", config)
    assert "method='longrope'" in repr(result)
    assert len(repr(result)) < 500
    expected = result.scaling
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    applied = apply_scaling(model, RopeScaling.extended(loaded.geometry, 96, (1.5,) * 16))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model.train()
    found = search_scaling(model, tokenizer, target_length="128", data=source[0], config=config)
    assert found.windows == expected.windows
    assert all(module.training for module in model.modules())
    assert applied_scaling(model) == applied.scaling
    given: dict[str, Any] = {"data": source, "config": config, "output_dir": str(tmp_path / "run"), "resume": True}
    for _ in range(2):  # the same call begins a search and continues it
        again = search_scaling(checkpoint, target_length=128, **given)
        assert again.windows == expected.windows
        assert RopeScaling.load(tmp_path / "run" / "scaling.json") == again
    with pytest.raises(LongRopeError) as error:
        search_scaling(model, tokenizer, target_length=128, data=source, config=config, resume=True)
    assert error.value.code == "not-resumable"
    with pytest.raises(LongRopeError, match="above the model's window of 64"):
        search_scaling(model, tokenizer, target_length=64, data=source, config=config)
    assert applied_scaling(model) == applied.scaling


@pytest.mark.parametrize("resume", [False, True])  # where nothing has begun, a search begins
def test_a_taken_folder_is_refused_before_a_model_is_opened_and_workers_start(
    loaded: LoadedModel, source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    starts = Mock(side_effect=AssertionError)
    for name in ("open_model", "ray_evaluator", "prepare_texts"):
        monkeypatch.setattr(f"longrope.search.run.{name}", starts)
    monkeypatch.setattr("longrope.search.recover.open_model", starts)
    given: dict[str, Any] = {"data": source, "output_dir": tmp_path, "workers": 2, "resume": resume}
    for begin in (
        lambda: search_scaling("no-such-model", target_length=128, **given),
        lambda: recover_scaling("no-such-model", lengths=128, **given),
        lambda: search(loaded, 128, source, tmp_path, workers=2),
    ):
        with pytest.raises(LongRopeError) as error:
            begin()
        assert error.value.code == "output-exists"
    assert starts.mock_calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
