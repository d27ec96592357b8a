"""Fine-tuning as a whole: its output, what evaluation finds in it, that it resumes bit for bit, what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from longrope.callbacks import Callbacks, TrainProgress
from longrope.data.sources import read_all
from longrope.errors import LongRopeError
from longrope.evaluation.held_out import seen_documents
from longrope.export.source import find_source
from longrope.locked import FolderLock
from longrope.models.apply import applied_scaling, apply_scaling
from longrope.models.loading import load_model, open_model
from longrope.rope.scaling import RopeScaling, Window
from longrope.train.config import FinetuneConfig, LoraConfig
from longrope.train.finetune import FinetuneResult, finetune
from longrope.train.resume import SEAL
from longrope.written import temporary
from tests.checkpoints import WINDOW, save_checkpoint, words
from tests.train.runs import MIXED, TARGET, InterruptAt, Recorded, open_fresh, training, write_texts, yarn_scaling

CONFIG = training(mix=MIXED)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("finetune") / "texts")


def run(checkpoint: Path, sources: Path, out: Path, config: FinetuneConfig = CONFIG, **more: Any) -> FinetuneResult:
    loaded = open_fresh(checkpoint)
    return finetune(loaded, scaling=yarn_scaling(loaded), data=sources, output_dir=out, config=config, cpu=True, **more)


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "checkpoint" / "model.safetensors")


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@dataclass
class Copies(Callbacks):
    """Copies the run folder after a step: all that a process killed there leaves."""

    folder: Path

    def on_train_progress(self, progress: TrainProgress) -> None:
        if progress.step in (3, 5):
            shutil.copytree(self.folder / "run", self.folder / f"step{progress.step}")


@pytest.fixture(scope="module")
def finished(checkpoint: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, and copies of its folder as a kill in step 3 or 5 would have left it."""
    folder = tmp_path_factory.mktemp("finished")
    run(checkpoint, sources, folder / "run", callbacks=Copies(folder))
    return folder / "run"


@pytest.fixture
def killed(finished: Path) -> Path:
    """The folder after a kill in step 5: checkpoints 2 and 4."""
    return finished.parent / "step5"


@pytest.fixture
def interrupted(finished: Path) -> Path:
    """The folder after a kill in step 3: checkpoint 2."""
    return finished.parent / "step3"


def test_what_a_run_leaves(finished: Path, checkpoint: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        ".written.jsonl",
        "checkpoint",
        "finetune.json",
        "run.json",
        "scaling.json",
    ]
    assert not list(finished.rglob("*.pt"))  # nothing pickled is left
    source = load_file(checkpoint / "model.safetensors")
    trained = weights(finished)
    assert trained.keys() == source.keys()
    assert all(not torch.equal(trained[name], source[name]) for name in source)
    config, before = (
        json.loads((folder / "config.json").read_text()) for folder in (finished / "checkpoint", checkpoint)
    )
    assert config == before
    summary = json.loads((finished / "finetune.json").read_text())
    assert [row["step"] for row in summary["curve"]] == [1, 2, 3, 4, 5, 6]
    assert summary["curve"][-1]["loss"] < summary["curve"][0]["loss"]
    assert set(summary["tokens"]) == {"short", "long"}
    assert {"versions", "command", "machine"} <= summary.keys()
    assert summary["identity"]["settings"]["learning_rate"] == 1e-3
    assert open_model(str(finished / "checkpoint")).geometry.original_length == WINDOW


def test_a_result_is_read_written_and_shown(finished: Path, tmp_path: Path) -> None:
    result = FinetuneResult.load(finished)
    result.save(tmp_path)
    again = FinetuneResult.load(tmp_path)
    assert (again.scaling, again.checkpoint, again.summary) == (result.scaling, result.checkpoint, result.summary)
    assert repr(result).startswith("FinetuneResult(6 steps, loss ")
    assert "windows of 64, 256 tokens" in repr(result)


def test_the_scaling_is_what_was_trained(finished: Path, checkpoint: Path) -> None:
    """The short window has attention factor 1, whatever the given scaling says of it."""
    given = yarn_scaling(open_fresh(checkpoint))
    left = RopeScaling.load(finished / "scaling.json")
    assert given.windows[0].attention_factor != 1.0
    assert left.windows == (Window(WINDOW, (1.0,) * 16), given.windows[1])
    summary = json.loads((finished / "finetune.json").read_text())
    assert len(summary["not_in_transformers"]) == 1
    assert "attention factor 1 of the short window" in summary["not_in_transformers"][0]
    assert find_source(str(finished)).model == str(finished / "checkpoint")


def test_evaluation_finds_what_search_and_training_have_seen(finished: Path, sources: Path) -> None:
    texts = {document.sha256 for document in read_all([sources])}
    for place in (finished, finished / "checkpoint"):
        seen = set(seen_documents(RopeScaling.load(place / "scaling.json")))
        assert "f" * 64 in seen  # the search's
        assert len(seen & texts) >= 8
        assert seen - {"f" * 64} <= texts


@pytest.mark.parametrize("seal_lost", [False, True])
def test_killed_in_mid_training_and_resumed_comes_to_the_same_bits(
    checkpoint: Path, sources: Path, finished: Path, killed: Path, tmp_path: Path, seal_lost: bool
) -> None:
    """With the seal of checkpoint 4 lost, as if killed while it was written, 2 is the last."""
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    if seal_lost:
        (out / "trainer/checkpoint-4" / SEAL).unlink()
    recorded = Recorded()
    result = run(checkpoint, sources, out, resume=True, callbacks=recorded)
    first = 2 if seal_lost else 4
    assert recorded.started == [(6, first)]
    assert [progress.step for progress in recorded.progress] == list(range(first + 1, 7))
    assert_same_bits(weights(out), weights(finished))
    assert result.losses == FinetuneResult.load(finished).losses


def test_a_run_that_was_killed_while_it_wrote_its_result_is_finished(
    checkpoint: Path, sources: Path, finished: Path, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)

    def full(*_: object) -> None:
        raise LongRopeError("the disk is full", code="full")

    with monkeypatch.context() as patched:
        patched.setattr("longrope.train.output.write_json_atomic", full)
        with pytest.raises(LongRopeError, match="disk is full"):
            run(checkpoint, sources, out, resume=True)
    temporary(out / "checkpoint").mkdir()
    (out / "checkpoint").mkdir()
    (out / "checkpoint" / "mine").write_text("mine")
    with pytest.raises(LongRopeError, match=r"mine is not a file that this run has written.* move it") as error:
        run(checkpoint, sources, out, resume=True)
    assert error.value.code == "not-ours"
    (out / "checkpoint" / "mine").rename(tmp_path / "mine")
    run(checkpoint, sources, out, resume=True)
    assert_same_bits(weights(out), weights(finished))
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}


def test_a_single_window_of_tied_weights_in_another_dtype(sources: Path, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    result = run(source, sources, tmp_path / "run", training(steps=1, save_dtype="bfloat16"))
    assert [window.max_length for window in result.scaling.windows] == [TARGET]  # it holds for short texts too
    assert result.summary["not_in_transformers"] == []
    assert result.summary["identity"]["loss"] == "chunked"
    saved = weights(tmp_path / "run")
    assert saved.keys() == load_file(source / "model.safetensors").keys()  # a tied weight is saved once
    assert "lm_head.weight" not in saved
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert load_model(str(tmp_path / "run/checkpoint"), dtype="checkpoint").dtype == torch.bfloat16


def test_a_model_of_the_callers_is_trained_in_place_and_stays_as_it_was(
    checkpoint: Path, sources: Path, tmp_path: Path
) -> None:
    """The weights are those that its folder would be trained to; the scaling applied before is applied again."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    geometry = open_fresh(checkpoint).geometry
    # Start tokens: a config cannot express them, so saving the weights must not try to.
    scaling = RopeScaling.extended(geometry, TARGET, [2.0] * geometry.pairs, 4)
    scaling.save(tmp_path / "scaling.json")
    other = RopeScaling.original(scaling.geometry)
    apply_scaling(model, other)
    given: dict[str, Any] = {"scaling": tmp_path / "scaling.json", "config": training(steps=1)}
    finetune(model, data=[str(sources)], output_dir=tmp_path / "object", **given)
    finetune(str(checkpoint), data=str(sources), output_dir=tmp_path / "name", **given)
    assert_same_bits(weights(tmp_path / "object"), weights(tmp_path / "name"))
    assert_same_bits(dict(model.state_dict()), weights(tmp_path / "object"))
    assert applied_scaling(model) == other
    assert not model.training


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lora_is_merged_or_left_as_an_adapter(sources: Path, tmp_path: Path, tied: bool) -> None:
    source = save_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    text = torch.arange(40)[None] + 7
    for name, merge in (("merged", True), ("adapter", False)):
        lora = LoraConfig(rank=4, merge=merge)
        run(source, sources, tmp_path / name, training(mix=MIXED, steps=3, learning_rate=1e-2, lora=lora))
    assert weights(tmp_path / "merged").keys() == load_file(source / "model.safetensors").keys()
    merged = load_model(str(tmp_path / "merged/checkpoint"))
    before = load_model(str(source))
    assert not torch.equal(merged.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight) == tied
    assert not (tmp_path / "adapter/checkpoint").exists()
    peft: Any = pytest.importorskip("peft")
    again = peft.PeftModel.from_pretrained(load_model(str(source)), str(tmp_path / "adapter/adapter"))
    with torch.no_grad():
        torch.testing.assert_close(again(text).logits, merged(text).logits, rtol=1e-3, atol=1e-3)
        assert (before(text).logits - merged(text).logits).abs().max() > 0.1


def test_lora_resumes_to_the_same_bits(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    config = training(mix=MIXED, steps=4, learning_rate=1e-2, lora=LoraConfig(rank=4))
    run(checkpoint, sources, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, sources, tmp_path / "parts", config, callbacks=InterruptAt(3))
    run(checkpoint, sources, tmp_path / "parts", config, resume=True)
    assert_same_bits(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


# --- refusals


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (training(length=WINDOW), "not-longer"),
        (training(batch=3, micro_batch=2), "indivisible-batch"),
        (training(mix="short", steps=1), "out-of-memory"),
        (training(trainer={"fsdp": True}), "not-together"),
    ],
)
def test_refused_before_any_work(
    checkpoint: Path, sources: Path, tmp_path: Path, config: FinetuneConfig, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code == "out-of-memory":  # rows of a batch that cannot fit would take minutes to plan
        monkeypatch.setattr("longrope.train.memory.os.sysconf", lambda _: 1)
    with pytest.raises(LongRopeError) as error:
        run(checkpoint, sources, tmp_path / "run", config)
    assert error.value.code == code
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_scaling_that_does_not_reach_the_rows_is_refused(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match="reaches 256 tokens"):
        run(checkpoint, sources, tmp_path / "run", training(length=4 * TARGET))


def test_a_window_beyond_the_longest_document_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(words(20), "utf-8")
    with pytest.raises(LongRopeError, match=r"documents of at least 256 tokens, found none among 1 .the longest, text"):
        run(checkpoint, text, tmp_path / "run", training())


def test_a_scaling_of_another_model_is_refused(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    other = open_model(str(save_checkpoint(tmp_path / "other", max_position_embeddings=128)))
    with pytest.raises(LongRopeError, match="original_length"):
        finetune(checkpoint, scaling=yarn_scaling(other), data=sources, output_dir=tmp_path / "run", config=CONFIG)


def test_more_documents_than_a_result_can_name(
    checkpoint: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longrope.train.output.MOST_DOCUMENTS", 0)
    with pytest.raises(LongRopeError, match="at most 0 documents, each of which the result names") as error:
        run(checkpoint, sources, tmp_path / "run")
    assert error.value.code == "too-large"
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_scaling_needs_one(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    for model in (checkpoint, open_fresh(checkpoint), open_fresh(checkpoint).model):
        with pytest.raises(LongRopeError, match="whose checkpoint states none") as error:
            finetune(model, data=sources, output_dir=tmp_path / "run", config=CONFIG)
        assert error.value.code == "missing-scaling"
    assert not (tmp_path / "run").exists()


def test_what_exists_is_not_overwritten(checkpoint: Path, sources: Path, finished: Path, interrupted: Path) -> None:
    for folder, resume in ((finished, False), (finished, True), (interrupted, False)):
        with pytest.raises(LongRopeError) as error:
            run(checkpoint, sources, folder, resume=resume)
        assert error.value.code == "output-exists"


def test_there_must_be_a_run_to_resume(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(LongRopeError) as error:
        run(checkpoint, sources, tmp_path / "run", resume=True)
    assert error.value.code == "not-resumable"


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        ({"steps": 7}, r"rows_sha256 .*settings.steps 6 \(now 7\)"),
        ({"learning_rate": 1e-4}, r"settings.learning_rate 0.001 \(now 0.0001\)"),
        ({"seed": 1}, "settings.seed 0"),
    ],
)
def test_another_run_is_not_resumed(
    checkpoint: Path, sources: Path, interrupted: Path, more: dict[str, Any], difference: str
) -> None:
    with pytest.raises(LongRopeError, match=difference) as error:
        run(checkpoint, sources, interrupted, CONFIG.replace(**more), resume=True)
    assert error.value.code == "other-run"


def test_another_runs_checkpoint_is_not_opened(
    checkpoint: Path, sources: Path, interrupted: Path, tmp_path: Path
) -> None:
    """The same settings in another folder are another run: its checkpoints are not exchanged for ours."""
    other = tmp_path / "run"
    shutil.copytree(interrupted, other)
    identity = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(identity | {"run": "0" * 32}))
    with pytest.raises(LongRopeError, match="checkpoint of another run") as error:
        run(checkpoint, sources, other, resume=True)
    assert error.value.code == "other-run"


def test_a_second_process_is_locked_out(checkpoint: Path, sources: Path, interrupted: Path) -> None:
    loaded = open_fresh(checkpoint)
    ids = torch.arange(20)[None]
    before = loaded.model(input_ids=ids).logits
    with FolderLock(interrupted, "busy", name="run.json", create=False), pytest.raises(LongRopeError) as error:
        finetune(loaded, scaling=yarn_scaling(loaded), data=sources, output_dir=interrupted, config=CONFIG, resume=True)
    assert error.value.code == "locked"
    assert torch.equal(loaded.model(input_ids=ids).logits, before)  # after a failure the model is as it was
