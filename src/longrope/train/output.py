"""The output of a fine-tuning run: the checkpoint, the scaling it was trained for, and the summary, written last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longrope.data.packing import PackedRows
from longrope.errors import LongRopeError
from longrope.input_files import LARGEST_RECORD
from longrope.models.checkpoint_files import RECORD, copy_companions
from longrope.models.dequantised import model_folder
from longrope.models.loading import LoadedModel
from longrope.provenance import record
from longrope.rope.hf_config import unsupported_by_transformers
from longrope.rope.scaling import RopeScaling, Window
from longrope.run_files import ADAPTER, CHECKPOINT, FINETUNE_SUMMARY, SCALING
from longrope.storage import json_ready, read_json, write_json_atomic
from longrope.train.config import FinetuneConfig
from longrope.train.resume import remove_checkpoints, saving
from longrope.train.trainer import WindowTrainer
from longrope.written import note, sha256_file, temporary_folder

MOST_DOCUMENTS = 2_000_000
"""The most documents of a run: its results name each, in files that are read at once (LARGEST_RECORD)."""


def require_nameable(rows: PackedRows) -> None:
    """Raise LongRopeError (`too-large`) for rows from more documents than results can name."""
    if (found := len(rows.document_hashes)) > MOST_DOCUMENTS:
        raise LongRopeError(
            f"expected rows from at most {MOST_DOCUMENTS} documents, each of which the result names; found {found}",
            code="too-large",
            hint="give fewer `steps`, or longer documents",
        )


@dataclass(frozen=True, repr=False)
class FinetuneResult:
    """A finished fine-tuning run.

    `scaling`: the windows that were trained, in the file `path`. `checkpoint`: the folder of the weights, or of the
    adapter where LoRA was not merged. `summary`: the content of `finetune.json`: settings, loss curve, tokens by part,
    hashes of the texts, versions.
    """

    scaling: RopeScaling
    path: Path
    checkpoint: Path
    summary: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> FinetuneResult:
        """Read the result of the run in `folder`. Raises LongRopeError when the run is not finished."""
        folder = Path(folder)
        summary = read_json(folder / FINETUNE_SUMMARY, LARGEST_RECORD)
        return cls(RopeScaling.load(folder / SCALING), folder / SCALING, Path(summary["checkpoint"]), summary)

    def save(self, folder: str | Path) -> None:
        """Write `scaling.json` and `finetune.json` to an existing folder; the weights stay where they are."""
        self.scaling.save(Path(folder) / SCALING)
        write_json_atomic(Path(folder) / FINETUNE_SUMMARY, json_ready(self.summary))

    @property
    def losses(self) -> list[float]:
        """The loss of every step, in nats per token."""
        return [float(entry["loss"]) for entry in self.summary["curve"]]

    def __repr__(self) -> str:
        losses = self.losses
        return (
            f"FinetuneResult({len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f} nats per token, "
            f"windows of {', '.join(str(window.max_length) for window in self.scaling.windows)} tokens, "
            f"checkpoint {str(self.checkpoint)!r})"
        )


@dataclass(frozen=True)
class FinishedTraining:
    """A training whose last step is done. `tensors`: the gathered weights, where processes share them; else None."""

    loaded: LoadedModel
    scaling: RopeScaling
    windows: dict[str, Window]
    rows: PackedRows
    config: FinetuneConfig
    identity: dict[str, Any]
    trainer: WindowTrainer
    tensors: dict[str, Any] | None

    def write(self, output_dir: Path) -> None:
        """Write checkpoint, scaling and summary, in this order, and remove the Trainer's checkpoints.

        Raises LongRopeError where they cannot be written; the Trainer's checkpoints are then kept.
        """
        lora = self.config.lora
        checkpoint = output_dir / (CHECKPOINT if lora is None or lora.merge else ADAPTER)
        curve = [
            {name: entry[name] for name in ("step", "loss", "learning_rate", "grad_norm") if name in entry}
            for entry in self.trainer.state.log_history
            if "loss" in entry
        ]
        templates = {document.chat_template for document in self.rows.documents if document.chat_template is not None}
        common = {
            "settings": self.config.model_dump(),
            "tokens": self.rows.tokens_by_part,
            "rounds": self.rows.rounds(self.config.shares, len(self.rows)),
            "rows_sha256": self.rows.sha256,
            "document_sha256": list(self.rows.document_hashes),
            "final_loss": curve[-1]["loss"],
            # Rows that skip ahead are trained under another attention factor than that of the scaling.
            **({"row_attention_factors": self._row_factors()} if self.config.skip_to is not None else {}),
            **({"chat_template_sha256": sorted(templates)} if templates else {}),
            **record(),
        }
        trained = self._trained_scaling(checkpoint, common)
        with saving(str(checkpoint)), temporary_folder(checkpoint) as folder:
            if checkpoint.name == ADAPTER:
                self.trainer.accelerator.unwrap_model(self.trainer.model).save_pretrained(folder)
            else:
                self._save_weights(folder)
            trained.save(folder / SCALING)  # the weights alone then say which texts they have seen
            note(output_dir, {f"{checkpoint.name}/{path.name}": sha256_file(path) for path in folder.iterdir()})
            folder.rename(checkpoint)  # in full or not at all
        summary = {
            "checkpoint": str(checkpoint),
            "scaling": str(output_dir / SCALING),
            "steps": self.trainer.state.global_step,
            "not_in_transformers": unsupported_by_transformers(trained),
            "identity": self.identity,
            "curve": curve,
            **common,
        }
        FinetuneResult(trained, output_dir / SCALING, checkpoint, summary).save(output_dir)
        remove_checkpoints(output_dir)

    def _row_factors(self) -> dict[str, float]:
        """The attention factor that the rows of each part were computed with."""
        return {part: window.attention_factor for part, window in self.trainer.windows.items()}

    def _trained_scaling(self, checkpoint: Path, common: dict[str, Any]) -> RopeScaling:
        """The scaling with the windows that were trained, a single one holding for short texts too; how they were made
        in its provenance.
        """
        by_length = {window.max_length: window for window in self.windows.values()}
        windows = tuple(by_length[length] for length in sorted(by_length))
        earlier = self.scaling.provenance.get("training", [])
        before = self.loaded.checkpoint_scaling
        return RopeScaling(self.scaling.geometry, windows, self.scaling.provenance).with_provenance(
            # The texts that the weights had seen before this training.
            **({} if before is None else {"carried": before.provenance}),
            model=str(checkpoint) if checkpoint.name == CHECKPOINT else self.loaded.name,
            training=[*(earlier if isinstance(earlier, list) else [earlier]), {"model": self.loaded.name, **common}],
        )

    def _save_weights(self, folder: Path) -> None:
        """Write the weights as safetensors; config, tokenizer and licence as they came."""
        model: PreTrainedModel = self.loaded.model
        if self.config.lora is not None:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model).merge_and_unload()
        save_dtype = self.config.save_dtype
        dtype = model.dtype if save_dtype is None else getattr(torch, save_dtype)
        tensors = model.state_dict() if self.tensors is None else self.tensors
        # Once gathered or cast, a tied weight is a copy, which would be written beside the one it is tied to.
        tied = {name for name, source in model.all_tied_weights_keys.items() if source in tensors}
        tensors = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in tensors.items()
            if name not in tied
        }
        model.save_pretrained(folder, state_dict=tensors)
        with model_folder(self.loaded.name, weights=False) as source:
            copy_companions(source, folder)
            config = read_json(source / "config.json")
        config.pop(RECORD, None)  # of an export that was trained on: these are no longer its weights
        name = str(dtype).removeprefix("torch.")
        config |= {key: name for key in ("dtype", "torch_dtype") if key == "dtype" or key in config}
        write_json_atomic(folder / "config.json", config)
