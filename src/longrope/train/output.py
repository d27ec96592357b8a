"""What a fine-tuning run leaves: the checkpoint, the scaling it was trained for, and the summary, written last."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longrope.data.packing import PackedRows
from longrope.models.checkpoint_files import copy_companions, source_folder
from longrope.models.loading import LoadedModel
from longrope.provenance import record
from longrope.rope.hf_config import unsupported_by_transformers
from longrope.rope.scaling import RopeScaling, Window
from longrope.run_files import ADAPTER, CHECKPOINT, FINETUNE_SUMMARY, SCALING, TRAINER
from longrope.storage import json_ready, read_json, write_json_atomic
from longrope.train.config import FinetuneConfig
from longrope.train.trainer import WindowTrainer


@dataclass(frozen=True)
class FinetuneResult:
    """What a run left: the scaling that was trained, its path, and `finetune.json`.

    `checkpoint`: the weights, or the adapter where one was asked for.
    """

    scaling: RopeScaling
    path: Path
    checkpoint: Path
    summary: dict[str, Any]

    @classmethod
    def load(cls, out: Path) -> FinetuneResult:
        """What a finished run left in `out`. Raises LongRopeError when it is not there."""
        summary = read_json(out / FINETUNE_SUMMARY)
        return cls(RopeScaling.load(out / SCALING), out / SCALING, Path(summary["checkpoint"]), summary)

    @property
    def losses(self) -> list[float]:
        """Nats per token of every step."""
        return [float(entry["loss"]) for entry in self.summary["curve"]]


@dataclass(frozen=True)
class Writing:
    """A finished training, on its way to the folder `out`. `tensors`: the weights, gathered, where they are sharded."""

    loaded: LoadedModel
    scaling: RopeScaling
    windows: dict[str, Window]
    rows: PackedRows
    settings: FinetuneConfig
    identity: dict[str, Any]
    trainer: WindowTrainer
    tensors: dict[str, Any] | None
    out: Path

    def write(self) -> None:
        """Write all of it, the summary last, and remove the Trainer's checkpoints."""
        out, rows = self.out, self.rows
        lora = self.settings.lora
        checkpoint = out / (ADAPTER if lora is not None and not lora.merge else CHECKPOINT)
        curve = [
            {name: entry[name] for name in ("step", "loss", "learning_rate", "grad_norm") if name in entry}
            for entry in self.trainer.state.log_history
            if "loss" in entry
        ]
        common = {
            "settings": self.settings.model_dump(),
            "tokens": rows.tokens_by_part,
            "rows_sha256": rows.sha256,
            "document_sha256": list(rows.document_hashes),
            "final_loss": curve[-1]["loss"],
            **record(),
        }
        earlier = self.scaling.provenance.get("training", [])
        carried = self.loaded.checkpoint_scaling
        trained = trained_scaling(self.scaling, self.windows).with_provenance(
            # What the weights had seen before this training.
            **({} if carried is None else {"carried": carried.provenance}),
            model=str(checkpoint) if checkpoint.name == CHECKPOINT else self.loaded.name,
            training=[*(earlier if isinstance(earlier, list) else [earlier]), {"model": self.loaded.name, **common}],
        )
        with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as temporary:
            folder = Path(temporary) / checkpoint.name
            if checkpoint.name == ADAPTER:
                self.trainer.accelerator.unwrap_model(self.trainer.model).save_pretrained(folder)
            else:
                self._save_weights(folder)
            trained.save(folder / SCALING)  # who looks at the weights alone finds which texts they have seen
            folder.rename(checkpoint)  # in full or not at all
        trained.save(out / SCALING)
        summary = {
            "checkpoint": str(checkpoint),
            "scaling": str(out / SCALING),
            "steps": self.trainer.state.global_step,
            "not_in_transformers": unsupported_by_transformers(trained),
            "identity": self.identity,
            "curve": curve,
            **common,
        }
        write_json_atomic(out / FINETUNE_SUMMARY, json_ready(summary))
        shutil.rmtree(out / TRAINER, ignore_errors=True)

    def _save_weights(self, folder: Path) -> None:
        """Weights as safetensors; config, tokenizer and licence as they came."""
        model: PreTrainedModel = self.loaded.model
        if self.settings.lora is not None:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model).merge_and_unload()
        save_dtype = self.settings.save_dtype
        dtype = model.dtype if save_dtype is None else getattr(torch, save_dtype)
        tensors = model.state_dict() if self.tensors is None else self.tensors
        # Once gathered or cast, a tied weight is a copy, which would be written beside the one it is tied to.
        tied = {name for name, source in model.all_tied_weights_keys.items() if source in tensors}
        tensors = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in tensors.items()
            if name not in tied
        }
        source = source_folder(self.loaded.name)
        model.save_pretrained(folder, state_dict=tensors)
        copy_companions(source, folder)
        config = read_json(source / "config.json")
        name = str(dtype).removeprefix("torch.")
        config |= {key: name for key in ("dtype", "torch_dtype") if key == "dtype" or key in config}
        write_json_atomic(folder / "config.json", config)


def trained_scaling(scaling: RopeScaling, windows: dict[str, Window]) -> RopeScaling:
    """`scaling` with the windows that were trained; a single one holds for short texts too."""
    trained = {window.max_length: window for window in windows.values()}
    return RopeScaling(scaling.geometry, tuple(trained[length] for length in sorted(trained)), scaling.provenance)
