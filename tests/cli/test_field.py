"""`--field` on every verb that reads texts, and `field` of the Python functions: the same documents as plain files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import longrope as lr
from longrope.data.sources import read_all
from longrope.models.loading import open_model
from longrope.recipes.run import prepare_recipe
from longrope.recipes.stages import Stages
from longrope.run_files import SCALING
from longrope.storage import sha256_text
from tests.checkpoints import words
from tests.conftest import Ran
from tests.train.runs import open_fresh, yarn_scaling

SEARCH = ("--method", "gradient", "--steps", "1", "--samples", "1", "--no-continuation")
TRAINING = ("--length", "256", "--steps", "1", "--batch", "1", "--learning-rate", "1e-3", "--warmup", "0")


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Path]:
    """`search` and `other`: the text in field `content`, a null beside it; `none` has the rows without that field."""
    found = {}
    for name, seed in (("search", 1), ("other", 2)):
        lines = [{"id": 1, "doc": {"content": words(2000, seed)}}, {"id": 2, "doc": {"content": None}}]
        found[name] = tmp_path / f"{name}.jsonl"
        found[name].write_text("\n".join(map(json.dumps, lines)))
    return found


def provenance_hashes(path: Path) -> list[str]:
    found: list[str] = json.loads(path.read_text())["provenance"]["data"]["document_sha256"]
    return found


def test_every_verb_takes_it(cli: Callable[..., Ran], checkpoint: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    field = ("--field", "doc.content")
    out = tmp_path / "search"
    ran = cli("search", checkpoint, "--target-length", "128", "--data", rows["search"], *field, *SEARCH, "-o", out)
    assert ran.code == 0, ran.err
    assert provenance_hashes(out / SCALING) == [sha256_text(words(2000, 1))]
    ran = cli("eval", checkpoint, "--data", rows["other"], *field, "--lengths", "64", "--samples", "2", "--json")
    assert ran.code == 0, ran.err
    plain = tmp_path / "other.txt"
    plain.write_text(words(2000, 2))
    same = cli("eval", checkpoint, "--data", plain, "--lengths", "64", "--samples", "2", "--json")
    assert json.loads(ran.out)["results"] == json.loads(same.out)["results"]
    scaling = tmp_path / "yarn.json"
    yarn_scaling(open_fresh(checkpoint)).save(scaling)
    given = ("--scaling", scaling, "--data", rows["search"], *field, *TRAINING)
    ran = cli("finetune", checkpoint, *given, "-o", tmp_path / "tuned", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["document_sha256"] == [sha256_text(words(2000, 1))]
    data = ("--data", rows["search"], "--eval-data", rows["other"], *field)
    lengths = ("--target-length", "128", "--lengths", "128", "--eval-samples", "2")
    ran = cli("extend", checkpoint, *data, *lengths, *SEARCH, "-o", tmp_path / "whole")
    assert ran.code == 0, ran.err
    assert provenance_hashes(tmp_path / "whole" / SCALING) == [sha256_text(words(2000, 1))]


def test_without_it_every_verb_says_where_to_look(
    cli: Callable[..., Ran], checkpoint: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    scaling = tmp_path / "yarn.json"
    yarn_scaling(open_fresh(checkpoint)).save(scaling)
    data, out = ("--data", rows["search"]), ("-o", tmp_path / "out")
    for refused in (
        cli("search", checkpoint, "--target-length", "128", *data, *out),
        cli("eval", checkpoint, "--lengths", "64", *data),
        cli("finetune", checkpoint, "--scaling", scaling, *data, *TRAINING, *out),
        cli("extend", checkpoint, "--eval-data", rows["other"], *data, *out),
    ):
        assert "line 1; it has: id, doc; name the text's own with --field" in refused.refusal
    assert not (tmp_path / "out").exists()
    assert (
        "--field says where the rows of --data have" in cli("eval", "tiny", "--lengths", "64", "--field", "a").refusal
    )


def test_python_functions(checkpoint: Path, rows: dict[str, Path]) -> None:
    loaded = open_model(str(checkpoint))
    given: dict[str, Any] = {"data": [rows["search"]], "field": "doc.content"}
    config = lr.SearchConfig(method="gradient", steps=1, samples=1, continuation=False)
    found = lr.search_scaling(loaded, target_length=128, config=config, **given)
    assert found.provenance["data"]["document_sha256"] == [sha256_text(words(2000, 1))]
    other = {"data": rows["other"], "field": ["text", "doc.content"]}
    measured = lr.perplexity(loaded, lengths=64, samples=2, **other)
    evaluated = lr.evaluate(loaded, lengths=64, config=lr.EvalConfig(samples=2), **other)
    assert measured[64] == evaluated.rows[0].value
    assert [document.name for document in lr.load_data(rows["other"], field="doc.content")] == ["other.jsonl:1"]


def recipe_at(path: Path, **given: Any) -> Path:
    path.write_text(yaml.safe_dump(given))
    return path


def test_a_recipe_has_it_for_all_stages_or_for_one(checkpoint: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    search = {"stage": "search", "target": "2x", "method": "gradient", "steps": 1, "samples": 1, "continuation": False}
    measure = {"stage": "evaluate", "lengths": ["1x"], "samples": 1}
    texts = {"data": [rows["search"].name], "eval_data": [rows["other"].name]}
    whole = recipe_at(tmp_path / "whole.yaml", field="doc.content", **texts, stages=[search, measure])
    prepare_recipe(str(whole), str(checkpoint), tmp_path / "run").check()
    one = recipe_at(tmp_path / "one.yaml", **texts, stages=[search | {"field": ["doc.content"]}, measure])
    with pytest.raises(lr.LongRopeError, match=r"stage 2 \(evaluate\): no field 'text' or 'messages'"):
        prepare_recipe(str(one), str(checkpoint), tmp_path / "run").check()
    prepared = prepare_recipe(str(one), str(checkpoint), tmp_path / "run", field=["doc.content"])
    prepared.check()
    # The field is part of what a stage is; a run from before there were fields is still its own.
    assert [stage.get("field") for stage in prepared.folder.stages.values()] == [["doc.content"]] * 2
    plain = recipe_at(tmp_path / "plain.yaml", data=["other.jsonl"], stages=[search])
    stages = prepare_recipe(str(plain), str(checkpoint), tmp_path / "run").folder.stages
    assert all("field" not in stage for stage in stages.values())


def test_a_stage_of_a_recipe_reads_it(checkpoint: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    search = {"stage": "search", "target": "2x", "method": "gradient", "steps": 1, "samples": 1, "continuation": False}
    train = {"stage": "finetune", "target": "2x", "steps": 1, "batch": 1, "learning_rate": 1e-3, "warmup": 0}
    given = {"data": [rows["search"].name], "field": "doc.content", "stages": [search, train]}
    prepared = prepare_recipe(str(recipe_at(tmp_path / "r.yaml", **given)), str(checkpoint), tmp_path / "run")
    (tmp_path / "run").mkdir()
    stages = Stages(prepared.loaded, prepared.recipe, tmp_path / "run", lr.Callbacks())
    for step in prepared.steps:
        stages.run(step, None)
    tuned = json.loads((tmp_path / "run" / prepared.steps[1].folder / "finetune.json").read_text())
    assert tuned["document_sha256"] == [document.sha256 for document in read_all([rows["search"]], field="doc.content")]


def test_chat_messages_and_their_template_in_the_provenance(
    cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "chat-model")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"conversation": [{"role": "user", "content": words(2000, 1)}]}))
    given = ("--data", chat, "--field", "conversation")
    out = tmp_path / "run"
    ran = cli("search", model, "--target-length", "128", *given, *SEARCH, "-o", out)
    assert ran.code == 0, ran.err
    data = json.loads((out / SCALING).read_text())["provenance"]["data"]
    said = f"(chat template {sha256_text(template)[:12]})"
    assert all(sample["document"].endswith(said) for sample in data["samples"])
    ran = cli("eval", model, "--lengths", "64", "--samples", "1", *given, "--json")
    assert json.loads(ran.out)["settings"]["documents"] == [f"chat.jsonl:1 {said}"]
    ran = cli("finetune", model, "--scaling", out / SCALING, *given, *TRAINING, "--length", "128", "-o", tmp_path / "t")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "t" / "finetune.json").read_text())["chat_template_sha256"] == [sha256_text(template)]
    assert "the tokenizer has no chat template" in cli("eval", checkpoint, "--lengths", "64", *given).refusal
