"""`longrope search` by each method, end to end on a tiny random checkpoint, and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrope.rope.scaling import RopeScaling
from longrope.search.critical import CriticalCandidate
from tests.checkpoints import WINDOW

NEEDLE_LENGTH = 8 * WINDOW  # instruction, needle, question and answer alone take some 300 tokens of the tiny tokenizer


GRADIENT = ("--method", "gradient", "--steps", 4, "--samples", 2)
LONGROPE2 = ("--method", "longrope2", "--population", 4, "--iterations", 1, "--samples", 2)


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


def test_gradient_end_to_end(cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = run(cli, checkpoint, texts, out, 256, *GRADIENT, "--attention-factor", 1)
    assert (found["method"], found["objective"]) == ("gradient", "perplexity")
    assert "critical_dim" not in found
    assert set(found["baselines"]) == {"none", "pi", "ntk", "ntk-critical", "dynamic-ntk", "yarn"}
    rows = [line for line in lines_of(out) if "baseline" not in line]
    assert len(rows) == found["evaluations"] == (4 + 1 + 4 + 1 + 1) + (5 + 1 + 4 + 1 + 1) + 1
    # A forward counts 1 and a gradient 3 per token: races and the end on 2 texts, validations on 3, steps on 1.
    assert found["token_passes"] == 128 * (4 * 2 + 3 * 3 + 4 * 3) + 256 * (5 * 2 + 3 * 3 + 4 * 3 + 2)
    steps = [row for row in rows if "gradient" in row]
    assert len(steps) == 8
    assert all(len(row["gradient"]) == 17 and row["samples"] in ([0], [1]) for row in steps)
    assert any(value != 0.0 for row in steps for value in row["gradient"][:-1])
    scaling = RopeScaling.load(out / "scaling.json")
    assert [window.max_length for window in scaling.windows] == [64, 256]
    assert scaling.windows[0].is_identity
    best = scaling.windows[-1]
    assert (list(best.factors), found["best_loss"]) == (rows[-1]["factors"], rows[-1]["loss"])
    last = [row for row in rows if row["split"] == "validation" and row["length"] == 256]
    assert list(best.factors) == min(last, key=lambda row: row["loss"])["factors"]
    assert {row["split"] for row in scaling.provenance["data"]["samples"]} == {"search", "validation"}


def test_gradient_on_needles_learns_the_attention_factor(
    cli: Callable[..., Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    more = ("--objective", "needle", "--no-continuation", "--learn-attention-factor")
    found = run(cli, checkpoint, texts, tmp_path / "run", NEEDLE_LENGTH, *GRADIENT, *more)
    assert found["objective"] == "needle"
    rows = lines_of(tmp_path / "run")
    validated = [row["loss"] for row in rows if row.get("split") == "validation"]
    assert len(validated) == 3  # the start, the last step, the seed itself
    assert len({row["attention_factor"] for row in rows if "gradient" in row}) == 4
    scaling = RopeScaling.load(tmp_path / "run" / "scaling.json")
    assert {window.attention_factor for window in scaling.windows} == {rows[-1]["attention_factor"]}


@pytest.mark.parametrize("kept", [3, 9, 14, 22])
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
    rows = [line for line in lines_of(whole) if "critical_dim" in line]
    assert len(rows) == 6
    best = min(rows, key=lambda row: row["loss"])
    assert (best["critical_dim"], best["loss"]) == (found["critical_dim"], found["best_loss"])
    factors = RopeScaling.load(whole / "scaling.json").windows[-1].factors
    assert factors == CriticalCandidate(best["critical_dim"], tuple(best["steps"])).factors
    assert json.loads((whole / "search.json").read_text())["critical_dim"] == found["critical_dim"]
    lines = (whole / "search.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 6 + 6 + 2  # header, baselines, candidates, and the two with the dimension found
    out.mkdir()
    for kept in (9, 14):  # among the candidates, and within the last two
        (out / "search.jsonl").write_text("".join(lines[:kept]))
        assert (
            run(cli, checkpoint, texts, out, NEEDLE_LENGTH, *LONGROPE2, "--resume")["baselines"] == found["baselines"]
        )
        assert (out / "search.jsonl").read_text() == "".join(lines)


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
    assert "real critical dimension: pair" in ran.out
    assert "ntk-rcd" in ran.out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--method", "newton"), "expected a search method"),
        (("--objective", "recall"), "expected an objective"),
        (("--objective", "needle", "--needle-depth", "2"), "expected a needle depth"),
        (("--method", "gradient", "--knots", 40), "2 to 16 knots"),
        (("--method", "gradient", "--learning-rate", 0), "learning rate must be positive"),
        (("--method", "gradient", "--start-tokens", 4), "method longrope only"),
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
    for more in (("--learning-rate", 0.1), ("--knots", 4), ("--seed", 1)):
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
