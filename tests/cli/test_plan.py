"""`longrope plan` as a user runs it: a table, what does not fit, one JSON object, one line for what cannot be."""

from __future__ import annotations

import json

import pytest


def test_a_recommendation_a_table_and_one_sentence_of_assumptions(cli, checkpoint):
    shown = cli("plan", checkpoint, "--target-length", 256, "--gpu", "h100", "--gpus", 8)
    assert shown.code == 0
    lines = shown.out.splitlines()
    said = " ".join(shown.out.split())
    assert "64 -> 256 tokens on 8 × NVIDIA H100 SXM 80 GB, bfloat16 Recommended: search" in said
    assert "Recommended: search --method gradient, without training: < 1 s (< 0.01 GPU-hours), " in said
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


@pytest.mark.parametrize(
    ("options", "devices", "unit"),
    [
        ((), "1 × NVIDIA H100 SXM 80 GB (the default; choose yours with --gpu), bfloat16", "GPU-hours"),
        (("--gpus", 2), "2 × NVIDIA H100 SXM 80 GB (the default; choose yours with --gpu), bfloat16", "GPU-hours"),
        (("--gpu", "h100"), "1 × NVIDIA H100 SXM 80 GB, bfloat16", "GPU-hours"),
        (("--gpu", "cpu"), "1 × CPU of 1 TFLOP/s (nominal; give yours as --tflops), bfloat16", "machine-hours"),
        (("--gpu", "cpu", "--tflops", 0.2), "1 × CPU of 0.2 TFLOP/s, bfloat16", "machine-hours"),
    ],
)
def test_the_first_line_says_for_which_devices_and_whether_that_is_a_default(cli, checkpoint, options, devices, unit):
    out = cli("plan", checkpoint, "--target-length", 256, "--method", "gradient", *options).out
    assert f" -> 256 tokens on {devices} Recommended:" in " ".join(out.split())
    assert f"0.01 {unit})" in " ".join(out.split())
    (head,) = (line for line in out.splitlines() if line.split()[:2] == ["tokens", "memory"])
    assert head.split()[-1] == unit
    if unit != "GPU-hours":
        assert "GPU-hours" not in out


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
