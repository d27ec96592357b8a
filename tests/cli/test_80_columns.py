"""What verbs print is readable at 80 columns: no line is longer, no word is broken, and the verdict comes first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longrope.cli import common
from longrope.cli.tables.evaluation import show_evaluation
from longrope.cli.tables.runs import show_search
from longrope.evaluation.results import EvalRow
from longrope.rope.presets import preset_names
from longrope.search.run import SearchResult

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@pytest.fixture(autouse=True)
def at_80(wide_output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.output, "width", 80)


def test_benchmarks_by_shots_and_filter(capsys):
    """The best is the lowest where lm-eval says that lower is better."""

    def row(name, metric, value, **detail):
        return EvalRow("retention", name, 256, metric, value, 0.0, 3, detail)

    rows = []
    for name, shift in (("original", 0.0), ("longrope", 0.1)):
        rows.append(row(name, "bits_per_byte,none", 0.5 + shift, task="own", higher_is_better=False))
        rows += [row(name, "acc,none", 0.2 + shift, task="arc", shots=n, higher_is_better=True) for n in (0, 25)]
        rows += [row(name, f"match,{kind}", 0.3 + shift, task="gsm8k") for kind in ("strict", "flexible")]
    show_evaluation(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    said = " ".join(word for line in lines for word in line)
    for title in ("own bits_per_byte", "arc:0 acc", "arc:25 acc", "match (strict)", "match (flexible)"):
        assert title in said, title
    best = [line[0] for line in lines if line for word in line if word.endswith("*")]
    assert (best.count("original"), best.count("this")) == (1, 4)


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The config of Llama 3 8B in a folder of the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama3-8b").mkdir()
    (tmp_path / "llama3-8b" / "config.json").write_text(json.dumps(LLAMA))
    return "llama3-8b"


def narrow(text: str) -> list[str]:
    lines = text.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("more", [(), ("--verbose",)])
def test_plan(cli, llama, more):
    lines = narrow(cli("plan", llama, "--target-length", "128k", "--gpu", "h100", "--gpus", 8, *more).out)
    assert lines[0] == "llama3-8b: 8k -> 128k tokens on 8 × NVIDIA H100 SXM 80 GB, bfloat16"
    assert lines[1].startswith("Recommended: search --method gradient")
    (row,) = (line for line in lines if line.startswith("finetune longrope ") and "GB" in line)
    assert row.split() == ["finetune", "longrope", "3.4B", "89", "GB", "NO", "54", "h", "432"]
    (row,) = (line for line in lines if line.startswith("evaluate passkey ") and "GB" in line)
    assert row.split() == ["evaluate", "passkey", "7.6M", "41", "GB", "yes", "11", "min", "0.19"]


def test_a_plan_in_which_nothing_fits_says_so_first(cli, llama):
    lines = narrow(cli("plan", llama, "--target-length", "1M", "--gpu", "rtx4090").out)
    assert lines[1].startswith("Recommended: nothing as planned, because no search fits")


def test_presets(cli, llama):
    lines = narrow(cli("presets").out)
    assert {line.split()[0] for line in lines if line and not line.startswith(" ")} == {"name", *preset_names()}
    for_llama = narrow(cli("presets", llama).out)
    assert [line.split()[0] for line in for_llama if "8k -> 128k" in line] == ["longrope2_llama3_8b_128k"]
    by_name = cli("presets", "meta-llama/Llama-2-7b-hf", "--json")
    models = {row["model"] for row in json.loads(by_name.out)["presets"]}
    assert models == {"LLaMA2-7B"}
    assert "no published factors fit tiny" in cli("presets", "tiny").refusal


def test_inspect(cli, llama):
    assert "original window L   8192 tokens (8k)" in narrow(cli("inspect", llama).out)


@pytest.mark.parametrize("more", [(), ("--verbose",), ("--runtime", "all")])
def test_doctor(cli, more):
    narrow(cli("doctor", "tiny", *more).out)


def row(name: str, length: int, value: float) -> EvalRow:
    return EvalRow("perplexity", name, length, "perplexity", value, 0.01 * value, 10)


def test_an_evaluation_of_many_lengths_comes_in_parts(capsys):
    lengths = [2**power for power in range(12, 22)]
    rows = [row("none", length, float(length)) for length in lengths] + [row("own", n, 6.0) for n in lengths]
    show_evaluation(rows)
    lines = narrow(capsys.readouterr().out)
    assert lines[0] == "Best at 2M tokens: own, perplexity 6.00."
    heads = [line.split()[1:] for line in lines if line.startswith("method")]
    assert len(heads) > 1
    assert [length for head in heads for length in head] == "4k 8k 16k 32k 64k 128k 256k 512k 1M 2M".split()
    assert sum(line.startswith("own ") and "6.00 ± 0.06*" in line for line in lines) == len(heads)


def test_a_long_path_is_shortened_where_it_stays_clear(capsys):
    one, other = (f"/home/somebody/projects/long-context/runs/{name}/scaling.json" for name in ("first", "second"))
    show_evaluation([row("none", 64, 9.0), row(one, 64, 5.0), row(other, 64, 6.0)])
    lines = narrow(capsys.readouterr().out)
    assert any(line.startswith("…/runs/first/scaling.json") for line in lines)
    assert lines[0].startswith("Best at 64 tokens: …/runs/first/scaling.json, perplexity 5.00")


def searched(loss: float) -> SearchResult:
    from longrope.rope.geometry import RopeGeometry
    from longrope.rope.scaling import RopeScaling

    scaling = RopeScaling.extended(RopeGeometry(8, 10_000.0, 64), 128, [1.0, 1.5, 2.0, 2.0])
    baselines = {"none": 5.4, "pi": 4.8, "yarn": 4.19}
    return SearchResult("gradient", "perplexity", loss, 46, 72_704, baselines, scaling, Path("run/scaling.json"))


@pytest.mark.parametrize(
    ("loss", "verdict", "winners"),
    [
        (4.178, "gradient: 0.012 nats per token better than YaRN, which is the best baseline", ["gradient"]),
        (4.19, "gradient: nothing gained: YaRN is as good", ["gradient", "yarn"]),
        (4.1897, "gradient: nothing gained: YaRN is as good", ["gradient", "yarn"]),
        (4.1903, "gradient: nothing gained: YaRN is as good", ["yarn", "gradient"]),
        (4.5, "gradient: 0.310 nats per token worse than YaRN: take YaRN, or search", ["yarn"]),
    ],
)
def test_the_marks_of_a_search_agree_with_its_verdict(capsys, loss, verdict, winners):
    show_search(searched(loss))
    lines = narrow(capsys.readouterr().out)
    assert lines[0].startswith(verdict)
    table = [line for line in lines if line.split()[0] in ("gradient", "yarn", "pi", "none")]
    assert [line.split()[0] for line in table if "*" in line] == winners
    assert [line.split()[0] for line in table][: len(winners)] == winners


def test_a_search_that_may_not_stretch_warns(cli, checkpoint, texts, tmp_path):
    ran = cli(
        "search", checkpoint, "--target-length", 256, "--data", texts / "search.txt", "-o", tmp_path / "run",
        "--method", "gradient", "--max-factor", 1, "--steps", 2, "--samples", 1, "--attention-factor", 1, "--json",
    )  # fmt: skip
    found = json.loads(ran.out)
    best = min(loss for loss in found["baselines"].values() if loss is not None)
    assert (found["gain"] < -0.0005) == ("warning: " in ran.err)
    assert found["gain"] == pytest.approx(best - found["best_loss"])


def test_without_a_terminal_the_width_is_columns_or_80(llama):
    command = [sys.executable, "-m", "longrope", "plan", llama, "--target-length", "64k"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    narrow(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
