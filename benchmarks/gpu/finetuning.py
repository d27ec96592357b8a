"""Stage e: fine-tuning a model of SmolLM2's shape, ours beside transformers' Trainer with its defaults.

Tokens per second of the last step, and the longest window that fits, by doubling it until memory or time ends. Both in
bfloat16 on rows of random words; random weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger, require_number, synchronize
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

import longrope as lr
from longrope.callbacks import Callbacks, TrainProgress
from longrope.data.documents import Document
from longrope.models.loading import LoadedModel, load_tokenizer, open_model

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
}
SMALL = SHAPE | {"num_hidden_layers": 2, "vocab_size": 2048, "max_position_embeddings": 256}
LENGTHS = [16_384, 32_768, 65_536, 131_072, 262_144]
SMALL_LENGTHS = [512, 1024]
STEPS = 3


def make_model(folder: Path, small: bool) -> None:
    """A checkpoint of random weights that reads as the embedded model does."""
    tokenizer = load_tokenizer("tiny")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        **(SMALL if small else SHAPE),
        **ends,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def words(tokens: int) -> Document:
    """A text of at least `tokens` tokens: every word is one or more."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (tokens, 4), generator=generator).tolist()
    return Document.of("random words", " ".join("".join(map(chr, word)) for word in letters))


class Clock(Callbacks):
    """The time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_progress(self, progress: TrainProgress) -> None:
        self.ends.append(time.perf_counter())
        self.losses.append(progress.loss)


class TrainerClock(TrainerCallback):  # type: ignore[misc]
    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize(self.device)
        self.ends.append(time.perf_counter())


def ours(folder: Path, length: int, device: torch.device) -> dict[str, Any]:
    loaded: LoadedModel = open_model(str(folder), options=lr.LoadOptions(dtype="float32"))
    clock, scaling = Clock(), lr.yarn(loaded.model, length)
    config = lr.FinetuneConfig(length=length, steps=STEPS, batch=1, warmup=0, bf16=True)
    with tempfile.TemporaryDirectory() as out:
        lr.finetune(
            loaded,
            scaling=scaling,
            data=[words(length)],
            output_dir=Path(out) / "run",
            config=config,
            cpu=device.type == "cpu",
            callbacks=clock,
        )
    loss = require_number(clock.losses[-1])
    return {"length": length, "tokens_per_second": length / (clock.ends[-1] - clock.ends[-2]), "loss": loss}


def defaults(folder: Path, length: int, device: torch.device) -> dict[str, Any]:
    """transformers' Trainer as it comes, but for bfloat16 and one row a step; the window is stated in its config."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.max_position_embeddings = length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2048, (STEPS, length), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    clock = TrainerClock(device)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            bf16=True,
            use_cpu=device.type == "cpu",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock])
        loss = require_number(trainer.train().training_loss)
    return {"length": length, "tokens_per_second": length / (clock.ends[-1] - clock.ends[-2]), "loss": loss}


def run(arguments: argparse.Namespace, seconds: float) -> None:
    ledger = Ledger(arguments, "finetuning", seconds)
    methods: dict[str, Callable[[Path, int, torch.device], dict[str, Any]]] = {"longrope": ours, "Trainer": defaults}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        make_model(folder, arguments.small)
        for length in SMALL_LENGTHS if arguments.small else LENGTHS:
            for name, train in list(methods.items()):

                def work(length: int = length, train: Any = train) -> dict[str, Any]:
                    return dict(train(folder, length, ledger.device))

                row = ledger.measure(f"{name} at {length}", work)
                if row is None or "tokens_per_second" not in row:
                    del methods[name]  # the first window that does not fit, or has no time, is the last
