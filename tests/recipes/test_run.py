"""A whole recipe on the random checkpoint: what is given to what, what is kept, and what is refused afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longrope.callbacks import Callbacks
from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalResults
from longrope.models.loading import LoadedModel, open_model
from longrope.recipes import run as recipe_run
from longrope.recipes.costs import Rates, recipe_costs
from longrope.recipes.folder import RunFolder
from longrope.recipes.graph import Step, steps
from longrope.recipes.run import RecipeResult, run_recipe
from longrope.recipes.schema import Recipe
from longrope.recipes.stages import Stages
from longrope.rope.scaling import RopeScaling
from longrope.written import temporary
from tests.recipes.recipes import EVALUATE, EXPORT, FOLDERS, RECOVER, SEARCH_4, STAGES, TRAIN_4, recipe, without_times

SEARCHED_4, SEARCHED_8, TUNED_4, TUNED_8, SEARCHED_16, RECOVERED, EVALUATED, EXPORTED = FOLDERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def small(folder: Path) -> Recipe:
    return recipe(folder, *STAGES)


@pytest.fixture(scope="module")
def result(loaded: LoadedModel, small: Recipe, folder: Path) -> RecipeResult:
    return run_recipe(loaded, small, folder / "run")


@pytest.fixture
def copy(result: RecipeResult, folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The finished run at its place, to be damaged."""
    run = folder / "run"
    run.rename(tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", run)
    yield run
    shutil.rmtree(run)
    (tmp_path / "kept").rename(run)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def weights(run: Path, folder: str = TUNED_8) -> dict[str, torch.Tensor]:
    return load_file(run / folder / "checkpoint/model.safetensors")


def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stages, "run", lambda _, step, __: pytest.fail(f"{step.folder} ran"))


# --- what a run is


def test_what_is_left(result: RecipeResult, folder: Path, loaded: LoadedModel) -> None:
    run = folder / "run"
    names = {"recipe.json", "scaling.json", "result.json", "report.html", "report_figures", ".lock", ".written.jsonl"}
    assert {path.name for path in run.iterdir()} == names | set(FOLDERS)
    identity = read(run / "recipe.json")
    assert identity.keys() == {"model", "model_fingerprint", "device", "versions", "stages", "command"}
    assert tuple(identity["stages"]) == FOLDERS
    assert [window.max_length for window in result.scaling.windows] == [64, 128, 512, 1024]
    assert RopeScaling.load(run / "scaling.json") == result.scaling
    assert result.scaling.windows == RopeScaling.load(run / RECOVERED / "scaling.json").windows
    assert result.model == result.scaling.provenance["model"] == str(run / TUNED_8)
    assert tuple(result.scaling.provenance["stages"]) == FOLDERS[:6]  # an evaluation makes no scaling
    written = read(run / "result.json")
    assert tuple(written["stages"]) == FOLDERS
    assert {"versions", "command", "model", "scaling", "report"} < written.keys()


def test_a_fine_tuning_is_given_the_factors_of_its_target(result: RecipeResult, folder: Path) -> None:
    """On the weights of the one before it, which were searched for before either was trained."""
    run = folder / "run"
    for tuned, searched, model in ((TUNED_4, SEARCHED_4, None), (TUNED_8, SEARCHED_8, str(run / TUNED_4))):
        found = RopeScaling.load(run / searched / "scaling.json")
        trained = RopeScaling.load(run / tuned / "scaling.json")
        assert trained.windows == found.windows[-1:]
        identity = read(run / tuned / "run.json")
        assert identity["model"] == (model or read(run / "recipe.json")["model"])
        assert not (run / tuned / "trainer").exists()
    assert not torch.equal(*(weights(run, tuned)["lm_head.weight"] for tuned in (TUNED_4, TUNED_8)))


def test_the_second_search_starts_from_the_tuned_weights(result: RecipeResult, folder: Path) -> None:
    run = folder / "run"
    header = json.loads((run / SEARCHED_16 / "search.jsonl").read_text().splitlines()[0])
    first = json.loads((run / SEARCHED_4 / "search.jsonl").read_text().splitlines()[0])
    assert header["model_fingerprint"] != first["model_fingerprint"]
    said = result.stages[SEARCHED_16]
    assert {"checkpoint", "second-yarn"} < said["baselines"].keys()
    assert not {"checkpoint", "second-yarn"} & result.stages[SEARCHED_8]["baselines"].keys()
    trained = RopeScaling.load(run / TUNED_8 / "scaling.json")
    assert RopeScaling.load(run / SEARCHED_16 / "scaling.json").windows[:-1] == trained.windows


def test_recovery_is_of_all_windows_there_are(result: RecipeResult, folder: Path) -> None:
    searched = RopeScaling.load(folder / "run" / SEARCHED_16 / "scaling.json")
    assert result.scaling.windows[-2:] == searched.windows
    assert [row["length"] for row in result.stages[RECOVERED]["lengths"]] == [64, 128]


def test_the_evaluation_is_of_the_final_scaling(result: RecipeResult, folder: Path) -> None:
    run = folder / "run"
    measured = EvalResults.load(run / EVALUATED / "eval.json")
    assert {(row.scaling, row.length) for row in measured.rows if row.metric == "perplexity"} >= {
        ("longrope", 64),
        ("longrope", 1024),
        ("none", 1024),
    }
    assert measured.settings["model"] == str(run / TUNED_8)
    assert RopeScaling.load(run / EVALUATED / "scaling.json") == result.scaling


def test_the_export_is_of_the_tuned_weights(result: RecipeResult, folder: Path) -> None:
    exported = folder / "run" / EXPORTED / "checkpoint"
    tuned, written = weights(folder / "run"), load_file(exported / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in tuned.items())
    assert read(exported / "config.json")["max_position_embeddings"] == 1024
    assert result.stages[EXPORTED]["losses"]  # of four windows transformers has two
    assert open_model(str(exported)).context_length == 1024


def test_the_plan_is_what_it_comes_to(result: RecipeResult, loaded: LoadedModel, small: Recipe, folder: Path) -> None:
    """Tokens of searches and trainings; those of baselines are in the log, and counted by it."""
    planned = steps(small, 64, 64)
    costs = dict(zip(FOLDERS, recipe_costs(loaded, planned, Rates(1e9, 1e9)), strict=True))
    run = folder / "run"

    def requested(log: Path, length: int) -> int:
        return length * (len(log.read_text().splitlines()) - 1)  # one sample each, no gradients

    for name, length in ((SEARCHED_4, 256), (SEARCHED_8, 512), (SEARCHED_16, 1024)):
        most, real = costs[name].tokens, requested(run / name / "search.jsonl", length)
        assert real <= most <= 1.6 * real, name  # twins among the candidates are not requested again
        assert costs[name].seconds == pytest.approx(costs[name].flops / 1e9)
    real = sum(requested(run / RECOVERED / str(length) / "search.jsonl", length) for length in (64, 128))
    assert real <= costs[RECOVERED].tokens + 64 + 128 <= 1.6 * real + 192  # and one request with attention factor 1
    for name in (TUNED_4, TUNED_8):
        assert costs[name].tokens == 3 * sum(result.stages[name]["tokens"].values())
    # Two texts of each length, under the scaling and without.
    assert costs[EVALUATED].tokens == 2 * 2 * (64 + 1024)
    assert (costs[EXPORTED].tokens, costs[EXPORTED].seconds) == (0, 0.0)


# --- a run goes on


def test_a_finished_stage_is_never_run_again(
    result: RecipeResult, loaded: LoadedModel, small: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_runs(monkeypatch)
    monkeypatch.setattr(recipe_run, "report", lambda *_: pytest.fail("the report was written again"))
    run, stages = folder / "run", []
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    callbacks = Callbacks()
    monkeypatch.setattr(callbacks, "on_stage", lambda *stage: stages.append(stage))
    again = run_recipe(loaded, small, run, callbacks)
    assert again.to_json() == result.to_json()
    assert [stage[1:] for stage in stages] == [(place, len(FOLDERS), True) for place in range(1, len(FOLDERS) + 1)]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_stages_may_be_added_and_changed_until_they_begin(
    result: RecipeResult, loaded: LoadedModel, folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / EXPORTED)
    ran: list[str] = []
    run = Stages.run
    monkeypatch.setattr(Stages, "run", lambda self, step, *more: ran.append(step.folder) or run(self, step, *more))
    changed = recipe(folder, *STAGES[:7], {**EXPORT, "to": "hf-unified"}, {**EVALUATE, "lengths": ["4x"]})
    again = run_recipe(loaded, changed, copy)
    assert ran == [EXPORTED, "09-evaluate"]
    assert again.scaling.windows == result.scaling.windows
    assert read(copy / EXPORTED / "stage.json")["to"] == "hf-unified"
    assert tuple(read(copy / "result.json")["stages"]) == (*FOLDERS, "09-evaluate")
    assert tuple(read(copy / "recipe.json")["stages"]) == (*FOLDERS, "09-evaluate")


@pytest.mark.parametrize(
    "lost",
    [
        {
            SEARCHED_16: ["search.json"],
            TUNED_8: [],
            RECOVERED: ["recover.json", "128/search.json"],
            EVALUATED: [],
            EXPORTED: ["checkpoint/config.json"],
            ".": ["result.json"],
        },
        {
            SEARCHED_16: ["search.json", "scaling.json"],
            RECOVERED: ["recover.json", "scaling.json", "128"],
            EVALUATED: ["scaling.json", "eval.json"],
            ".": ["result.json", "report.html", "scaling.json"],
        },
    ],
)
def test_every_half_state_comes_to_the_same_end(
    result: RecipeResult, loaded: LoadedModel, small: Recipe, copy: Path, lost: dict[str, list[str]]
) -> None:
    """Killed between any two writes. A log says all there is to say: nothing is trained or measured again."""
    kept = files(copy)
    for name, lines in lost.items():
        for left in [*lines, *(["stage.json"] if name != "." else [])]:
            path = copy / name / left
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    temporary(copy / "recipe.json").write_text("half")
    temporary(copy / TUNED_8).mkdir()
    if TUNED_8 in lost:
        (copy / TUNED_8 / "trainer/checkpoint-1").mkdir(parents=True)
    again = run_recipe(loaded, small, copy)
    assert again.scaling == result.scaling
    assert files(copy) == kept
    assert {path.name for path in copy.glob(".*")} == {".lock", ".written.jsonl"}


@pytest.mark.parametrize("cut", [0, 10, -5])
def test_a_log_that_was_cut_off(result: RecipeResult, loaded: LoadedModel, small: Recipe, copy: Path, cut: int) -> None:
    """In its first line or its last one, of a search and of cells: what is whole is kept."""
    kept = files(copy)
    for name in (f"{SEARCHED_16}/search.jsonl", f"{RECOVERED}/128/search.jsonl", f"{EVALUATED}/eval.cells.jsonl"):
        size = (copy / name).stat().st_size
        os.truncate(copy / name, cut % size)
    for name in ("stage.json", "search.json", "recover.json", "eval.json"):
        for folder in (SEARCHED_16, RECOVERED, f"{RECOVERED}/128", EVALUATED):
            (copy / folder / name).unlink(missing_ok=True)
    assert run_recipe(loaded, small, copy).scaling == result.scaling
    assert files(copy) == kept


def files(run: Path) -> dict[Path, Any]:
    """All that a run left, but for how long its stages took."""
    found: dict[Path, Any] = {}
    for path in sorted(
        path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", ".written.jsonl")
    ):
        name = path.relative_to(run)
        if name.name != "result.json":  # it has the seconds of all stages
            found[name] = without_times(path)
    return found


def test_a_folder_that_a_killed_process_only_made(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    made, run = recipe(folder / "one", SEARCH_4), tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    temporary(run / "recipe.json").write_text("{")
    (run / "01-search-256").mkdir()
    (run / "01-search-256/mine").touch()
    with pytest.raises(LongRopeError, match="is not empty"):
        run_recipe(loaded, made, run)
    (run / "01-search-256/mine").unlink()
    assert run_recipe(loaded, made, run).stages.keys() == {"01-search-256"}


def test_an_option_that_came_later_has_its_default(
    result: RecipeResult, loaded: LoadedModel, small: Recipe, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = read(copy / "recipe.json")
    for name in (SEARCHED_4, TUNED_4, EVALUATED):
        settings = identity["stages"][name]["settings"]
        settings.pop({SEARCHED_4: "learn_attention_factor", TUNED_4: "trainer", EVALUATED: "threshold"}[name])
    del identity["stages"][RECOVERED]["context_parallel"]  # of the stage itself
    identity["stages"][SEARCHED_8]["settings"]["layer_inputs"] = "keep"  # which was recorded once
    (copy / "recipe.json").write_text(json.dumps(identity))
    nothing_runs(monkeypatch)
    run_recipe(loaded, small, copy)
    assert (copy / "report.html").is_file()
    identity["stages"][SEARCHED_4]["settings"].pop("population")  # which is not at its default
    (copy / "recipe.json").write_text(json.dumps(identity))
    with pytest.raises(LongRopeError, match="begun with other settings"):
        run_recipe(loaded, small, copy)


def test_the_number_of_workers_may_change(
    result: RecipeResult, loaded: LoadedModel, folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decides no result; the number of processes that share a text decides the last bits."""
    nothing_runs(monkeypatch)
    workers = {**SEARCH_4, "workers": 2}
    assert run_recipe(loaded, recipe(folder, workers, *STAGES[1:]), copy).scaling == result.scaling
    refused(
        loaded, recipe(folder, {**workers, "context_parallel": 2}, *STAGES[1:]), copy, "was begun with other settings"
    )


# --- what is refused, with nothing changed


def refused(loaded: LoadedModel, made: Recipe, run: Path, says: str) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.name != ".lock")
    with pytest.raises(LongRopeError, match=says) as error:
        run_recipe(loaded, made, run)
    assert "\n" not in str(error.value)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.name != ".lock") == before


@pytest.mark.parametrize(
    "stages",
    [
        ({**SEARCH_4, "seed": 1}, *STAGES[1:]),
        (*STAGES[:2], {**TRAIN_4, "steps": 4}, *STAGES[3:]),
        (*STAGES[:5], {**RECOVER, "lengths": ["1x"]}, *STAGES[6:]),
        STAGES[:7],
        (*STAGES[:2], STAGES[3]),
    ],
)
def test_other_settings(
    result: RecipeResult, loaded: LoadedModel, folder: Path, stages: tuple[dict[str, Any], ...]
) -> None:
    refused(
        loaded,
        recipe(folder, *stages),
        folder / "run",
        "was begun with other settings; choose another `output_dir`, or rem",
    )


def test_another_model(result: RecipeResult, loaded: LoadedModel, small: Recipe, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(loaded.name, tmp_path / "model")
    other = open_model(str(tmp_path / "model"))
    refused(other, small, folder / "run", r"is another one \(it differs in model\); nothing is overwritten")
    with torch.no_grad():
        other.model.get_input_embeddings().weight.zero_()
    refused(other, small, folder / "run", r"differs in model, model_fingerprint")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"{SEARCHED_8}/scaling.json", "is not what this run wrote there; put it back, or remove"),
        (f"{TUNED_4}/checkpoint/model.safetensors", "is not what this run wrote there"),
    ],
)
def test_changed_results(loaded: LoadedModel, small: Recipe, copy: Path, name: str, says: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(loaded, small, copy, says)
    (copy / name).unlink()
    refused(loaded, small, copy, says)


def test_a_stage_of_another_run(loaded: LoadedModel, small: Recipe, copy: Path) -> None:
    """The same recipe with other texts, say, and a fine-tuning carried over from there."""
    said = read(copy / TUNED_8 / "stage.json")
    assert said["read"] == {name: read(copy / name / "stage.json")["sha256"] for name in (TUNED_4, SEARCHED_8)}
    said["read"][SEARCHED_8]["scaling.json"] = "0" * 64
    (copy / TUNED_8 / "stage.json").write_text(json.dumps(said))
    refused(loaded, small, copy, f"{TUNED_8} was made from another {SEARCHED_8} than there is now; put that back")
    said.pop("read")  # of a run that was begun before this was written down
    (copy / TUNED_8 / "stage.json").write_text(json.dumps(said))
    run_recipe(loaded, small, copy)


def test_no_run_at_all(loaded: LoadedModel, small: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused(loaded, small, tmp_path, "is not empty; nothing is overwritten")
    refused(loaded, small, tmp_path / "mine.txt", "found a file")
    (tmp_path / "recipe.json").write_text("{}")
    refused(loaded, small, tmp_path, "is not of a recipe's run")
    for text in ("{", "[]"):
        (tmp_path / "recipe.json").write_text(text)
        refused(loaded, small, tmp_path, "expected .*JSON.* in .*recipe.json, found .*; put it back")


def test_a_second_process(result: RecipeResult, loaded: LoadedModel, small: Recipe, folder: Path) -> None:
    """A lock of another open file is one of another process."""
    with (folder / "run/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(loaded, small, folder / "run", "another process runs a recipe in .*run; wait for it or stop it")


def test_the_folder_is_locked_while_a_stage_runs(
    loaded: LoadedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(folder / "one", SEARCH_4)
    run: Callable[..., dict[str, Any]] = Stages.run

    def meanwhile(self: Stages, step: Step, *more: Any) -> dict[str, Any]:
        second = RunFolder.of(tmp_path / "run", loaded, made, steps(made, 64, 64))
        for enter in (second.check, second.claimed().__enter__):
            with pytest.raises(LongRopeError, match="another process runs a recipe"):
                enter()
        return run(self, step, *more)

    monkeypatch.setattr(Stages, "run", meanwhile)
    run_recipe(loaded, made, tmp_path / "run")
