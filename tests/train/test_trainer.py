"""The trainer: one window per micro-batch, the step's gradient whatever the accumulation, LoRA's trained parts."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longrope.data.packing import PackedRows
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.saving import plain_saves
from longrope.models.scoring import token_nll
from longrope.run_files import FINETUNE_IDENTITY
from longrope.train.config import FinetuneConfig, LoraConfig
from longrope.train.finetune import packed_rows, training_windows
from longrope.train.lora import trained_in_full, with_lora
from longrope.train.loss import chunked_loss
from longrope.train.trainer import collate, make_trainer, training_arguments
from tests.train.runs import MIXED, Recorded, open_fresh, training, write_texts, yarn_scaling


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("training") / "texts")


class Run:
    """One training in memory: its losses, the windows its forwards had, and the weights it came to."""

    def __init__(self, checkpoint: Path, sources: Path, folder: Path, settings: FinetuneConfig) -> None:
        loaded = open_fresh(checkpoint)
        scaling = yarn_scaling(loaded)
        self.windows = training_windows(loaded, scaling, settings)
        self.rows: PackedRows = packed_rows(loaded, [sources], settings, self.windows)
        recorded = Recorded()
        self.progress = recorded.progress
        self.used: list[Any] = []
        self.first_loss = self.step_loss(loaded.model, scaling, settings)
        scaled = apply_scaling(loaded.model, scaling)
        rotary = scaled.rotaries[0]
        hook = rotary.register_forward_hook(lambda *_: self.used.append(rotary.pinned))
        with plain_saves(loaded.model), chunked_loss(loaded.model):
            folder.mkdir(exist_ok=True)
            (folder / FINETUNE_IDENTITY).touch()
            arguments = training_arguments(settings, folder / "trainer", cpu=True)
            make_trainer(
                loaded.model,
                arguments,
                self.rows,
                settings,
                scaled=scaled,
                windows=self.windows,
                run="test",
                callbacks=recorded,
            ).train()
        hook.remove()
        remove_scaling(loaded.model)
        self.weights: dict[str, Tensor] = {name: value.clone() for name, value in loaded.model.state_dict().items()}

    def step_loss(self, model: Any, scaling: Any, settings: FinetuneConfig) -> float:
        """The mean loss of the first step's rows, document by document, by the scoring that evaluation uses."""
        scaled = apply_scaling(model, scaling)
        total, count = 0.0, 0
        for index in range(settings.rows_per_step):
            ids, positions, _ = self.rows.tensors(index)
            filled = self.rows.filled(index)
            starts = [*(positions[:filled] == 0).nonzero().flatten().tolist(), filled]
            for a, b in pairwise(starts):
                with torch.no_grad(), scaled.using(self.windows[self.rows.rows[index].part]):
                    total += float(token_nll(model, ids[None, a:b]).double().sum())
                count += b - a - 1
        remove_scaling(model)
        return total / count


def test_every_micro_batch_has_its_window_and_the_loss_is_the_steps_mean(
    checkpoint: Path, sources: Path, tmp_path: Path
) -> None:
    settings = training(steps=4, batch=4, mix=MIXED, save_every=9)
    run = Run(checkpoint, sources, tmp_path, settings)
    short, long = run.windows["short"], run.windows["long"]
    assert short.is_identity
    assert long.attention_factor != 1.0
    assert run.used == [run.windows[row.part] for row in run.rows.rows]
    assert {short, long} == set(run.used)
    assert run.progress[0].loss == pytest.approx(run.first_loss, abs=2e-5)
    assert run.progress[-1].loss < run.progress[0].loss - 0.05
    assert [one.step for one in run.progress] == [1, 2, 3, 4]


def test_rows_at_once_or_one_by_one_train_the_same(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    """Rows differ in how many targets they have: dividing by micro-batch would not be the mean of the step."""
    one = Run(checkpoint, sources, tmp_path / "one", training(steps=2, batch=2, mix="short"))
    both = Run(checkpoint, sources, tmp_path / "both", training(steps=2, batch=2, micro_batch=2, mix="short"))
    assert one.rows.rows == both.rows.rows
    assert len({one.rows.scored(index) for index in range(4)}) > 1
    for ours, theirs in zip(one.progress, both.progress, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)


def test_a_micro_batch_never_mixes() -> None:
    item = {name: torch.zeros(4) for name in ("input_ids", "position_ids", "shift_labels")}
    with pytest.raises(ValueError, match="one part"):
        collate([item | {"part": "short", "weight": 1.0}, item | {"part": "long", "weight": 1.0}])
    with pytest.raises(ValueError, match="2 steps"):
        collate([item | {"part": "long", "weight": 0.5}, item | {"part": "long", "weight": 1.0}])


def test_a_loss_that_is_no_number_stops(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    usual = training(steps=4, batch=1, warmup=0)
    settings = usual.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 1e30})  # beyond what is allowed
    with pytest.raises(LongRopeError, match=r"the loss of step [23] is not finite \(nan\), at 256 tokens in") as error:
        Run(checkpoint, sources, tmp_path, settings)
    assert error.value.code == "not-finite"


def test_bf16(checkpoint: Path, sources: Path, tmp_path: Path) -> None:
    run = Run(checkpoint, sources, tmp_path, training(steps=2, batch=1, mix=MIXED, bf16=True))
    assert run.progress[0].loss == pytest.approx(run.first_loss, abs=0.02)
    assert {value.dtype for value in run.weights.values()} == {torch.float32}


def test_lora_trains_updates_embeddings_and_norms(checkpoint: Path) -> None:
    model = open_fresh(checkpoint).model
    assert trained_in_full(model) == ["embed_tokens", "input_layernorm", "norm", "post_attention_layernorm"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        wrapped = with_lora(model, LoraConfig(rank=2), 0)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "norm" in name or "embed_tokens" in name for name in trained)
    assert sum("lora_A" in name for name in trained) == 2 * 7
    assert sum("norm" in name for name in trained) == 5
