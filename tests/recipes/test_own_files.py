"""Nothing in a run folder is deleted, replaced or written through that the run has not written itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.recipes import extend as extend_module
from longrope.recipes.run import run_recipe
from longrope.recipes.schema import Recipe
from longrope.recipes.stages import Stages
from tests.moments import content
from tests.recipes.recipes import EVALUATE, EXPORT, SEARCH_4, recipe
from tests.recipes.test_extend import run as extend

SEARCHED, EVALUATED, EXPORTED = "01-search-256", "02-evaluate", "03-export"
STAGES = (SEARCH_4, {**EVALUATE, "lengths": ["4x"], "samples": 1}, EXPORT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, loaded: LoadedModel) -> Path:
    """The folder of a recipe that has run to its end, with the recipe's own folder beside it."""
    folder = tmp_path_factory.mktemp("own")
    run_recipe(loaded, recipe(folder, *STAGES), folder / "run")
    return folder


@pytest.fixture
def made(finished: Path) -> Recipe:
    return recipe(finished, *STAGES)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def refused(loaded: LoadedModel, made: Recipe, run: Path, code: str, *says: str) -> None:
    """Refused in one line before any stage runs; nothing is changed."""
    before = content(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "run", lambda _, step, __: pytest.fail(f"{step.folder} ran"))
        with pytest.raises(LongRopeError) as error:
            run_recipe(loaded, made, run)
    assert error.value.code == code, error.value
    assert all(text in str(error.value) for text in says), error.value
    assert "\n" not in str(error.value)
    assert content(run) == before


def forget(run: Path, *folders: str) -> None:
    """Make the stages unfinished, and what comes after all stages undone."""
    for folder in folders:
        shutil.rmtree(run / folder)
    for name in ("result.json", "scaling.json", "report.html"):
        (run / name).unlink()
    shutil.rmtree(run / "report_figures")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (SEARCHED, "scaling.json"),
        (EVALUATED, "notes.txt"),
        (EXPORTED, "notes.txt"),
        (EXPORTED, "checkpoint/config.json"),
    ],
)
def test_files_in_a_stage_that_is_not_begun(
    loaded: LoadedModel, made: Recipe, run: Path, folder: str, name: str
) -> None:
    forget(run, *[stage for stage in (SEARCHED, EVALUATED, EXPORTED) if stage >= folder])
    (run / folder / name).parent.mkdir(parents=True)
    (run / folder / name).write_text("mine")
    refused(loaded, made, run, "output-exists", folder, "is not begun", "move that to another place")
    if name == "notes.txt":
        shutil.rmtree(run / folder)  # as the message says
        (run / folder / "empty").mkdir(parents=True)
        assert run_recipe(loaded, made, run).stages.keys() == {SEARCHED, EVALUATED, EXPORTED}


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint/README.md"])
def test_files_in_an_export_that_begins_anew(loaded: LoadedModel, made: Recipe, run: Path, name: str) -> None:
    """Killed before it was recorded as finished; without the user's file, it is made again."""
    forget(run)
    (run / EXPORTED / "stage.json").unlink()
    path = run / EXPORTED / name
    kept = path.read_bytes() if path.exists() else None
    path.write_text("mine")
    refused(loaded, made, run, "not-ours", str(path), "move it to another place")
    path.unlink() if kept is None else path.write_bytes(kept)
    before = content(run)
    run_recipe(loaded, made, run)
    assert {*before, f"{EXPORTED}/stage.json"} <= content(run).keys()


@pytest.mark.parametrize("name", ["report.html", "scaling.json", "result.json", "report_figures/mine.png"])
def test_an_edited_result_of_a_recipe_that_has_changed(
    loaded: LoadedModel, finished: Path, run: Path, name: str
) -> None:
    changed = recipe(finished, *STAGES[:1], STAGES[1], EXPORT, {**EVALUATE, "lengths": ["1x"], "samples": 1})
    (run / name).write_text("mine")
    refused(loaded, changed, run, "not-ours", str(run / name), "nothing is deleted or replaced")


def test_results_that_nobody_has_touched_are_made_again(loaded: LoadedModel, finished: Path, run: Path) -> None:
    before = (run / "report.html").read_bytes()
    changed = recipe(finished, *STAGES, {**EVALUATE, "lengths": ["1x"], "samples": 1})
    done = run_recipe(loaded, changed, run)
    assert tuple(done.stages) == (SEARCHED, EVALUATED, EXPORTED, "04-evaluate")
    assert tuple(json.loads((run / "result.json").read_text())["stages"]) == tuple(done.stages)
    assert (run / "report.html").read_bytes() != before


def test_an_edited_report_of_the_same_recipe_is_kept(loaded: LoadedModel, made: Recipe, run: Path) -> None:
    (run / "report.html").write_text("mine")
    run_recipe(loaded, made, run)
    assert (run / "report.html").read_text() == "mine"


@pytest.mark.parametrize("folder", [SEARCHED, EXPORTED])
def test_a_stage_that_is_a_link(loaded: LoadedModel, made: Recipe, run: Path, folder: str) -> None:
    """Nothing is written into another place, be it empty or the stage's folder moved there."""
    elsewhere = run.parent / "elsewhere"
    forget(run)
    (run / folder / "stage.json").unlink()
    (run / folder).rename(elsewhere)
    (run / folder).symlink_to(elsewhere)
    before = content(elsewhere)
    refused(loaded, made, run, "output-exists", str(run / folder), "is a symbolic link")
    assert content(elsewhere) == before
    shutil.rmtree(elsewhere)
    elsewhere.mkdir()
    refused(loaded, made, run, "output-exists", "is a symbolic link")
    assert not any(elsewhere.iterdir())


@pytest.mark.parametrize("name", [f"{SEARCHED}/scaling.json", f"{SEARCHED}/search.json", f"{EVALUATED}/eval.json"])
def test_a_result_of_a_stage_that_was_not_recorded_as_finished_is_compared_with_its_log(
    loaded: LoadedModel, made: Recipe, run: Path, name: str
) -> None:
    forget(run)
    stage = Path(name).parts[0]
    (run / stage / "stage.json").unlink()
    key = {"scaling.json": '"attention_factor": ', "search.json": '"best_loss": ', "eval.json": '"value": '}[
        Path(name).name
    ]
    text = (run / name).read_text()
    changed = text.replace(key, f"{key}1", 1)
    assert changed != text
    (run / name).write_text(changed)
    with pytest.raises(LongRopeError, match=r"is not what this run came to: .* differ; put it back") as error:
        run_recipe(loaded, made, run)
    assert error.value.code == "damaged-file"
    assert str(run / name) in str(error.value)


def test_measurements_of_a_finished_stage_are_checked(loaded: LoadedModel, made: Recipe, run: Path) -> None:
    path = run / EVALUATED / "eval.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    refused(loaded, made, run, "damaged-file", str(path), "is not what this run wrote there")


# --- `extend` without a recipe


@pytest.fixture
def stopped(checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`extend` stopped at the beginning of a stage; the folder of its run."""

    def until(stage: str) -> Path:
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(extend_module, stage, stop)
            with pytest.raises(KeyboardInterrupt):
                extend(checkpoint, texts, tmp_path / "run")
        return tmp_path / "run"

    return until


@pytest.mark.parametrize(
    ("stage", "name", "code"),
    [
        ("report", "report_figures/mine.png", "output-exists"),
        ("report", "extend.json", "damaged-file"),
        ("export_hf", "checkpoint/mine.txt", "output-exists"),
        ("export_hf", "eval.json", "damaged-file"),
        ("evaluate", "scaling.json", "damaged-file"),
    ],
)
def test_files_in_the_way_of_extend(
    stopped: Callable[..., Path], checkpoint: Path, texts: Path, stage: str, name: str, code: str
) -> None:
    run = stopped(stage)
    (run / name).parent.mkdir(exist_ok=True)
    kept = (run / name).read_bytes() if (run / name).exists() else None
    (run / name).write_text('{"mine": 1, "evaluations": 0, "schema": "mine"}')
    with pytest.raises(LongRopeError) as error:
        extend(checkpoint, texts, run, resume=True)
    assert (error.value.code, "\n" in str(error.value)) == (code, False), error.value
    assert "mine" in (run / name).read_text()
    if stage == "report":
        (run / name).unlink() if kept is None else (run / name).write_bytes(kept)
        extend(checkpoint, texts, run, resume=True)
        assert (run / "report.html").is_file()


def test_a_checkpoint_of_extend_that_is_a_link(
    stopped: Callable[..., Path], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    run = stopped("export_hf")
    (tmp_path / "elsewhere").mkdir()
    (run / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LongRopeError, match="checkpoint is a symbolic link"):
        extend(checkpoint, texts, run, resume=True)
    assert not any((tmp_path / "elsewhere").iterdir())
