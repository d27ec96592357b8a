"""Every verb as a user runs it, on a tiny checkpoint: files, tables, and the one JSON object of `--json`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from longrope.rope.geometry import RopeGeometry
from longrope.rope.presets import preset_names
from longrope.rope.scaling import RopeScaling
from tests.search.lengths import NEEDLE_LENGTH

BUDGET = ("--method", "longrope", "--population", 8, "--iterations", 2, "--samples", 2, "--attention-factor", 1)


@pytest.fixture(scope="module")
def searched(checkpoint, texts, tmp_path_factory):
    """A finished search run."""
    from longrope.cli.main import run

    out = tmp_path_factory.mktemp("searched") / "run"
    arguments = ["search", checkpoint, "--target-length", 256, "--data", texts / "search.txt", "-o", out, *BUDGET]
    assert run([str(argument) for argument in arguments]) == 0
    return out


def test_inspect(cli, checkpoint):
    shown = cli("inspect", checkpoint)
    assert shown.code == 0
    assert "32 (16 pairs), base 10000" in shown.out
    found = json.loads(cli("inspect", checkpoint, "--json").out)
    assert (found["rotary_dim"], found["original_length"], found["existing_windows"]) == (32, 64, [])


def test_search_writes_scaling_log_and_summary(searched, checkpoint):
    scaling = RopeScaling.load(searched / "scaling.json")
    assert [window.max_length for window in scaling.windows] == [64, 256]
    assert scaling.windows[0].is_identity
    factors = scaling.windows[1].factors
    assert list(factors) == sorted(factors)
    assert 1.0 <= factors[0] <= factors[-1] <= 1.25 * 4
    assert len((searched / "search.jsonl").read_text().splitlines()) == 1 + 6 + 8 + 2 * 4
    summary = json.loads((searched / "search.json").read_text())
    assert summary["evaluations"] == 16
    assert summary["token_passes"] == 16 * 2 * 256
    assert set(summary["baselines"]) == {"none", "pi", "ntk", "ntk-critical", "dynamic-ntk", "yarn"}
    provenance = scaling.provenance
    assert provenance["versions"]["torch"]
    assert provenance["command"]
    assert len(provenance["data"]["document_sha256"]) == 1


def test_search_json_is_one_object(cli, checkpoint, texts, tmp_path):
    ran = cli(
        "search",
        checkpoint,
        "--target-length",
        "128",
        "--data",
        texts / "search.txt",
        "-o",
        tmp_path / "run",
        *BUDGET,
        "--json",
    )
    found = json.loads(ran.out)
    assert {"method", "best_loss", "token_passes", "baselines", "scaling"} <= found.keys()
    assert found["method"] == "longrope"
    assert found["best_loss"] < min(found["baselines"][name] for name in ("pi", "ntk")) + 1e-9
    assert Path(found["scaling"]).is_file()


def test_the_table_of_a_search_names_the_critical_dimension(cli, checkpoint, texts, tmp_path):
    few = ("--method", "longrope2", "--population", 4, "--iterations", 1, "--samples", 2)
    data = ("--target-length", NEEDLE_LENGTH, "--data", texts / "search.txt")
    ran = cli("search", checkpoint, *data, "-o", tmp_path / "run", *few)
    assert ran.code == 0, ran.err
    assert re.search(r"real critical dimension: pair \d+ \(needle loss alone \d+, perplexity loss alone \d+\)", ran.out)
    assert "ntk-rcd" in ran.out


def test_same_seed_same_result(cli, checkpoint, texts, searched, tmp_path):
    out = tmp_path / "again"
    cli("search", checkpoint, "--target-length", 256, "--data", texts / "search.txt", "-o", out, *BUDGET)
    lines = [(folder / "search.jsonl").read_text().splitlines()[1:] for folder in (searched, out)]
    assert lines[0] == lines[1]
    assert RopeScaling.load(out / "scaling.json").windows == RopeScaling.load(searched / "scaling.json").windows


def test_resume_continues_to_the_same_end(cli, checkpoint, texts, searched, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    whole = (searched / "search.jsonl").read_text().splitlines(keepends=True)
    (out / "search.jsonl").write_text("".join(whole[:15]))
    ran = cli(
        "search", checkpoint, "--target-length", 256, "--data", texts / "search.txt", "-o", out, *BUDGET, "--resume"
    )
    assert ran.code == 0
    assert (out / "search.jsonl").read_text() == "".join(whole)
    assert RopeScaling.load(out / "scaling.json").windows == RopeScaling.load(searched / "scaling.json").windows


def test_interrupt_says_best_and_how_to_resume(cli, checkpoint, texts, tmp_path, monkeypatch):
    from longrope.search.objective import PerplexityObjective

    real, calls = PerplexityObjective.loss, []

    def interrupted(self, window, rows=None):
        calls.append(window)
        if len(calls) == 12:  # after 6 baselines, two of them the same, and 7 candidates, one of them a baseline
            raise KeyboardInterrupt
        return real(self, window, rows)

    monkeypatch.setattr(PerplexityObjective, "loss", interrupted)
    monkeypatch.setattr("sys.argv", ["longrope", "search", "MODEL", "-o", "run"])
    ran = cli(
        "search", checkpoint, "--target-length", 256, "--data", texts / "search.txt", "-o", tmp_path / "run", *BUDGET
    )
    assert ran.code == 130
    assert ran.err.endswith("longrope: interrupted\n")
    assert "after 7 evaluations" in ran.err
    assert "best loss" in ran.err
    assert "longrope search MODEL -o run --resume" in ran.err
    assert len((tmp_path / "run" / "search.jsonl").read_text().splitlines()) == 1 + 6 + 7


def test_start_tokens_can_be_searched(cli, checkpoint, texts, tmp_path):
    ran = cli(
        "search", checkpoint, "--target-length", 128, "--data", texts / "search.txt", "-o", tmp_path / "run", *BUDGET,
        "--start-tokens", "search", "--attention-factor", "su", "--json",
    )  # fmt: skip
    assert ran.code == 0
    lines = (tmp_path / "run" / "search.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines if "steps" in line]
    assert len({row["start_tokens"] for row in rows}) > 1
    window = RopeScaling.load(tmp_path / "run" / "scaling.json").windows[-1]
    assert window.attention_factor == pytest.approx(math.sqrt(1 + math.log(2) / math.log(64)))


def test_eval_compares_the_same_samples(cli, checkpoint, texts, searched):
    ran = cli(
        "eval", checkpoint, "--suite", "perplexity", "--lengths", "64,128,256", "--scaling", searched / "scaling.json",
        "--against", "none,pi,dynamic-ntk", "--data", texts / "other.txt", "--samples", 3, "--json",
    )  # fmt: skip
    found = json.loads(ran.out)["results"]
    assert set(found[0]) == {"suite", "scaling", "length", "metric", "value", "stderr", "trials", "detail", "losses"}
    rows = [row for row in found if row["metric"] == "perplexity"]
    assert len(rows) == 4 * 3
    value = {(row["scaling"], row["length"]): row["value"] for row in rows}
    name = str(searched / "scaling.json")
    # Inside the original window a portable scaling and dynamic NTK are the original model, bit for bit.
    assert value[name, 64] == value["none", 64] == value["dynamic-ntk", 64] != value["pi", 64]
    assert value[name, 256] != value["none", 256]
    assert all(row["trials"] == 3 and row["stderr"] > 0 for row in rows)


def test_eval_slides_and_writes(cli, checkpoint, texts, tmp_path):
    out = tmp_path / "eval.json"
    ran = cli(
        "eval",
        checkpoint,
        "--lengths",
        "32,64",
        "--data",
        texts / "other.txt",
        "--samples",
        2,
        "--stride",
        16,
        "-o",
        out,
    )
    assert ran.code == 0
    assert "none" in ran.out
    assert json.loads(out.read_text())["settings"]["suites"]["perplexity"]["stride"] == 16
    assert cli("eval", checkpoint, "--lengths", "32", "--data", texts / "other.txt", "-o", out).code == 2


def test_export_and_evaluate_the_checkpoint(cli, checkpoint, texts, searched, tmp_path):
    out = tmp_path / "exported"
    ran = cli("export", checkpoint, "--scaling", searched / "scaling.json", "--to", "hf", "-o", out, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["losses"] == []
    rows = {}
    for model, extra in ((out, ()), (checkpoint, ("--scaling", searched / "scaling.json"))):
        shown = cli(
            "eval", model, "--lengths", "64,256", "--data", texts / "other.txt", "--samples", 2, "--json", *extra
        )
        rows[model] = [row["value"] for row in json.loads(shown.out)["results"]]
    assert rows[out] == pytest.approx(rows[checkpoint], rel=1e-6)
    # The checkpoint remembers what its search has seen.
    refused = cli("eval", out, "--lengths", "64", "--data", texts / "search.txt")
    assert refused.code == 2
    assert "search.txt" in refused.err


def test_extend_makes_everything(cli, checkpoint, texts, tmp_path):
    out = tmp_path / "run"
    ran = cli(
        "extend", checkpoint, "--target-length", 128, "--data", texts / "search.txt",
        "--eval-data", texts / "other.txt", "-o", out, *BUDGET, "--eval-samples", 2, "--json",
    )  # fmt: skip
    assert ran.code == 0
    found = json.loads(ran.out)
    own = [row for row in found["results"] if row["scaling"] == "longrope" and row["metric"] == "perplexity"]
    assert [row["length"] for row in own] == [64, 128]
    assert all(proof["top1_agreement"] == 1.0 for proof in found["proofs"])
    for name in ("search.jsonl", "scaling.json", "search.json", "eval.json", "extend.json", "report.html"):
        assert (out / name).stat().st_size > 0
    assert (out / "checkpoint" / "README.md").read_text().count("| this scaling |") == 1


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("search", ("--target-length", 256)),
        ("eval", ("--lengths", 64)),
        ("eval", ("--suite", "passkey,needle", "--lengths", 64)),
        ("finetune", ("--scaling", "scaling.json", "--length", 256)),
        ("extend", ("--target-length", 256)),
        ("extend", ("--recipe", "quick")),
    ],
    ids=str,
)
def test_missing_texts_are_found_before_a_model_is_read(cli, checkpoint, tmp_path, verb, options):
    """The model here has a config and no weights: reading it would be another error, minutes later for a large one."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((checkpoint / "config.json").read_text())
    scaling = RopeScaling.extended(RopeGeometry(32, 10_000.0, 64), 256, [2.0] * 16)
    scaling.save(tmp_path / "scaling.json")
    given = [tmp_path / part if part == "scaling.json" else part for part in options]
    ran = cli(verb, model, *given, "-o", tmp_path / "out")
    assert (ran.code, ran.out) == (2, "")
    assert "texts" in ran.err
    assert "--data" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [(), ("--data", "search.txt"), ("--eval-data", "other.txt")], ids=str)
def test_extend_names_the_missing_texts_before_it_reads_or_prints_anything(cli, checkpoint, texts, tmp_path, given):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((checkpoint / "config.json").read_text())  # without weights
    given = [texts / part if part.endswith(".txt") else part for part in given]
    ran = cli("extend", model, "--target-length", 256, "-o", tmp_path / "run", *given)
    missing = "--eval-data" if "--data" in given else "--data"
    assert (ran.code, ran.out) == (2, "")
    assert f"expected texts for {model} as {missing}" in ran.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [("--eval-data", "search.txt"), ("--eval-data", "other.txt", "--start-tokens", 4), ("--eval-data", "nowhere.txt")],
    ids=str,
)
def test_extend_prints_no_plan_above_an_error(cli, checkpoint, texts, tmp_path, wrong):
    given = [texts / part if str(part).endswith(".txt") else part for part in wrong]
    out = tmp_path / "run"
    ran = cli("extend", checkpoint, "--target-length", 256, "--data", texts / "search.txt", "-o", out, *given)
    assert ran.code == 2
    assert "stage" not in ran.out  # the head of the table of costs
    assert "at most" not in ran.out
    assert not out.exists()


def test_extend_prints_a_table_that_is_not_cut(cli, checkpoint, texts, tmp_path):
    ran = cli(
        "extend", checkpoint, "--target-length", 128, "--data", texts / "search.txt",
        "--eval-data", texts / "other.txt", "-o", tmp_path / "run", *BUDGET, "--eval-samples", 2,
    )  # fmt: skip
    assert ran.code == 0
    assert "dynamic-ntk" in ran.out
    assert "…" not in ran.out.replace("…  ", "").partition("Perplexity by context length")[2]


def test_presets(cli, tmp_path):
    shown = cli("presets")
    assert all(name in shown.out for name in preset_names())
    assert len(json.loads(cli("presets", "--json").out)["presets"]) == len(preset_names())
    name = preset_names()[0]
    assert RopeScaling.from_json(cli("presets", name).out).windows
    assert cli("presets", name, "-o", tmp_path / "scaling.json").code == 0
    assert cli("presets", name, "-o", tmp_path / "scaling.json").code == 2


def test_a_factor_file_of_the_authors(cli, checkpoint, tmp_path):
    factors = [1.0 + pair / 5 for pair in range(16)]
    (tmp_path / "result_final.csv").write_text("\n".join(map(str, factors)) + "\n")
    arguments = ("presets", "--from-file", tmp_path / "result_final.csv", "--target-length", 256)
    assert cli(*arguments, "--model", checkpoint, "-o", tmp_path / "scaling.json").code == 0
    scaling = RopeScaling.load(tmp_path / "scaling.json")
    assert scaling.windows[-1].factors == tuple(factors)
    assert scaling.geometry.original_length == 64
    exported = cli("export", checkpoint, "--scaling", tmp_path / "scaling.json", "-o", tmp_path / "out")
    assert exported.code == 0
    assert "needs --model" in cli(*arguments).err
    (tmp_path / "result_final.csv").write_text("1.0\n2.0\n")
    assert cli(*arguments, "--model", checkpoint).code == 2
