"""`finetune` as a whole on several gloo processes: what it leaves is what one process leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longrope.train.finetune import FinetuneResult
from tests.checkpoints import save_checkpoint, words
from tests.train.distributed import FSDP2, finetune_main
from tests.train.runs import MIXED, torchrun, write_texts

LENGTH = 1024
SETTINGS: dict[str, Any] = {"length": LENGTH, "steps": 5, "batch": 4, "warmup": 0, "mix": MIXED}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, with tied and with grouped weights, and texts of more than 1,024 tokens beside short ones."""
    folder = tmp_path_factory.mktemp("verb")
    save_checkpoint(folder / "model", num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    save_checkpoint(folder / "tied", tie_word_embeddings=True)
    write_texts(folder / "texts")
    for number in range(3):
        (folder / f"texts/very_long{number}.txt").write_text(words(800, 90 + number), "utf-8")
    return folder


def trained(folder: Path, name: str, processes: int, *flags: str, model: str = "model", **more: Any) -> FinetuneResult:
    """The run `name`, once for all tests; one process is this one."""
    out = folder / name
    if (out / "finetune.json").exists():
        return FinetuneResult.load(out)
    arguments = (str(folder / model), str(folder / "texts"), str(out), json.dumps(SETTINGS | more), *flags)
    if processes == 1:
        finetune_main(*arguments)
    else:
        ended = torchrun("tests.train.distributed", processes, "finetune", *arguments)
        assert ended.returncode == 0, ended.stderr[-3000:]
    return FinetuneResult.load(out)


def weights(result: FinetuneResult) -> dict[str, Tensor]:
    return load_file(result.checkpoint / "model.safetensors")


def assert_same(one: FinetuneResult, other: FinetuneResult) -> None:
    assert one.losses == pytest.approx(other.losses, abs=1e-4)
    assert other.losses[-1] < other.losses[0] - 0.1
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        # AdamW moves a weight by up to the learning rate a step, whatever its gradient: 5e-3 in all.
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    files = {path.name for path in other.checkpoint.iterdir()}
    assert {path.name for path in one.checkpoint.iterdir()} == files


@pytest.mark.parametrize("model", ["model", "tied"])
def test_what_fsdp2_saves_is_the_whole_model(folder: Path, model: str) -> None:
    alone = trained(folder, f"one-{model}", 1, model=model)
    sharded = trained(folder, f"sharded-{model}", 2, model=model, trainer=FSDP2)
    assert_same(sharded, alone)
    assert ("lm_head.weight" in weights(sharded)) == (model == "model")
    assert not (folder / f"sharded-{model}/trainer").exists()


def test_two_processes_that_share_rows_train_as_one_does(folder: Path) -> None:
    assert_same(
        trained(folder, "shared-long", 2, mix="long", context_parallel=2), trained(folder, "long", 1, mix="long")
    )


def test_shared_rows_skip_as_those_of_one_do(folder: Path) -> None:
    """Each process rotates its share by the positions of the whole row; two rows at once, each with skips of its own,
    and rows of the original window between them."""
    more = {"skip_to": 8 * LENGTH, "micro_batch": 2}
    alone = trained(folder, "skipping", 1, **more)
    assert set(alone.summary["tokens"]) == {"short", "long"}
    assert_same(trained(folder, "shared-skipping", 2, context_parallel=2, **more), alone)


@pytest.mark.parametrize(
    ("name", "processes", "more"),
    [("shared", 2, {}), ("shared-and-data-parallel", 4, {}), ("shared-and-sharded", 2, {"trainer": FSDP2})],
)
def test_packed_rows_are_shared_too(folder: Path, name: str, processes: int, more: dict[str, Any]) -> None:
    alone = trained(folder, "one-model", 1)
    assert set(alone.summary["tokens"]) == {"short", "long"}
    assert_same(trained(folder, name, processes, context_parallel=2, **more), alone)


def test_shared_rows_resume_to_the_same_bits(folder: Path) -> None:
    whole = trained(folder, "shared", 2, context_parallel=2)
    settings = json.dumps(SETTINGS | {"context_parallel": 2})
    given = (folder / "model", folder / "texts", folder / "parts", settings, "interrupt")
    killed = torchrun("tests.train.distributed", 2, "finetune", *given)
    assert killed.returncode != 0
    assert not (folder / "parts/checkpoint").exists()
    parts = trained(folder, "parts", 2, "resume", context_parallel=2)
    assert parts.losses == whole.losses
    ours, theirs = weights(parts), weights(whole)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
