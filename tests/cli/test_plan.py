"""`longrope plan` as a user runs it: a table, what does not fit, one JSON object, one line for what cannot be."""

from __future__ import annotations

import json

import pytest


def test_a_recommendation_a_table_and_one_sentence_of_assumptions(cli, checkpoint):
    shown = cli("plan", checkpoint, "--target-length", 256, "--gpu", "h100", "--gpus", 8)
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert "64 -> 256 tokens on 8 × h100, bfloat16" in lines[0]
    assert lines[1].startswith("Recommended: search --method gradient, without training: < 1 s (< 0.01 GPU-hours), ")
    for name in ("search longrope2", "search gradient", "finetune longrope", "evaluate perplexity"):
        assert name in shown.out
    assert "does not fit" not in shown.out
    assert "989 TFLOP/s" in shown.out
    assert "Assumed, not measured" in shown.out
    assert "FLOPs, details" in lines[-1]
    verbose = cli("plan", checkpoint, "--target-length", 256, "--verbose").out
    assert "evaluations, objective perplexity" in verbose
    assert "e+1" in verbose  # FLOPs
    assert "AdamW" in verbose


def test_cells_have_units(cli, checkpoint):
    shown = cli("plan", checkpoint, "--target-length", 256, "--tflops", 0.001, "--method", "cma")
    cells = next(line for line in shown.out.splitlines() if line.startswith("search cma")).split()
    assert cells[2][-1] in "kM"  # tokens
    assert cells[4] in ("kB", "MB", "GB")
    found = json.loads(cli("plan", checkpoint, "--target-length", 256, "--gpus", 4, "--json").out)
    assert all(row["gpu_hours"] == row["hours"] * row["devices"] for row in found["rows"])
    assert found["recommended"] == "gradient"


def test_json_is_one_object(cli, checkpoint):
    ran = cli("plan", checkpoint, "--target-length", 256, "--method", "cma", "--json")
    found = json.loads(ran.out)
    assert {"model", "target_length", "devices", "rows", "assumptions"} <= found.keys()
    assert [row["name"] for row in found["rows"] if row["stage"] == "search"] == ["cma"]
    assert {"tokens", "matrix_flops", "attention_flops", "peak_bytes", "fits", "hours"} <= found["rows"][0].keys()


def test_the_rate_is_adjustable(cli, checkpoint):
    def hours(*options):
        ran = cli("plan", checkpoint, "--target-length", 256, "--method", "cma", "--json", *options)
        return json.loads(ran.out)["rows"][0]["hours"]

    base = hours("--mfu", 0.5)
    assert hours("--mfu", 0.25) == pytest.approx(2 * base)
    assert hours("--tflops", 98.9) == pytest.approx(10 * base)
    assert hours("--attention-mfu", 0.2) > base


def test_what_does_not_fit_is_said(cli, checkpoint):
    shown = cli("plan", checkpoint, "--target-length", 256, "--method", "gradient", "--gpu-memory", 0.001)
    assert shown.code == 0
    assert "does not fit: search gradient: needs" in shown.out


def test_a_training_of_ones_own(cli, checkpoint):
    options = ("--train-steps", 10, "--train-batch", 4, "--train-length", 128, "--mix", "short:0.5,long:0.5")
    found = json.loads(cli("plan", checkpoint, "--target-length", 256, *options, "--json").out)
    (row,) = (row for row in found["rows"] if row["stage"] == "finetune")
    assert (row["name"], row["tokens"], row["length"]) == ("given", 10 * 4 * 128, 128)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target-length", "64"), "above the model's window of 64"),
        (("--target-length", "256", "--gpu", "tpu"), "expected a GPU of"),
        (("--target-length", "256", "--train-length", "512"), "--train-length of at most 256 for training"),
        (("--target-length", "256", "--gpus", "4", "--context-parallel", "3"), "divides 4"),
    ],
)
def test_bad_input_is_one_line(cli, checkpoint, options, said):
    ran = cli("plan", checkpoint, *options)
    assert said in ran.refusal
    assert not ran.out
