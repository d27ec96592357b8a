"""Recipes as they are written: what they become for a model, and one clear line for whatever is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from longrope.errors import LongRopeError
from longrope.evaluation.config import HarnessTask
from longrope.recipes.graph import steps
from longrope.recipes.schema import EvaluateStage, FinetuneStage, Recipe, RecoverStage, SearchStage
from longrope.recipes.yaml import BUILT_IN, load_recipe, recipe_model
from longrope.search.config import SearchConfig
from longrope.train.config import FinetuneConfig, LoraConfig
from tests.recipes.recipes import STAGES, recipe, write_recipe

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SEARCH = {"stage": "search", "target": "4x"}
TUNE = {"stage": "finetune", "target": "4x"}


def test_lengths_are_of_the_model(tmp_path: Path) -> None:
    written = write_recipe(
        tmp_path, *({"stage": "search", "target": target} for target in ("32x", "1.5x", "2×", "8k", 96))
    )
    for original_length, expected in ((64, [2048, 96, 128, 8192, 96]), (4096, [131072, 6144, 8192, 8192, 96])):
        made = load_recipe(str(written), original_length)
        assert [stage.target for stage in made.stages if isinstance(stage, SearchStage)] == expected


def test_keys_go_to_the_stage_or_its_verb(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        {**SEARCH, "method": "gradient", "attention_factor": 1, "steps": 5, "workers": 2, "dtype": "bfloat16"},
        {**TUNE, "length": 128, "lora": {"rank": 2}, "trainer": {"adam_epsilon": 1e-6}, "data": ["book:x", "a.txt"]},
        {"stage": "recover"},
        {"stage": "evaluate", "suites": ["retention"], "tasks": ["arc_challenge:25", "mmlu"], "seed": 7},
        seed=3,
    )
    search, tune, recover, evaluate = made.stages
    assert isinstance(search, SearchStage)
    assert isinstance(tune, FinetuneStage)
    assert isinstance(recover, RecoverStage)
    assert isinstance(evaluate, EvaluateStage)
    assert search.settings == SearchConfig(method="gradient", attention_factor="1", steps=5, seed=3)
    assert (search.workers, search.dtype, search.data) == (2, "bfloat16", None)
    assert (tune.target, tune.settings.length, tune.settings.seed) == (256, 128, 3)
    assert tune.settings.lora == LoraConfig(rank=2)
    assert tune.data == ("book:x", str(tmp_path / "a.txt"))
    assert recover.lengths == (64, 128)
    assert evaluate.settings.tasks == (HarnessTask("arc_challenge", 25), HarnessTask("mmlu"))
    assert (evaluate.seed, evaluate.lengths_for(64, 256)) == (7, [])
    assert made.data == (str(tmp_path / "texts.txt"),)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-8 for text."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "stages: [{stage: finetune, target: 4x, learning_rate: 2e-5, trainer: {adam_epsilon: 1e-8, a: 2.5E+3}}]"
    )
    (stage,) = load_recipe(str(path), 64).stages
    assert isinstance(stage, FinetuneStage)
    assert stage.settings == FinetuneConfig(length=256, learning_rate=2e-5, trainer={"adam_epsilon": 1e-8, "a": 2500.0})


def test_rows_may_skip_ahead_within_the_target(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("stages: [{stage: finetune, target: 16x, length: 4x, skip_to: 16x, long_from: 4x, long_to: 1M}]")
    (stage,) = load_recipe(str(path), 64).stages
    assert isinstance(stage, FinetuneStage)
    assert (stage.settings.length, stage.settings.skip_to) == (256, 1024)
    assert (stage.settings.long_from, stage.settings.long_to) == (256, 2**20)
    path.write_text("stages: [{stage: finetune, target: 8x, length: 4x, skip_to: 16x}]")
    with pytest.raises(LongRopeError, match="expected a skip_to of at most its target of 512, found 1024"):
        load_recipe(str(path), 64)


@pytest.mark.parametrize(
    ("skip_to", "new", "expected"),
    [
        ("16x", 2048, (256, 2048)),  # the longest target: it moves with it
        ("16x", 512, (256, 512)),
        ("16x", 256, (256, None)),  # nothing to skip
        ("8x", 2048, (256, 512)),
        ("8x", 384, (256, 384)),
    ],
)
def test_rows_skip_within_another_target(skip_to: str, new: int, expected: tuple[int, int | None]) -> None:
    stages = [{"stage": "search", "target": "16x"}, {"stage": "finetune", "target": "16x", "length": "4x"}]
    stages[1]["skip_to"] = skip_to
    recipe = Recipe.model_validate({"stages": stages}, context={"original_length": 64})
    stage = recipe.with_target_length(new).stages[1]
    assert isinstance(stage, FinetuneStage)
    assert (stage.target, stage.settings.length, stage.settings.skip_to) == (new, *expected)


def test_yaml_merges_are_no_keys_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "stages:\n- &first {stage: search, target: 4x, samples: 2}\n- {<<: *first, target: 8x}\n", encoding="utf-8"
    )
    first, second = load_recipe(str(path), 64).stages
    assert isinstance(first, SearchStage)
    assert isinstance(second, SearchStage)
    assert (first.target, second.target, second.settings) == (256, 512, first.settings)


def test_texts_lie_beside_the_recipe(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        SEARCH,
        {"stage": "evaluate", "suites": ["ruler"], "ruler_tasks": ["qa_1"], "qa_file": "qa.json"},
        data=["texts.txt", "/else/where.txt", "hf:name@test:3", "book:a"],
    )
    assert made.data == (str(tmp_path / "texts.txt"), "/else/where.txt", "hf:name@test:3", "book:a")
    evaluate = made.stages[1]
    assert isinstance(evaluate, EvaluateStage)
    assert evaluate.settings.qa_file == tmp_path / "qa.json"


RATIOS = {
    "longrope": (4096, 512),
    "longrope-continued": (4096, 512),
    "longrope2": (4096, 16),
    "longrope2-unit": (4096, 16),
    "quick": (4096, 8),
    "llama2-7b-2048k": (4096, 512),
    "mistral-7b-2048k": (4096, 512),
    "llama3-8b-128k": (8192, 16),
    "phi3-mini-128k": (2048, 64),
}
"""Original window and ratio of the recipes that ship."""


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_recipes(name: str) -> None:
    window, ratio = RATIOS[name]
    planned = steps(load_recipe(name, window), window, window)
    assert max(step.context_length for step in planned) == ratio * window
    assert [step.stage.stage for step in planned][-1] == "export"
    model, stated = recipe_model(name)
    assert (model is None) == ("-" not in name or name.startswith("longrope"))
    assert stated in (None, window)


def test_all_recipes_ship() -> None:
    assert set(BUILT_IN) == RATIOS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_recipes_beside_the_package(path: Path) -> None:
    assert recipe_model(str(path)) == ("tiny", None)
    assert steps(load_recipe(str(path), 256), 256, 256)


def fails(path: str, original_length: int = 64) -> str:
    with pytest.raises(LongRopeError) as error:
        load_recipe(path, original_length)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{**SEARCH, "iteration": 2}], "stage 1 (search): unknown key 'iteration'; did you mean iterations?"),
        (
            [{**SEARCH, "zzz": 2}],
            "stage 1 (search): unknown key 'zzz'; known: data, field, dtype, workers, context_parallel, sta",
        ),
        ([SEARCH, {**TUNE, "lora": {"ranks": 2}}], "stage 2 (finetune): unknown setting `ranks`; did you mean rank?"),
        ([{"stage": "export", "data": ["a"]}], "stage 1 (export): unknown key 'data'; known: stage, to"),
        ([{"stage": "search"}], "stage 1 (search): expected a value for `target`, found none"),
        ([{"target": "4x"}], "stage 1: expected 'stage' to be one of search, finetune, recover, evaluate, export"),
        ([{"stage": "train"}], "stage 1: expected 'stage' to be one of search"),
        (["search"], "stage 1: "),
        ([{**SEARCH, "target": "32y"}], "stage 1 (search): a length must be a positive whole number of tokens"),
        ([{**SEARCH, "target": "1.01x"}], "stage 1 (search): expected a ratio such as 32x that makes whole tokens"),
        ([{**SEARCH, "target": "infx"}], "expected a ratio such as 32x"),
        ([{**SEARCH, "target": "nanx"}], "expected a ratio such as 32x"),
        ([{**SEARCH, "target": None}], "stage 1 (search): a length must be"),
        ([SEARCH, {**SEARCH, "method": "luck"}], "stage 2 (search): expected `method` to be 'longrope'"),
        ([{**SEARCH, "samples": "many"}], "stage 1 (search): expected a whole number for `samples`"),
        ([{**SEARCH, "workers": 0}], "stage 1 (search): expected `workers` of at least 1, found 0"),
        ([{**SEARCH, "context_parallel": 2}], "context_parallel 2 shares texts in Ray workers: give `workers`, too"),
        ([{**SEARCH, "data": "a.txt"}], "stage 1 (search): expected a list for `data`, found 'a.txt'"),
        ([{**TUNE, "length": "8x"}], "stage 1 (finetune): expected a length of at most its target of 256, found 512"),
        ([{**TUNE, "steps": 0}], "stage 1 (finetune): expected `steps` of at least 1, found 0"),
        ([{**TUNE, "processes": 3}], "expected a batch that 3 rows at once divide (micro_batch × processes / context"),
        ([{**TUNE, "context_parallel": 2}], "expected a multiple of it, found processes 1"),
        ([{**TUNE, "lora": {"merge": False}}], "stage 1 (finetune): the stages after it work on merged weights"),
        ([{"stage": "recover", "method": "gradient"}], "a recovery searches by the method longrope only"),
        ([{"stage": "recover", "lengths": []}], "stage 1 (recover): expected at least 1 of `lengths`"),
        ([{"stage": "evaluate", "suites": ["chess"]}], "stage 1 (evaluate): expected suites of perplexity"),
        ([{"stage": "evaluate", "suites": []}], "stage 1 (evaluate): expected at least 1 of `suites`"),
        ([{"stage": "evaluate", "suites": ["retention"], "lengths": ["1x"]}], "leave the lengths out"),
        ([{"stage": "evaluate", "tasks": ["mmlu"]}], "lm-eval's tasks belong to the suite retention"),
        ([{"stage": "evaluate", "seed": -1}], "stage 1 (evaluate): expected `seed` of at least 0"),
        ([{"stage": "export", "to": "onnx"}], "stage 1 (export): expected `to` to be 'hf'"),
        ([], "expected at least 1 of `stages`"),
        ({"stage": "search"}, "expected a list for `stages`"),
    ],
)
def test_wrong_stages(tmp_path: Path, stages: Any, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}), "utf-8")
    assert says in (found := fails(str(path)))
    assert found.startswith(str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: [", "is not YAML"),
        ("- stage: search", "expected a mapping with 'stages', found list"),
        ("", "expected a mapping with 'stages', found NoneType"),
        ("about: x", "expected a value for `stages`"),
        ("stage: []\nstages: [{stage: export}]", "unknown setting `stage`; did you mean stages?"),
        ("stages: [{stage: search, target: 4x, target: 8x}]", "the key 'target' is given twice (line 1)"),
        ("stages: [{stage: export}]\nseed: -1", "expected `seed` of at least 0, found -1"),
        ("stages: [{stage: export}]\ndata: a.txt", "expected a list for `data`, found 'a.txt'"),
        ("? [1, 2]\n: 3", "is not YAML"),
        ("stages: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("stages: [{stage: search, target: 4x, 3: 4}]", "stage 1 (search): "),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    assert says in fails(str(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "there is no recipe 'fast': expected llama2-7b-2048k, llama3-8b-128k, longrope, " in fails("fast")
    assert "there is no recipe" in fails(str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in fails(str(tmp_path / "bytes.yaml"))
    (tmp_path / "length.yaml").write_text("original_length: long")
    with pytest.raises(LongRopeError, match=r"length\.yaml: original_length: a length must be"):
        recipe_model(str(tmp_path / "length.yaml"))


def test_the_models_own_window(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, *STAGES, model="owner/name", original_length="8k")
    assert recipe_model(str(path)) == ("owner/name", 8192)


def test_texts_given_beside_a_recipe(tmp_path: Path) -> None:
    own = recipe(tmp_path, {**SEARCH, "data": ["a.txt"]}, {"stage": "evaluate", "suites": ["passkey"]})
    for given in ((("b.txt",), ()), ((), ("b.txt",))):
        with pytest.raises(LongRopeError, match=r"no stage of the recipe would read `(eval_)?data`"):
            own.with_data(*given)
    shared = recipe(tmp_path, SEARCH, {"stage": "evaluate"})
    changed = shared.with_data(("b.txt",), ())
    assert (changed.data, changed.eval_data) == (("b.txt",), shared.eval_data)
    assert shared.with_data((), ()) == shared
