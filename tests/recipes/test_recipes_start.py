"""Every recipe that ships or lies beside the package: its texts are understood, and its first stage can begin."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from longrope.data.readers import DatasetName
from longrope.data.sources import read_documents
from longrope.models.loading import LoadedModel, open_model
from longrope.recipes.check import MOST_ROUNDS, TextRounds, check_recipe
from longrope.recipes.graph import steps
from longrope.recipes.schema import ExportStage, FinetuneStage, Recipe, SearchStage
from longrope.recipes.yaml import BUILT_IN, load_recipe, recipe_model
from longrope.rope.closed_forms import su_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.search.config import attention_factor_of
from tests.checkpoints import words
from tests.recipes.recipes import SEARCH_4, SEARCH_8, TRAIN_4, TRAIN_8
from tests.recipes.recipes import recipe as small

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
NAMES = [*BUILT_IN, *map(str, FILES)]


class Rows:
    """What `datasets.load_dataset(…, streaming=True)` gives, of a hub that has every dataset: ten long texts."""

    def __init__(self, count: int = 10) -> None:
        self.count = count

    def take(self, count: int) -> Rows:
        return Rows(min(count, self.count))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for seed in range(self.count):
            text = f"{seed} {words(400, seed)} " * 80
            yield {"text": text, "content": text, "raw_content": text}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A stand-in for the hub. Returns the requests that it got."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, *, streaming: bool, **given: Any) -> Rows:
        assert streaming
        assert "trust_remote_code" not in given
        asked.append((path, given))
        return Rows()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def loaded_recipe(name: str, window: int = 4096) -> Recipe:
    _, stated = recipe_model(name)
    return load_recipe(name, stated or window)


def sources(made: Recipe) -> set[str]:
    """All texts that a recipe names."""
    of_stages = [stage.data or () for stage in made.stages if not isinstance(stage, ExportStage)]
    return {source for texts in (made.data, made.eval_data, *of_stages) for source in texts}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: Path(name).stem)
def test_every_text_is_understood(name: str, hub: list[tuple[str, dict[str, Any]]]) -> None:
    found = sources(loaded_recipe(name))
    named = [source for source in found if source.startswith("hf:")]
    for source in named:
        assert list(islice(read_documents(source, limit=1), 1))
    assert len(hub) == len(named)
    for source in found - set(named):
        assert Path(source).is_absolute() or Path(source).parent.parts, source  # found from the recipe's folder
    assert "1:5" not in str(found)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if recipe_model(name)[0]])
def test_the_first_stage_of_the_papers_recipes_can_begin(
    name: str,
    hub: list[tuple[str, dict[str, Any]]],
    loaded: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # tokens are kept below it
    monkeypatch.setattr("longrope.recipes.check._require", lambda *_: None)  # Ray
    made = loaded_recipe(name)
    check_recipe(loaded, made, steps(made, 64, 64)[:1])
    assert [path for path, _ in hub] == ["emozilla/pg19"]
    assert hub[0][1] == {"name": None, "split": "validation"}  # the whole split


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_first_stage_of_the_recipes_for_the_embedded_model_can_begin(path: Path) -> None:
    loaded = open_model("tiny")
    made = load_recipe(str(path), loaded.geometry.original_length)
    check_recipe(loaded, made, steps(made, 256, 256)[:1])


GEOMETRIES = {
    "llama2-7b-2048k": RopeGeometry(rotary_dim=128, base=1e4, original_length=4096),
    "llama3-8b-128k": RopeGeometry(rotary_dim=128, base=5e5, original_length=8192),
}


def test_the_attention_factors_are_the_authors() -> None:
    for name, target, factor in (("llama2-7b-2048k", 2**21, 1.3229), ("llama3-8b-128k", 2**17, 1.1435)):
        stages = [stage for stage in loaded_recipe(name).stages if isinstance(stage, SearchStage)]
        last = max(stages, key=lambda stage: stage.target)
        assert last.target == target
        wanted = attention_factor_of(str(last.settings.attention_factor), GEOMETRIES[name], target)
        assert wanted == su_attention_factor(GEOMETRIES[name], target) == pytest.approx(factor, abs=5e-4)


@pytest.mark.parametrize("name", ["llama2-7b-2048k", "mistral-7b-2048k", "longrope"])
def test_longrope_has_the_papers_settings(name: str) -> None:
    made = loaded_recipe(name)
    searches = [stage for stage in made.stages if isinstance(stage, SearchStage)]
    tunings = [stage for stage in made.stages if isinstance(stage, FinetuneStage)]
    assert {stage.settings.method for stage in searches} == {"longrope"}
    assert {stage.settings.start_tokens for stage in searches} == {"search"}
    assert {stage.settings.mix for stage in tunings} == {"chunks"}
    if name == "mistral-7b-2048k":
        assert [stage.target // 4096 for stage in searches] == [32, 64, 512]
        assert {(stage.settings.beta_fast, stage.settings.beta_slow) for stage in searches} == {(128.0, 2.0)}
        assert {stage.settings.length for stage in tunings} == {16384}


@pytest.mark.parametrize("name", ["llama3-8b-128k", "phi3-mini-128k"])
def test_longrope2_has_the_papers_settings(name: str) -> None:
    (tuning,) = [stage for stage in loaded_recipe(name).stages if isinstance(stage, FinetuneStage)]
    settings = tuning.settings
    assert settings.shares == pytest.approx({"short": 0.3, "medium": 0.3, "long": 0.4})
    assert (settings.long_from, settings.long_to) == (100 * 1024, 200 * 1024)
    assert settings.steps * settings.rows_per_step * settings.length == pytest.approx(10e9, rel=1e-3)
    fields = {DatasetName.parse(source.removeprefix("hf:")).field for source in tuning.data or ()}
    assert fields == {None, "raw_content", "content"}


def test_rounds_over_the_texts_are_said_and_too_many_warn(loaded: LoadedModel, tmp_path: Path) -> None:
    made = small(tmp_path, SEARCH_4, {**TRAIN_4, "steps": 3}, SEARCH_8, {**TRAIN_8, "steps": 9, "mix": "chunks"})
    few, many = check_recipe(loaded, made, steps(made, 64, 64))
    tokens = len(loaded.tokenizer((tmp_path / "texts.txt").read_text("utf-8"))["input_ids"]) - 1
    assert many.rounds == {"chunks": pytest.approx(9 * 2 * 512 / (tokens + 2))}
    assert few.rounds["long"] == pytest.approx(3 * 2 * 256 / (tokens // 254 * 256))
    assert few.warning is None
    assert many.warning is None
    often = TextRounds("finetune 128k", {"short": 1.0, "long": MOST_ROUNDS + 0.1})
    assert "goes 4.1 times through its texts of the part long, above 4" in str(often.warning)


def test_another_target_length() -> None:
    made = load_recipe("longrope", 4096).with_target_length(2**20)
    targets = [stage.target for stage in made.stages if isinstance(stage, SearchStage | FinetuneStage)]
    assert targets == [2**17, 2**18, 2**17, 2**18, 2**20]
    (tuning,) = [
        stage
        for stage in load_recipe("longrope2", 8192).with_target_length(65536).stages
        if isinstance(stage, FinetuneStage)
    ]
    assert (tuning.target, tuning.settings.length) == (65536, 65536)
    passkeys = load_recipe("llama2-7b-2048k", 4096).with_target_length(2**20).stages[7]
    assert passkeys.lengths[-2:] == (2**19, 2**20)  # type: ignore[union-attr]
    with pytest.raises(Exception, match=r"above the recipe's other targets \(131072, 262144, 2097152 tokens"):
        load_recipe("longrope", 4096).with_target_length(2**18)
