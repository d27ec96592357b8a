"""`longrope search` by each method, end to end on a tiny random checkpoint, and resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrope.rope.scaling import RopeScaling
from longrope.search.spaces import START_TOKENS, CriticalCandidate
from tests.search.lengths import NEEDLE_LENGTH

GRADIENT = ("--method", "gradient", "--steps", 4, "--samples", 2)
LONGROPE2 = ("--method", "longrope2", "--population", 4, "--iterations", 1, "--samples", 2)

BASELINES = {"none", "pi", "ntk", "ntk-critical", "dynamic-ntk", "yarn"}


def run(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, out: Path, length: int, *more: object
) -> dict[str, Any]:
    ran = cli(
        "search", checkpoint, "--target-length", length, "--data", texts / "search.txt", "-o", out, *more, "--json"
    )
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()[1:]]


def passes(row: dict[str, Any]) -> int:
    """Token passes of a question about 2 search or 3 validation texts."""
    texts = len(row["samples"] or ([0, 1, 2] if row["split"] == "validation" else [0, 1]))
    return int(row["length"]) * texts * (3 if "gradient" in row else 1)


def computed(rows: list[dict[str, Any]]) -> int:
    """Token passes of all different questions."""
    parts = ("length", "factors", "attention_factor", "split", "samples")
    return sum({str([row[part] for part in parts]) + str("gradient" in row): passes(row) for row in rows}.values())


def test_gradient_end_to_end(cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = run(cli, checkpoint, texts, out, 256, *GRADIENT, "--attention-factor", 1)
    assert (found["method"], found["objective"]) == ("gradient", "perplexity")
    assert "critical_dim" not in found
    assert set(found["baselines"]) == BASELINES
    rows = [line for line in lines_of(out) if "baseline" not in line]
    assert len(rows) == found["evaluations"] == (9 + 2 + 4 + 2) + (10 + 2 + 4 + 2) + 1
    stages = json.loads((out / "search.jsonl").read_text().splitlines()[0])["settings"]["stages"]
    races = ((rows[:9], stages[0]["seeds"]), (rows[17:27], [*stages[1]["seeds"], "stretched"]))
    winners = [min(zip(race, names, strict=True), key=lambda one: one[0]["loss"])[1] for race, names in races]
    assert found["chosen_seeds"] == winners
    # A forward counts 1 and a gradient 3 per token: races and the end on 2 texts, validations on 3 + 2, steps on 1.
    assert sum(map(passes, rows)) == 128 * (9 * 2 + 2 * 5 + 4 * 3) + 256 * (10 * 2 + 2 * 5 + 4 * 3 + 2)
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


def test_gradient_on_needles_learns_the_attention_factor(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    more = ("--objective", "needle", "--no-continuation", "--learn-attention-factor")
    found = run(cli, checkpoint, texts, tmp_path / "run", NEEDLE_LENGTH, *GRADIENT, *more)
    assert found["objective"] == "needle"
    rows = lines_of(tmp_path / "run")
    validated = [row["loss"] for row in rows if row.get("split") == "validation"]
    assert len(validated) == 2  # the start, the last step
    assert len({row["attention_factor"] for row in rows if "gradient" in row}) == 4
    scaling = RopeScaling.load(tmp_path / "run" / "scaling.json")
    assert {window.attention_factor for window in scaling.windows} == {rows[-1]["attention_factor"]}


@pytest.mark.parametrize("kept", [3, 9, 17, 33])
def test_a_gradient_search_cut_off_anywhere_comes_to_the_same_end(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path, kept: int
) -> None:
    """In the baselines, the first race, the first descent, and the second."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    expected = run(cli, checkpoint, texts, whole, 256, *GRADIENT)
    out.mkdir()
    lines = (whole / "search.jsonl").read_text().splitlines(keepends=True)
    (out / "search.jsonl").write_text("".join(lines[: 1 + kept]))
    found = run(cli, checkpoint, texts, out, 256, *GRADIENT, "--resume")
    assert (out / "search.jsonl").read_text() == "".join(lines)
    assert found | {"scaling": ""} == expected | {"scaling": ""}
    assert RopeScaling.load(out / "scaling.json").windows == RopeScaling.load(whole / "scaling.json").windows


def test_longrope2_end_to_end_and_resumed(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    found = run(cli, checkpoint, texts, whole, NEEDLE_LENGTH, *LONGROPE2)
    assert (found["method"], found["objective"], found["evaluations"]) == ("longrope2", "needle", 4 + 2)
    assert found["token_passes"] == 6 * 2 * NEEDLE_LENGTH
    assert 1 <= found["critical_dim"] <= 5
    assert {"yarn-rcd", "ntk-rcd", "yarn", "ntk-critical"} <= set(found["baselines"])
    rows = [line for line in lines_of(whole) if "critical_dim" in line and "split" not in line]
    assert len(rows) == 6
    best = min(rows, key=lambda row: row["loss"])
    assert (best["critical_dim"], best["loss"]) == (found["critical_dim"], found["best_loss"])
    factors = RopeScaling.load(whole / "scaling.json").windows[-1].factors
    assert factors == CriticalCandidate(best["critical_dim"], tuple(best["steps"])).factors
    assert json.loads((whole / "search.json").read_text())["critical_dim"] == found["critical_dim"]
    # What plain perplexity would have chosen, asked when the search was over: not part of its cost.
    others = [line for line in lines_of(whole) if line.get("split") == "other"]
    dims = {row["critical_dim"] for row in rows}
    assert {row["critical_dim"] for row in others} == dims
    reported = {row["critical_dim"]: row for row in found["critical_dims"]["losses"]}
    for row in others:
        dim = row["critical_dim"]
        own = min(one["loss"] for one in rows if one["critical_dim"] == dim)
        assert reported[dim] == {"critical_dim": dim, "needle": own, "perplexity": row["loss"]}
    least = min(others, key=lambda row: row["loss"])
    assert found["critical_dims"]["chosen_by"] == {
        "needle": found["critical_dim"],
        "perplexity": least["critical_dim"],
    }
    lines = (whole / "search.jsonl").read_text().splitlines(keepends=True)
    # Header, baselines, candidates, the other objective's losses, and the two forms with the dimension found.
    assert len(lines) == 1 + 6 + 6 + len(dims) + 2
    out.mkdir()
    for kept in (9, 14, len(lines) - 1):  # among the candidates, the other losses, and within the last two
        (out / "search.jsonl").write_text("".join(lines[:kept]))
        again = run(cli, checkpoint, texts, out, NEEDLE_LENGTH, *LONGROPE2, "--resume")
        assert again | {"scaling": ""} == found | {"scaling": ""}
        assert (out / "search.jsonl").read_text() == "".join(lines)


def test_a_dimension_too_low_for_the_closed_forms_costs_no_result(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    """8^15 at the last pair of NTK-rcd is more than a window holds; the candidate itself is at most 16."""
    more = ("--method", "longrope2", "--population", 1, "--iterations", 0, "--samples", 1)
    found = run(cli, checkpoint, texts, tmp_path / "run", NEEDLE_LENGTH, *more)
    assert found["critical_dim"] == 1
    assert set(found["baselines"]) == BASELINES
    assert (tmp_path / "run" / "scaling.json").exists()


def row_loss(rows: list[dict[str, Any]], place: int) -> float:
    """The loss on the validation texts plus that on the search texts, which are asked about right after."""
    return float(rows[place]["loss"] + rows[place + 1]["loss"])


CMA = ("--evaluations", 11, "--samples", 2)  # one generation


@pytest.mark.parametrize("method", ["hybrid", "cma"])
def test_cma_and_hybrid_end_to_end_and_cut_off(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path, method: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    more = ("--method", method, *CMA, *(("--steps", 2, "--no-continuation") if method == "hybrid" else ()))
    found = run(cli, checkpoint, texts, whole, 128, *more)
    assert (found["method"], found["objective"]) == (method, "perplexity")
    rows = [line for line in lines_of(whole) if "baseline" not in line]
    assert len(rows) == found["evaluations"]
    full = [row for row in rows if row["split"] == "search" and row["samples"] is None]
    best = next(row for row in full if row["loss"] == found["best_loss"])
    window = RopeScaling.load(whole / "scaling.json").windows[-1]
    assert list(window.factors) == best["factors"]
    if method == "cma":
        assert len(rows) == 9 + 1 + 11
        assert found["token_passes"] == computed(rows) < sum(map(passes, rows)) == 128 * 2 * len(rows)
        assert found["best_loss"] == min(row["loss"] for row in full)
    else:
        validated = [place for place, row in enumerate(rows) if row["split"] == "validation"]
        chosen = min(validated, key=lambda place: row_loss(rows, place))
        assert rows[chosen]["factors"] == best["factors"]
        assert {row["split"] for row in rows} == {"search", "validation"}
    lines = (whole / "search.jsonl").read_text().splitlines(keepends=True)
    out.mkdir()
    for kept in (10, len(lines) - 6, len(lines) - 1):  # in the race, in the generation, before the end
        (out / "search.jsonl").write_text("".join(lines[:kept]))
        again = run(cli, checkpoint, texts, out, 128, *more, "--resume")
        assert again | {"scaling": ""} == found | {"scaling": ""}
        assert (out / "search.jsonl").read_text() == "".join(lines)


@pytest.mark.parametrize("method", ["longrope", "longrope2"])
def test_racing_end_to_end_and_cut_off(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path, method: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    more = ("--method", method, "--population", 8, "--iterations", 3, "--samples", 3, "--racing", "on")
    found = run(cli, checkpoint, texts, whole, NEEDLE_LENGTH, *more)
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
        again = run(cli, checkpoint, texts, out, NEEDLE_LENGTH, *more, "--resume")
        assert again | {"scaling": ""} == found | {"scaling": ""}
        assert (out / "search.jsonl").read_text() == "".join(lines)


@pytest.mark.parametrize(
    "more",
    [
        ("--method", "longrope", "--population", 4, "--iterations", 0, "--samples", 1),
        (*GRADIENT, "--no-continuation"),
        ("--method", "cma", *CMA),
    ],
)
def test_every_method_reports_the_forms_with_a_given_dimension(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path, more: tuple[object, ...]
) -> None:
    """And searches as it would without."""
    runs = [
        run(cli, checkpoint, texts, tmp_path / name, 256, *more, *dim)
        for name, dim in (("plain", ()), ("three", ("--critical-dim", 3)), ("five", ("--critical-dim", 5)))
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


def test_longrope2_with_a_given_dimension(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    found = run(cli, checkpoint, texts, tmp_path / "run", NEEDLE_LENGTH, *LONGROPE2, "--critical-dim", 7)
    rows = [line for line in lines_of(tmp_path / "run") if "steps" in line]
    assert {row["critical_dim"] for row in rows} == {found["critical_dim"]} == {7}
    assert found["critical_dims"]["chosen_by"] == {"needle": 7, "perplexity": 7}
    assert set(found["baselines"]) == BASELINES | {"yarn-rcd", "ntk-rcd"}
    names = [line["baseline"] for line in lines_of(tmp_path / "run") if "baseline" in line]
    assert len(names) == len(set(names))


def test_the_table_names_the_critical_dimension(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    ran = cli(
        "search",
        checkpoint,
        "--target-length",
        NEEDLE_LENGTH,
        "--data",
        texts / "search.txt",
        "-o",
        tmp_path / "run",
        *LONGROPE2,
    )
    assert ran.code == 0
    assert re.search(r"real critical dimension: pair \d+ \(needle loss alone \d+, perplexity loss alone \d+\)", ran.out)
    assert "ntk-rcd" in ran.out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--method", "newton"), "expected a search method"),
        (("--objective", "recall"), "expected an objective"),
        (("--objective", "needle", "--needle-depth", "2"), "expected a needle depth"),
        (("--method", "gradient", "--knots", 40), "2 to 16 knots"),
        (("--method", "gradient", "--learning-rate", 0), "learning rate must be positive"),
        (("--method", "longrope2", "--start-tokens", 4), "start tokens is an option of"),
        (
            ("--method", "cma", "--evaluations", 10),
            "at least 11 evaluations, a generation of CMA-ES on 12 knots; found 10",
        ),
        (("--method", "hybrid", "--no-continuation", "--evaluations", 10), "at least 11 evaluations"),
        (("--method", "gradient", "--racing", "on"), "racing is an option of the methods longrope, longrope2"),
        (("--critical-dim", 16), "a critical dimension from 1 to 15, found 16"),
        (("--method", "longrope2", "--critical-dim", 16), "a critical dimension from 1 to 15, found 16"),
        (("--critical-dim", 0), "a critical dimension of at least 1, found 0"),
        (("--critical-dim", 1), "the critical dimension 1 is too low for NTK-rcd"),
    ],
)
def test_what_makes_no_search_leaves_nothing(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path, more: tuple[object, ...], says: str
) -> None:
    ran = cli(
        "search",
        checkpoint,
        "--target-length",
        NEEDLE_LENGTH,
        "--data",
        texts / "search.txt",
        "-o",
        tmp_path / "run",
        *more,
    )
    assert ran.code == 2
    assert says in ran.err
    assert not (tmp_path / "run").exists()


def test_another_search_is_not_resumed(cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(cli, checkpoint, texts, out, 128, *GRADIENT)
    for more in (("--learning-rate", 0.2), ("--knots", 4), ("--seed", 1), ("--critical-dim", 4)):
        ran = cli(
            "search",
            checkpoint,
            "--target-length",
            128,
            "--data",
            texts / "search.txt",
            "-o",
            out,
            *GRADIENT,
            *more,
            "--resume",
        )
        assert ran.code == 2
        assert "the log of another search" in ran.err


@pytest.mark.parametrize(
    "method",
    [
        ("gradient", "--steps", 2, "--no-continuation"),
        ("hybrid", "--steps", 2, "--no-continuation", *CMA),
        ("cma", *CMA),
    ],
    ids=lambda method: method[0],
)
def test_bounds_and_start_tokens_end_to_end(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path, method: tuple[Any, ...]
) -> None:
    """PI's factors are 2 here: a largest λ of 1.5 cuts them, and n̂ is chosen when the factors are."""
    more = ("--method", *method, "--max-factor", 1.5, "--start-tokens")
    found = run(cli, checkpoint, texts, tmp_path / "given", 128, *more, 8)
    rows = [line for line in lines_of(tmp_path / "given") if "baseline" not in line]
    assert {row["start_tokens"] for row in rows} == {8}
    assert max(max(row["factors"]) for row in rows) == 1.5
    assert RopeScaling.load(tmp_path / "given" / "scaling.json").windows[-1].start_tokens == 8
    searched = run(cli, checkpoint, texts, tmp_path / "searched", 128, *more, "search")
    window = RopeScaling.load(tmp_path / "searched" / "scaling.json").windows[-1]
    tried = [
        row.get("start_tokens", 0)
        for row in lines_of(tmp_path / "searched")
        if row.get("factors") == list(window.factors) and row["split"] == "search" and row["samples"] is None
    ]
    assert set(START_TOKENS) <= set(tried)
    assert searched["evaluations"] > found["evaluations"]


def test_a_stop_between_the_two_result_files_loses_neither(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = ("--method", "cma", *CMA)
    run(cli, checkpoint, texts, out, 128, *more)
    for name in ("search.json", "scaling.json"):
        before = json.loads((out / name).read_text())
        (out / name).unlink()
        run(cli, checkpoint, texts, out, 128, *more, "--resume")
        assert json.loads((out / name).read_text()).keys() == before.keys()
