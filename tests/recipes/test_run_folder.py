"""A folder that brings its own scaling as a MODEL: a fine-tuning run, a model with a scaling.json, an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope.costs.plan import plan
from longrope.costs.search_cost import search_work
from longrope.errors import LongRopeError
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.held_out import seen_documents
from longrope.evaluation.run import evaluate
from longrope.export.config import ExportConfig
from longrope.export.export import export_checkpoint
from longrope.models import checkpoint_files
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.checkpoint_files import embedded_model_path
from longrope.models.config import LoadOptions
from longrope.models.inspect import inspect_model
from longrope.models.loading import LoadedModel, open_model, recorded_scaling
from longrope.models.texts import sources_or_books
from longrope.rope.closed_forms import yarn
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.config import SearchConfig
from longrope.search.run import search
from longrope.train.finetune import finetune
from tests.checkpoints import WINDOW, save_checkpoint, words
from tests.train.runs import TARGET, training, write_texts, yarn_scaling

FEW = SearchConfig(method="longrope", population=4, iterations=0, samples=1)


def windows(loaded: LoadedModel, *lengths: int) -> RopeScaling:
    """One window for each of `lengths`, YaRN's factors for each, attention factors that differ."""
    made = [
        Window(length, yarn(loaded.geometry, length), attention_factor=1 + index / 10)
        for index, length in enumerate(lengths)
    ]
    return RopeScaling(loaded.geometry, tuple(made), {"data": {"document_sha256": ["f" * 64]}})


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Path:
    """The folder of a fine-tuning run after recovery, as far as it is read: with four windows."""
    folder = tmp_path / "tuned"
    shutil.copytree(checkpoint, folder / "checkpoint")
    scaling = windows(open_model(str(checkpoint)), WINDOW, 2 * WINDOW, 3 * WINDOW, TARGET)
    scaling.save(folder / "scaling.json")
    return folder


def test_what_a_run_folder_is_opened_as(run: Path, checkpoint: Path) -> None:
    loaded = open_model(str(run))
    assert loaded.checkpoint_scaling == RopeScaling.load(run / "scaling.json")
    assert (loaded.name, loaded.context_length, loaded.geometry.original_length) == (str(run), TARGET, WINDOW)
    for length, index in ((1, 0), (WINDOW, 0), (WINDOW + 1, 1), (3 * WINDOW, 2), (TARGET, 3), (2 * TARGET, 3)):
        assert loaded.checkpoint_window(length) == loaded.checkpoint_scaling.windows[index]
    plain = open_model(str(checkpoint))
    assert (plain.checkpoint_scaling, plain.checkpoint_window(8), plain.context_length) == (None, None, WINDOW)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded.model(input_ids=ids).logits, plain.model(input_ids=ids).logits)  # nothing is installed


def test_a_scaling_beside_the_config_counts_too(run: Path) -> None:
    (run / "scaling.json").rename(run / "checkpoint/scaling.json")
    for folder in (run, run / "checkpoint"):
        assert open_model(str(folder)).checkpoint_scaling == RopeScaling.load(run / "checkpoint/scaling.json")
    other = windows(open_model(str(run)), TARGET)
    other.save(run / "scaling.json")  # the run's own goes before it
    assert open_model(str(run)).checkpoint_scaling == recorded_scaling(str(run)) == other
    assert open_model(str(run / "checkpoint")).context_length == TARGET


def test_the_scaling_goes_before_what_the_config_says(tmp_path: Path) -> None:
    """A model that came with a scaling, and was fine-tuned for another: only that one is applied."""
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    folder = save_checkpoint(tmp_path / "model", rope_parameters=rope)
    came_with = open_model(str(folder)).checkpoint_scaling
    assert came_with is not None
    assert came_with.windows[-1].factors == (2.0,) * 16
    windows(open_model(str(folder)), TARGET).save(folder / "scaling.json")
    loaded = open_model(str(folder))
    assert loaded.checkpoint_scaling is not None
    # Installed, the factors are relative to the original RoPE: as in a model whose config says nothing.
    ids = torch.arange(100)[None]
    plain = open_model(str(save_checkpoint(tmp_path / "plain")))
    logits = []
    for one in (loaded, plain):
        apply_scaling(one.model, loaded.checkpoint_scaling)
        logits.append(one.model(input_ids=ids).logits)
        remove_scaling(one.model)
    assert torch.equal(*logits)


@pytest.mark.parametrize(("form", "fold"), [("hf", False), ("hf-unified", False), ("hf", True)])
def test_an_export_is_what_its_config_says(checkpoint: Path, tmp_path: Path, form: str, fold: bool) -> None:
    """Its scaling.json is what it was made from; one regime, or a folded factor, is not in it."""
    wanted = yarn_scaling(open_model(str(checkpoint)))
    wanted.save(tmp_path / "wanted.json")
    given = tmp_path / "wanted.json"
    export_checkpoint(checkpoint, given, tmp_path / "out", target=form, config=ExportConfig(fold_attention_factor=fold))
    loaded = open_model(str(tmp_path / "out"))
    assert loaded.checkpoint_scaling is not None
    rope = json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]
    short, long = loaded.checkpoint_scaling.windows
    assert [list(short.factors), list(long.factors)] == [rope["short_factor"], rope["long_factor"]]
    assert long.attention_factor == rope["attention_factor"]
    assert (loaded.checkpoint_scaling.windows == wanted.windows) == (form == "hf" and not fold)


def test_another_scaling_beside_folded_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    wanted = yarn_scaling(open_model(str(checkpoint)))
    wanted.save(tmp_path / "wanted.json")
    export_checkpoint(checkpoint, wanted, tmp_path / "out", config=ExportConfig(fold_attention_factor=True))
    yarn_scaling(open_model(str(checkpoint)), 1.0).save(tmp_path / "out/scaling.json")
    with pytest.raises(LongRopeError, match="an attention factor folded into its weights"):
        open_model(str(tmp_path / "out"))


def test_inspect_shows_the_windows(run: Path) -> None:
    found = inspect_model(str(run))
    assert [window["max_length"] for window in found.existing_windows] == [WINDOW, 2 * WINDOW, 3 * WINDOW, TARGET]
    assert (found.original_length, found.context_window, found.rope_type) == (WINDOW, TARGET, "default")


def test_a_plan_knows_what_the_run_reaches(run: Path) -> None:
    with pytest.raises(LongRopeError, match=f"above the model's window of {TARGET} tokens"):
        plan(str(run), TARGET)
    loaded, options = open_model(str(run)), SearchConfig(method="longrope", population=4, iterations=0, samples=2)
    work = search_work(loaded, 2 * TARGET, options)
    # Six closed forms, the checkpoint as it is, and it stretched in four ways, each on two texts.
    assert work.extra == [[(2, 2 * TARGET, False, None)] * 11]


def test_eval_takes_the_window_of_each_length(run: Path, checkpoint: Path, texts: Path) -> None:
    """As the weights under the windows that the scaling has: the same numbers, bit for bit."""
    lengths, data = [WINDOW, 2 * WINDOW, 3 * WINDOW, TARGET], [str(texts / "other.txt")]
    options = EvalConfig(samples=1)
    itself = evaluate(open_model(str(run)), lengths=lengths, data=data, baselines=["original", "none"], config=options)
    loaded = open_model(str(checkpoint))
    given = evaluate(loaded, lengths=lengths, data=data, scaling=RopeScaling.load(run / "scaling.json"), config=options)

    def values(evaluation: Any, name: str) -> list[float]:
        return [row.value for row in evaluation.rows if row.scaling == name]

    assert values(itself, "checkpoint") == values(given, "longrope")
    assert len(set(values(itself, "checkpoint"))) == len(values(itself, "checkpoint"))
    assert values(itself, "original") == values(itself, "none")  # the RoPE that the config states
    assert itself.settings["carried_sha256"] != given.settings.get("carried_sha256")


def test_search_keeps_the_windows(run: Path, texts: Path, tmp_path: Path) -> None:
    loaded = open_model(str(run))
    found = search(loaded, 2 * TARGET, [str(texts / "search.txt")], tmp_path / "search", FEW)
    assert loaded.checkpoint_scaling is not None
    assert found.scaling.windows[:-1] == loaded.checkpoint_scaling.windows
    assert found.scaling.windows[-1].max_length == 2 * TARGET
    assert found.scaling.windows[-1].attention_factor == loaded.checkpoint_scaling.windows[-1].attention_factor
    assert "f" * 64 in seen_documents(found.scaling)  # what the weights were trained on
    with pytest.raises(LongRopeError, match=f"above the model's window of {TARGET} tokens, found {TARGET}"):
        search(loaded, TARGET, [str(texts / "search.txt")], tmp_path / "again", FEW)


def test_finetuning_goes_on_from_a_run_folder(checkpoint: Path, tmp_path: Path) -> None:
    """Progressive: first for one window, then for one that reaches further, with what was seen before remembered."""
    sources = str(write_texts(tmp_path / "texts"))
    (tmp_path / "further.txt").write_text(words(300, 77), "utf-8")
    plain = open_model(str(checkpoint))
    first = finetune(
        plain, scaling=yarn_scaling(plain), data=sources, output_dir=tmp_path / "first", config=training(steps=1)
    )
    loaded = open_model(str(tmp_path / "first"))
    assert loaded.checkpoint_scaling == first.scaling
    assert loaded.context_length == TARGET
    length = 2 * TARGET
    further = yarn_scaling(plain, length=length)
    settings = training(steps=1, batch=1, length=length)
    data = [str(tmp_path / "further.txt")]
    second = finetune(loaded, scaling=further, data=data, output_dir=tmp_path / "second", config=settings)
    assert second.scaling.windows == further.windows[-1:]
    assert set(seen_documents(first.scaling)) < set(seen_documents(second.scaling))
    assert open_model(str(tmp_path / "second")).context_length == length
    exported = export_checkpoint(tmp_path / "second", None, tmp_path / "exported")
    assert exported.unsupported == []
    mixed = training(steps=1, batch=1, length=length, mix="short:0.5,long:0.5")
    third = finetune(loaded, scaling=further, data=[sources, *data], output_dir=tmp_path / "third", config=mixed)
    assert [window.max_length for window in third.scaling.windows] == [TARGET, length]
    assert third.scaling.windows[0] == first.scaling.windows[0]  # short texts keep what they were trained with


# --- the embedded model that is extended


@pytest.fixture
def embedded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for its files."""
    (run / "scaling.json").rename(run / "checkpoint/scaling.json")
    folders = {"tiny": embedded_model_path(), "tiny-512x": run / "checkpoint"}
    monkeypatch.setattr(checkpoint_files, "embedded_model_path", lambda name: folders[name])


@pytest.mark.usefixtures("embedded")
def test_the_extended_embedded_model() -> None:
    loaded = open_model("tiny-512x")
    assert (loaded.name, loaded.context_length) == ("tiny-512x", TARGET)
    assert inspect_model("tiny-512x").context_window == TARGET
    for role in ("search", "evaluation"):
        assert sources_or_books("tiny-512x", [], role) == sources_or_books("tiny", [], role) != []
    assert open_model("tiny").checkpoint_scaling is None


@pytest.mark.usefixtures("embedded")
def test_the_command_line_knows_it(cli: Callable[..., Any]) -> None:
    shown = cli("inspect", "tiny-512x", "--json")
    assert shown.code == 0, shown.err
    assert len(json.loads(shown.out)["existing_windows"]) == 4


# --- what is refused


@pytest.mark.parametrize(
    ("content", "says"),
    [("{}", "expected a scaling with schema"), ("not JSON", "is not a scaling: expected JSON"), (b"\xff", "not UTF-8")],
)
def test_a_file_that_is_no_scaling(run: Path, content: str | bytes, says: str) -> None:
    (run / "scaling.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for call in (open_model, inspect_model):
        with pytest.raises(LongRopeError, match=says) as error:
            call(str(run))
        assert "\n" not in str(error.value)


def test_a_scaling_of_another_model(run: Path, tmp_path: Path) -> None:
    other = open_model(str(save_checkpoint(tmp_path / "other", max_position_embeddings=128)))
    windows(other, TARGET).save(run / "scaling.json")
    says = rf"scaling.json of {run}: the scaling is for original_length 128; this model has original_length 64"
    for call in (open_model, inspect_model):
        with pytest.raises(LongRopeError, match=says):
            call(str(run))
    assert (
        open_model(str(run), options=LoadOptions(original_length=128)).context_length == TARGET
    )  # the run was made with this one


def test_a_search_run_is_no_model(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    search(open_model(str(checkpoint)), 128, [str(texts / "search.txt")], tmp_path / "run", FEW)
    with pytest.raises(LongRopeError, match=r"found none in .*run or its checkpoint/"):
        open_model(str(tmp_path / "run"))
