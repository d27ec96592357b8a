"""Texts that processes share: losses, gradients, searches and evaluations are those of one process.

All processes of the tests of every commit are started once. Float32, as a search computes on a CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from longrope.cli.progress import resume_command
from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalResults
from longrope.models import chunked, processes
from longrope.models.model_dims import shape_of
from longrope.models.peak_bytes import shared_bytes
from longrope.rope.scaling import RopeScaling
from longrope.search.log import read_log
from tests.conftest import Ran
from tests.costs.test_flops_bytes import grouped
from tests.models.families import ALL_FAMILIES
from tests.models.shared import LONG, Found, together

SLIDING = {"mistral sliding": {"sliding_window": 24}, "phi3 sliding": {"sliding_window": 40}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "cohere": {},
    "olmo2": {},
    "olmo3": {},
    "gemma3_text": {},
    **SLIDING,
}
"""Grouped heads, biases, interleaved cosines, norms of queries and keys, sliding windows in some layers or in all."""
EAGER = ("gemma2", "gpt_oss")
"""Families whose attention is more than a mask: soft caps and sinks."""
GRADIENT = ("--method", "gradient", "--steps", 3, "--no-continuation", "--samples", 2)
NEEDLE = ("--objective", "needle", *GRADIENT[:-1], 1)
EVOLUTION = ("--method", "longrope", "--population", 4, "--iterations", 1, "--samples", 1)
SEARCHES = {"gradient": (128, GRADIENT), "needle": (510, NEEDLE), "evolution": (130, EVOLUTION)}
"""Lengths that 4 pieces divide, and ones that they do not."""


def search(checkpoint: Path, texts: Path, length: int, out: Path, *options: object) -> list[object]:
    return [
        "search", checkpoint, "--target-length", length, "--data", texts / "search.txt", "-o", out, *options
    ]  # fmt: skip


def evaluation(texts: Path, out: Path, *options: object) -> list[object]:
    """Of the embedded model, which retrieves."""
    suites = ("--suite", "perplexity,needle,passkey,retention", "--samples", 1, "--trials", 1)
    lengths = ("--lengths", "250,331", "--depths", 3)
    return ["eval", "tiny", "--data", texts / "search.txt", *suites, *lengths, "-o", out, *options]


@pytest.fixture(scope="session")
def found(
    checkpoint: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Found]:
    """The folder of the runs, and the results of 2 processes; made once, whichever test process comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "shared-texts"
    with FileLock(f"{folder}.lock"):
        if not (folder / "all.json").exists():
            folder.mkdir()
            shared = ("--context-parallel", 2)
            commands = {
                name: search(checkpoint, texts, length, folder / name, *options, *shared)
                for name, (length, options) in SEARCHES.items()
            }
            again = search(checkpoint, texts, 128, folder / "gradient", *GRADIENT, *shared)
            commands |= {
                "there already": again,
                "resumed": [*again, "--resume"],
                "too few": [*search(checkpoint, texts, 128, folder / "none", *GRADIENT), "--context-parallel", 3],
                "ray": search(checkpoint, texts, 128, folder / "none", *GRADIENT, *shared, "--workers", 2),
                "no model": search(folder / "nowhere", texts, 128, folder / "none", *GRADIENT, *shared),
            }
            failing = search(checkpoint, texts, 128, folder / "none", *GRADIENT, *shared)
            commands |= {f"failing {rank}": failing for rank in (0, 1)}
            commands["python"] = [checkpoint, texts / "search.txt"]
            evaluated = evaluation(texts, folder / "eval.json", *shared)
            commands |= {
                "evaluation": evaluated,
                "evaluation resumed": [*evaluated, "--resume"],
                "ruler": [*evaluation(texts, folder / "none", *shared), "--suite", "perplexity,ruler"],
                "server": ["eval", "http://127.0.0.1:9/v1", "--lengths", 256, *shared],
                "two models": [*evaluation(texts, folder / "none", *shared), "--original", "tiny"],
            }
            results = together(2, folder, FAMILIES | {name: {} for name in EAGER}, commands)
            (folder / "all.json").write_text(json.dumps(results), "utf-8")
    return folder, json.loads((folder / "all.json").read_text("utf-8"))


def assert_same(found: dict[str, Any]) -> None:
    assert found.pop("attention") == "sdpa"  # put back
    assert len(found) == 4
    for name, errors in found.items():
        assert errors["alike"], name  # in every process, bit for bit
        assert errors["tops"] > 0.98, name  # rounding may turn the order of two tokens
        assert errors["losses"] < 1e-5, name
        assert errors["loss"] < 1e-5, name
        assert errors["gradient"] < 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_one_process(family: str, found: tuple[Path, Found]) -> None:
    for process in found[1]:
        assert_same(process[family])


def test_the_plan_has_the_bytes_of_a_process(found: tuple[Path, Found], monkeypatch: pytest.MonkeyPatch) -> None:
    """Living tensors; the planned half of a row in the exchange itself lies in no tensor."""
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", 2**18)
    monkeypatch.setattr(chunked, "MLP_CHUNK", 128)
    monkeypatch.setattr(chunked, "BACKWARD_BUDGET", 0)
    shape = shape_of("grouped", grouped())
    for process in found[1]:
        for name, measured in process["bytes"].items():
            planned = shared_bytes(shape, LONG, 4, gradient=name == "gradient", processes=2)
            assert measured == pytest.approx(sum(planned.values()), rel=0.1), name
            whole = shared_bytes(shape, LONG, 4, gradient=name == "gradient", processes=1)
            assert measured - planned["weights"] < 0.65 * (sum(whole.values()) - planned["weights"])


@pytest.mark.parametrize("family", EAGER)
def test_an_attention_that_is_more_than_a_mask_is_refused(family: str, found: tuple[Path, Found]) -> None:
    for process in found[1]:
        assert "computes attention by sdpa, found eager" in process[family]["refused"]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_that_of_one_process(
    name: str,
    found: tuple[Path, Found],
    cli: Callable[..., Ran],
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
) -> None:
    folder, (first, other) = found
    assert first[name]["code"] == 0, first[name]
    assert "every text shared by 2 processes" in first[name]["err"]
    assert "scaling: " in first[name]["out"]
    assert other[name] == {"code": 0, "out": "", "err": ""}
    length, options = SEARCHES[name]
    alone = cli(*search(checkpoint, texts, length, tmp_path / "alone", *options))
    assert alone.code == 0, alone.err
    assert first[name]["out"].replace(str(folder / name), "RUN") == alone.out.replace(str(tmp_path / "alone"), "RUN")
    (header, rows), (shared_header, shared_rows) = (
        read_log(place / "search.jsonl") for place in (tmp_path / "alone", folder / name)
    )
    assert shared_header.pop("numerics") == {**header.pop("numerics"), "context_parallel": 2}
    assert {**shared_header, "record": None} == {**header, "record": None}
    assert len(shared_rows) == len(rows)
    for mine, theirs in zip(shared_rows, rows, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mine.gradient == (theirs.gradient and pytest.approx(theirs.gradient, rel=1e-3, abs=1e-6))
        assert mine.request.keys() == theirs.request.keys()
    assert sorted(path.name for path in (folder / name).iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )


def test_every_process_of_a_script_gets_the_scaling(found: tuple[Path, Found]) -> None:
    first, other = (RopeScaling.from_json(process["python"]) for process in found[1])
    assert first == other
    assert first.target_length == 128
    assert first.provenance["search"]["numerics"]["context_parallel"] == 2


def test_a_finished_search_is_resumed_by_as_many_processes_only(
    found: tuple[Path, Found], cli: Callable[..., Ran], checkpoint: Path, texts: Path
) -> None:
    folder, (first, _) = found
    assert first["resumed"]["code"] == 0
    assert first["resumed"]["out"] == first["gradient"]["out"]
    ran = cli(*search(checkpoint, texts, 128, folder / "gradient", *GRADIENT), "--resume")
    assert "numerics differ (log: numerics.context_parallel = 2, now: None)" in ran.refusal


def test_an_evaluation_is_that_of_one_process(
    found: tuple[Path, Found], cli: Callable[..., Ran], texts: Path, tmp_path: Path
) -> None:
    folder, (first, other) = found
    for name in ("evaluation", "evaluation resumed"):
        assert first[name]["code"] == 0, first[name]
        assert other[name] == {"code": 0, "out": "", "err": ""}
    ran = cli(*evaluation(texts, tmp_path / "eval.json"))
    assert ran.code == 0, ran.err
    shared, alone = EvalResults.load(folder / "eval.json"), EvalResults.load(tmp_path / "eval.json")
    assert shared.settings.pop("context_parallel") == 2
    assert shared.settings == alone.settings
    assert {row.suite for row in shared.rows} == {"perplexity", "needle", "passkey", "retention"}
    assert sum(row.value for row in alone.rows if row.metric == "accuracy") > 0  # something is found
    for mine, theirs in zip(shared.rows, alone.rows, strict=True):
        assert replace(mine, value=0.0, stderr=None, losses=None) == replace(
            theirs, value=0.0, stderr=None, losses=None
        )
        assert mine.value == pytest.approx(theirs.value, rel=1e-5, abs=1e-6)
        assert mine.losses == (theirs.losses and pytest.approx(theirs.losses, rel=1e-5))
    assert cli(*evaluation(texts, folder / "eval.json"), "--resume").code == 2  # by one process


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ruler", "found ruler, in which the model generates its answers"),
        ("server", "a server is measured as it is"),
        ("two models", "processes share the texts of one model"),
        ("there already", "is not empty; nothing is overwritten"),
        ("too few", "among 3 processes, found 2; start them: torchrun --nproc-per-node 3 -m longrope"),
        (
            "ray",
            "--workers has Ray start the processes that compute: expected one process here, found 2; start it without",
        ),
        ("no model", "there is no model folder"),
        ("failing 0", "no room for 1 GiB"),
        ("failing 1", "no room for 1 GiB"),
    ],
)
def test_an_error_comes_out_once(name: str, message: str, found: tuple[Path, Found]) -> None:
    folder, (first, other) = found
    assert first[name]["code"] == 2
    assert first[name]["err"].startswith("longrope: error: ")
    assert first[name]["err"].count("\n") == 1
    assert message in first[name]["err"]
    assert other[name] == {"code": 2, "out": "", "err": ""}
    assert not (folder / "none").exists()


@pytest.mark.parametrize("launched", [True, False])
def test_processes_that_a_script_has_connected_get_a_gpu_each(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a launcher has started them; a process of Ray has no number on its machine, and sees its own GPU alone."""
    made: list[dict[str, bool]] = []
    monkeypatch.setattr(processes, "PartialState", lambda **given: made.append(given))
    monkeypatch.setattr(processes._Speaker, "count", 1)
    monkeypatch.setattr(processes._Speaker, "silent", False)
    for name, found in (("is_initialized", True), ("get_world_size", 3), ("get_rank", 0)):
        monkeypatch.setattr(processes.dist, name, lambda found=found: found)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(LongRopeError, match="among 2 processes, found 3"), processes.sharing(2, "cpu"):
        pass
    assert made == [{"cpu": True}] * launched


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_ray_alone_starts_processes(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes._Speaker, "count", 1)
    monkeypatch.setattr(processes._Speaker, "silent", False)
    monkeypatch.setenv(variable, "2")
    with pytest.raises(LongRopeError, match="expected one process here, found 2"):
        processes.require_alone("reason")


def test_without_torchrun_the_command_is_said(cli: Callable[..., Ran], checkpoint: Path, texts: Path) -> None:
    ran = cli(*search(checkpoint, texts, 128, Path("none"), "--context-parallel", 2))
    assert "found 1; start them: torchrun --nproc-per-node 2 -m longrope" in ran.refusal


def test_the_command_to_go_on_with_starts_as_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["longrope", "search", "model", "--context-parallel", "4"])
    assert resume_command() == "longrope search model --context-parallel 4 --resume"
    monkeypatch.setattr(processes._Speaker, "count", 4)
    assert resume_command() == ("torchrun --nproc-per-node 4 -m longrope search model --context-parallel 4 --resume")


@pytest.mark.slow
def test_four_processes_and_every_family(tmp_path: Path) -> None:
    families = {name: {} for name in ALL_FAMILIES} | SLIDING
    first, *_ = together(4, tmp_path, families, {})
    for family in families.keys() - set(EAGER):
        assert_same(first[family])
