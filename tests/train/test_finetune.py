"""Fine-tuning as a whole: what it leaves, what evaluation finds in it, that it resumes bit for bit, what it refuses."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longrope.data.sources import read_all
from longrope.errors import LongRopeError
from longrope.evaluation.run import seen_documents
from longrope.export.export import find_source
from longrope.models.loading import load_model, open_model
from longrope.rope.scaling import RopeScaling, Window
from longrope.train.checkpoints import SEAL
from longrope.train.config import FinetuneConfig, LoraConfig
from longrope.train.finetune import FinetuneResult, Listener, finetune
from tests.checkpoints import WINDOW, save_checkpoint, words
from tests.train.runs import MIXED, TARGET, open_fresh, training, write_texts, yarn_scaling

SETTINGS = training(mix=MIXED)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("finetune") / "texts")


def run(checkpoint: Path, sources: Path, out: Path, settings: FinetuneConfig = SETTINGS, **more: Any) -> FinetuneResult:
    loaded = open_fresh(checkpoint)
    return finetune(loaded, yarn_scaling(loaded), [str(sources)], out, settings, **more)


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "checkpoint" / "model.safetensors")


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def finished(checkpoint: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(checkpoint, sources, out)
    return out


def test_what_a_run_leaves(finished: Path, checkpoint: Path, sources: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
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
    assert json.loads((finished / "checkpoint/config.json").read_text()) == json.loads(
        (checkpoint / "config.json").read_text()
    )
    summary = json.loads((finished / "finetune.json").read_text())
    assert [row["step"] for row in summary["curve"]] == [1, 2, 3, 4, 5, 6]
    assert summary["curve"][-1]["loss"] < summary["curve"][0]["loss"]
    assert set(summary["tokens"]) == {"short", "long"}
    assert {"versions", "command", "machine"} <= summary.keys()
    assert summary["identity"]["settings"]["learning_rate"] == 1e-3
    assert open_model(str(finished / "checkpoint")).geometry.original_length == WINDOW


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


@pytest.fixture(scope="module")
def killed(checkpoint: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a process of its own, killed by SIGKILL in step 5: after checkpoint 4."""
    folder = tmp_path_factory.mktemp("killed")
    script = f"""
import os, signal, sys, torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
torch.set_num_threads(1)
from longrope.train.finetune import Listener, finetune
from tests.train.test_finetune import SETTINGS
from tests.train.runs import open_fresh, yarn_scaling
subject = open_fresh(Path({str(checkpoint)!r}))
kill = lambda one: os.kill(os.getpid(), signal.SIGKILL) if one.step == 5 else None
finetune(subject, yarn_scaling(subject), [{str(sources)!r}], Path("run"), SETTINGS, listener=Listener(on_progress=kill))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return folder / "run"


@pytest.mark.parametrize("seal_lost", [False, True])
def test_killed_in_mid_training_and_resumed_comes_to_the_same_bits(
    checkpoint: Path, sources: Path, finished: Path, killed: Path, tmp_path: Path, seal_lost: bool
) -> None:
    """With the seal of checkpoint 4 lost, as if killed while it was written, 2 is the last."""
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    if seal_lost:
        (out / "trainer/checkpoint-4" / SEAL).unlink()
    started: list[tuple[int, int]] = []
    steps: list[int] = []
    listener = Listener(lambda *given: started.append(given), lambda one: steps.append(one.step))
    result = run(checkpoint, sources, out, resume=True, listener=listener)
    first = 2 if seal_lost else 4
    assert (started, steps) == ([(6, first)], list(range(first + 1, 7)))
    assert_same_bits(weights(out), weights(finished))
    assert result.losses == FinetuneResult.load(finished).losses


def test_a_run_that_was_killed_while_it_wrote_its_result_is_finished(
    checkpoint: Path, sources: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def full(*_: object) -> None:
        raise LongRopeError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("longrope.train.output.write_json_atomic", full)
        with pytest.raises(LongRopeError, match="disk is full"):
            run(checkpoint, sources, out)
    (out / "checkpoint").mkdir(exist_ok=True)
    (out / "checkpoint" / "half").write_text("of it")
    (out / ".partial-x").mkdir()
    run(checkpoint, sources, out, resume=True)
    assert_same_bits(weights(out), weights(finished))
    assert not list(out.glob(".partial-*"))


def test_a_single_window_holds_for_short_texts_too(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    result = run(checkpoint, sources, tmp_path / "run", training(steps=1))
    assert [window.max_length for window in result.scaling.windows] == [TARGET]
    assert result.summary["not_in_transformers"] == []


def test_saved_in_another_dtype(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    run(checkpoint, sources, tmp_path / "run", training(steps=1, save_dtype="bfloat16"))
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.bfloat16}
    assert load_model(str(tmp_path / "run/checkpoint"), dtype="checkpoint").dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_lora_is_merged_or_left_as_an_adapter(sources: Path, tmp_path: Path, tied: bool) -> None:
    source = save_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    text = torch.arange(40)[None] + 7
    for name, merge in (("merged", True), ("adapter", False)):
        lora = LoraConfig(rank=4, merge=merge)
        run(source, sources, tmp_path / name, training(mix=MIXED, steps=4, learning_rate=1e-2, lora=lora))
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
    settings = training(mix=MIXED, learning_rate=1e-2, lora=LoraConfig(rank=4))
    run(checkpoint, sources, tmp_path / "whole", settings)

    def stop(one: Any) -> None:
        if one.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, sources, tmp_path / "parts", settings, listener=Listener(on_progress=stop))
    run(checkpoint, sources, tmp_path / "parts", settings, resume=True)
    assert_same_bits(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


# --- what is refused


@pytest.fixture(scope="module")
def interrupted(checkpoint: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after its first checkpoint."""
    out = tmp_path_factory.mktemp("interrupted") / "run"

    def stop(one: Any) -> None:
        if one.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, sources, out, listener=Listener(on_progress=stop))
    return out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (training(length=4 * TARGET), "this scaling reaches 256 tokens"),
        (training(length=WINDOW), "above the model's window of 64"),
        (training(mix="medium"), "documents of 65 to 255 tokens, found none"),
        (training(length=TARGET, batch=3, micro_batch=2), "give a --batch that 2 divides"),
        (training(mix="short", micro_batch=2**22, batch=2**22, steps=1), "a step needs at least"),
        (training(lora=LoraConfig(), trainer={"deepspeed": {}}), "LoRA trains in one process|cannot be used"),
        (training(trainer={"fsdp": True}), "FSDP shards over several GPUs, .* found 1 on cpu"),
    ],
)
def test_refused_before_any_work(
    checkpoint: Path, sources: Path, tmp_path: Path, settings: FinetuneConfig, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if settings.micro_batch > 2:  # rows of a batch that cannot fit are not planned either: that alone takes minutes
        monkeypatch.setattr("longrope.train.memory.os.sysconf", lambda _: 1)
        settings = settings.replace(micro_batch=1, batch=1)
    with pytest.raises(LongRopeError, match=message) as error:
        run(checkpoint, sources, tmp_path / "run", settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_window_beyond_the_longest_document_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(words(20), "utf-8")
    with pytest.raises(LongRopeError, match=r"documents of at least 256 tokens, found none among 1 .the longest, text"):
        run(checkpoint, text, tmp_path / "run", training())


def test_a_scaling_of_another_model_is_refused(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    other = open_model(str(save_checkpoint(tmp_path / "other", max_position_embeddings=128)))
    with pytest.raises(LongRopeError, match="original_length"):
        finetune(open_fresh(checkpoint), yarn_scaling(other), [str(sources)], tmp_path / "run", SETTINGS)


def test_what_exists_is_not_overwritten(checkpoint: Path, sources: Path, finished: Path, interrupted: Path) -> None:
    for resume in (False, True):
        with pytest.raises(LongRopeError, match="is finished"):
            run(checkpoint, sources, finished, resume=resume)
    with pytest.raises(LongRopeError, match="not empty"):
        run(checkpoint, sources, interrupted)


def test_there_must_be_a_run_to_resume(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match=r"no run in .* to resume"):
        run(checkpoint, sources, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"steps": 7}, r"rows_sha256 .*settings.steps 6 \(now 7\)"),
        ({"learning_rate": 1e-4}, r"settings.learning_rate 0.001 \(now 0.0001\)"),
        ({"seed": 1}, "settings.seed 0"),
    ],
)
def test_another_run_is_not_resumed(
    checkpoint: Path, sources: Path, interrupted: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(LongRopeError, match=f"is another one: .*{message}"):
        run(checkpoint, sources, interrupted, replace(SETTINGS, **more), resume=True)


def test_another_runs_checkpoint_is_not_opened(
    checkpoint: Path, sources: Path, interrupted: Path, tmp_path: Path
) -> None:
    """The same settings in another folder are another run: its checkpoints are not exchanged for ours."""
    other = tmp_path / "run"
    shutil.copytree(interrupted, other)
    identity = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(identity | {"run": "0" * 32}))
    with pytest.raises(LongRopeError, match="checkpoint of another run"):
        run(checkpoint, sources, other, resume=True)


def test_a_second_process_is_locked_out(checkpoint: Path, sources: Path, interrupted: Path) -> None:
    with (interrupted / "run.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LongRopeError, match="another process is training"):
            run(checkpoint, sources, interrupted, resume=True)


def test_the_model_is_as_it_was_after_a_run_that_failed(checkpoint: Path, sources: Path, interrupted: Path) -> None:
    loaded = open_fresh(checkpoint)
    ids = torch.arange(20)[None]
    before = loaded.model(input_ids=ids).logits
    with pytest.raises(LongRopeError, match="not empty"):
        finetune(loaded, yarn_scaling(loaded), [str(sources)], interrupted, SETTINGS)
    assert torch.equal(loaded.model(input_ids=ids).logits, before)
